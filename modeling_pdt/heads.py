"""Heads on tap states: notes encoder, writer, planner, coverage, agreement and stream classifier.

Letters: R rows, L tokens of a block or a text, T tokens of a row, V rounds, K notes per block, D trunk width, N note
width, P plan slots or items, H heads, S streams.
"""

import torch
from torch import nn

from .configuration_adapter import PDTAdapterConfig
from .snc import RMSNorm, SharedNotesCrossAttention, orthogonal_rows


class NotesPooler(nn.Module):
    """
    Attention pooling of token states into notes: one learned query and one soft place within the text per note.

    Args:
        width (`int`), num_notes (`int`), notes_dim (`int`): D, K and N.
        projection_ND (`torch.Tensor` of shape `[N, D]`): Orthonormal rows that the output projection starts from.
        placed (`bool`, *optional*, defaults to `True`): Start the notes at evenly spread places of the text instead of
            looking everywhere alike.
    """

    def __init__(
        self, width: int, num_notes: int, notes_dim: int, projection_ND: torch.Tensor, placed: bool = True
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Parameter(torch.randn(num_notes, width))
        self.place = nn.Parameter((torch.arange(num_notes) + 0.5) / num_notes)
        self.sharpness = nn.Parameter(torch.full((num_notes,), float(num_notes) if placed else 0.0))
        self.out = nn.Linear(width, notes_dim, bias=False)
        with torch.no_grad():
            self.key.weight.copy_(torch.eye(width))
            self.query.mul_(width**-0.5)
            self.out.weight.copy_(projection_ND)

    def forward(self, states_RLD: torch.Tensor, mask_RL: torch.Tensor, span: torch.Tensor | int) -> torch.Tensor:
        """
        Args:
            states_RLD (`torch.Tensor` of shape `[R, L, D]`): States of the trunk, real tokens first.
            mask_RL (`torch.BoolTensor` of shape `[R, L]`): Real tokens.
            span (`int` or `torch.Tensor` of shape `[R]`): Length that counts as the whole text.

        Returns:
            `torch.Tensor` of shape `[R, K, N]`, not yet normalised; zeros for a text without tokens.
        """
        states = self.norm(states_RLD)
        place_1L = torch.arange(states.shape[1], device=states.device)[None] + 0.5
        place_RL = place_1L / (span[:, None] if torch.is_tensor(span) else span)
        scores = self.query @ self.key(states).transpose(1, 2) * states.shape[-1] ** -0.5
        distance = place_RL[:, None, :] - self.place[None, :, None]
        scores = scores - (self.sharpness[None, :, None] * distance).square()
        scores = scores.masked_fill(~mask_RL[:, None, :], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1) * mask_RL[:, None, :]
        return self.out(weights @ states)


class PlannerHead(nn.Module):
    """
    Predicts P plan items as hash buckets from the prompt; its low-rank embedding also makes snapshot 0 from buckets.

    Args:
        width (`int`), config (`PDTAdapterConfig`): D, and the plan's sizes.
    """

    def __init__(self, width: int, config: PDTAdapterConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.slot = nn.Parameter(torch.randn(config.num_plan_slots, width) * width**-0.5)
        self.key = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, config.plan_dim, bias=False)
        self.embedding = nn.Embedding(config.plan_vocab_size, config.plan_dim)
        self.up = nn.Linear(config.plan_dim, config.notes_dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.plan_dim**-0.5)

    def forward(self, states_RTD: torch.Tensor, prompt_mask_RT: torch.Tensor) -> torch.Tensor:
        """Bucket logits `[R, P, plan_vocab_size]` from the prompt's tap states."""
        states = self.norm(states_RTD)
        scores = self.slot @ self.key(states).transpose(1, 2) * states.shape[-1] ** -0.5
        scores = scores.masked_fill(~prompt_mask_RT[:, None, :], torch.finfo(scores.dtype).min)
        pooled = scores.softmax(dim=-1) @ states
        return self.down(pooled) @ self.embedding.weight.T

    def embed(self, slots_RP: torch.Tensor) -> torch.Tensor:
        """Unnormalised plan vectors `[R, P, N]` of bucket ids `[R, P]`."""
        return self.up(self.embedding(slots_RP))


class CoverageHead(nn.Module):
    """
    Has this stream's text so far covered a plan item? Cross-attention from the item's vector to the stream's states.

    An item is a pooled state of its text. So attention starts in trunk space: an item looks for the words it is made
    of.

    Args:
        width (`int`), notes_dim (`int`), num_heads (`int`): D, N and H.
        projection_ND (`torch.Tensor` of shape `[N, D]`): Orthonormal rows that map states to items.
    """

    def __init__(self, width: int, notes_dim: int, num_heads: int, projection_ND: torch.Tensor) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.norm = RMSNorm(width)
        self.query = nn.Linear(notes_dim, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(3 * width, width)
        self.score = nn.Linear(width, 1)
        with torch.no_grad():
            self.query.weight.copy_(projection_ND.T)
            self.key.weight.copy_(torch.eye(width))

    def forward(self, states_RTD: torch.Tensor, upto_RVT: torch.Tensor, items_RPN: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states_RTD (`torch.Tensor` of shape `[R, T, D]`): Tap states of the row.
            upto_RVT (`torch.BoolTensor` of shape `[R, V, T]`): Own tokens that count at the end of each round.
            items_RPN (`torch.Tensor` of shape `[R, P, N]`): Plan item vectors.

        Returns:
            `torch.Tensor` of shape `[R, V, P]`: logits.
        """
        rows, tokens, width = states_RTD.shape
        rounds, items = upto_RVT.shape[1], items_RPN.shape[1]
        states, query = self.norm(states_RTD), self.query(items_RPN)
        # There are fewer items than tokens: the projections of keys and values act on the side of the items.
        heads_HED = (self.num_heads, self.head_dim, width)
        queries = query.view(rows, items, self.num_heads, self.head_dim)
        asked = torch.einsum("rphe,hed->rhpd", queries, self.key.weight.view(heads_HED)).flatten(1, 2)
        scores = asked @ states.transpose(1, 2) * self.head_dim**-0.5
        keep = upto_RVT[:, None, :, None, :]
        scores = scores.view(rows, self.num_heads, 1, items, tokens).masked_fill(~keep, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1) * keep
        pooled = (weights.flatten(1, 3) @ states).view(rows, self.num_heads, rounds, items, width)
        context = torch.einsum("rhvpd,hed->rvphe", pooled, self.value.weight.view(heads_HED)).flatten(3)
        query = query[:, None].expand_as(context)
        mixed = self.mix(torch.cat([context, query, context * query], dim=-1))
        return self.score(torch.nn.functional.gelu(mixed)).squeeze(-1)


class AgreementHead(nn.Module):
    """
    May this block stand beside what the siblings have written?

    Every token's state is compared with what the *previous* position reads from the siblings' notes, by an attention
    that starts as a copy of the trained SNC; the block's logit is the soft minimum over its tokens.

    Args:
        width (`int`), config (`PDTAdapterConfig`): D, and the notes' sizes.
    """

    def __init__(self, width: int, config: PDTAdapterConfig) -> None:
        super().__init__()
        self.reader = SharedNotesCrossAttention(
            width, config.notes_dim, config.snc_heads, config.gate_mode, config.gate_init, "trunk_space"
        )
        # The reader compares, it does not add to the trunk: it has no gate.
        del self.reader.gate
        self.norm = RMSNorm(width)
        self.mix = nn.Linear(3 * width, width)
        self.own_note = nn.Linear(config.notes_dim, width, bias=False)
        self.coverage = nn.Linear(1, width, bias=False)
        self.score = nn.Linear(width, 1)

    @torch.no_grad()
    def start_from(self, snc: SharedNotesCrossAttention) -> None:
        """Copies the trained SNC of the first site into the reader."""
        state = {name: value for name, value in snc.state_dict().items() if not name.startswith("gate.")}
        self.reader.load_state_dict(state)

    def token_logits(
        self,
        states_RTD: torch.Tensor,
        previous_RTD: torch.Tensor,
        notes_GWN: torch.Tensor,
        mask_RTW: torch.Tensor,
        own_notes_RTN: torch.Tensor,
        coverage_RT: torch.Tensor,
    ) -> torch.Tensor:
        """
        Agreement of every token.

        Args:
            states_RTD, previous_RTD (`torch.Tensor` of shape `[R, T, D]`): Tap state of each token and of the position
                before it.
            notes_GWN (`torch.Tensor` of shape `[G, W, N]`): Plan and siblings' notes, the block's own round included.
            mask_RTW (`torch.BoolTensor` of shape `[R, T, W]`): What each token is judged against.
            own_notes_RTN (`torch.Tensor` of shape `[R, T, N]`): Mean of the notes of the token's own block.
            coverage_RT (`torch.Tensor` of shape `[R, T]`): Mean coverage at the end of the token's block.

        Returns:
            `torch.Tensor` of shape `[R, T]`: logits.
        """
        queries = self.reader.norm(previous_RTD)
        bias = self.reader.bias(mask_RTW, rows_per_group=mask_RTW.shape[0] // notes_GWN.shape[0])
        context = self.reader.attend(queries, *self.reader.project(notes_GWN), bias)
        read = self.reader.o_proj(context.flatten(2))
        states = self.norm(states_RTD)
        mixed = self.mix(torch.cat([read, states, read * states], dim=-1))
        mixed = mixed + self.own_note(own_notes_RTN) + self.coverage(coverage_RT[..., None])
        return self.score(torch.nn.functional.gelu(mixed)).squeeze(-1)


def soft_minimum(logits_RT: torch.Tensor, member_RVT: torch.Tensor) -> torch.Tensor:
    """
    Soft minimum of token logits over the tokens of each block: `-log sum exp(-logit)`.

    Args:
        logits_RT (`torch.Tensor` of shape `[R, T]`): Token logits.
        member_RVT (`torch.BoolTensor` of shape `[R, V, T]`): Tokens of each block.

    Returns:
        `torch.Tensor` of shape `[R, V]`; a large finite value for a block without tokens.
    """
    scores = (-logits_RT[:, None, :]).masked_fill(~member_RVT, -30.0)
    return -torch.logsumexp(scores, dim=-1)


class StreamHead(nn.Module):
    """
    Which stream wrote this text? A diagnostic of how far the streams' states differ.

    Args:
        width (`int`), num_streams (`int`): D and S.
    """

    def __init__(self, width: int, num_streams: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.score = nn.Linear(width, num_streams)

    def forward(self, states_RTD: torch.Tensor, mask_RT: torch.Tensor) -> torch.Tensor:
        """Logits `[R, S]` from the mean tap state over the masked tokens."""
        weights = mask_RT.float()
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return self.score((self.norm(states_RTD) * weights[..., None]).sum(dim=1))


class PDTHeads(nn.Module):
    """
    All heads of one adapter. Writer, encoder and planner end in one `note_norm`, so their notes share a space.

    Args:
        config (`PDTAdapterConfig`): Resolved against the trunk.
    """

    def __init__(self, config: PDTAdapterConfig) -> None:
        super().__init__()
        width, notes_dim = config.trunk_hidden_size, config.notes_dim
        projection = orthogonal_rows(notes_dim, width)
        self.note_norm = RMSNorm(notes_dim)
        self.writer = NotesPooler(width, config.notes_per_block, notes_dim, projection)
        self.encoder = NotesPooler(width, config.notes_per_block, notes_dim, projection)
        self.item_encoder = NotesPooler(width, 1, notes_dim, projection, placed=False)
        self.planner = PlannerHead(width, config)
        self.coverage = CoverageHead(width, notes_dim, config.snc_heads, projection)
        self.agreement = AgreementHead(width, config)
        self.stream = StreamHead(width, config.num_streams)

    def write(self, states_RLD: torch.Tensor, mask_RL: torch.Tensor, block_size: int) -> torch.Tensor:
        """Notes `[R, K, N]` of streams' own blocks, given as states of the `writer_tap`; zeros for an empty block."""
        return self._finish(self.writer(states_RLD, mask_RL, block_size), mask_RL)

    def encode(self, states_RLD: torch.Tensor, mask_RL: torch.Tensor) -> torch.Tensor:
        """Notes `[R, K, N]` of texts given as tap states."""
        return self._finish(self.encoder(states_RLD, mask_RL, mask_RL.sum(1).clamp(min=1)), mask_RL)

    def encode_items(self, states_RLD: torch.Tensor, mask_RL: torch.Tensor) -> torch.Tensor:
        """One vector `[R, N]` per plan item, from its text's tap states."""
        return self._finish(self.item_encoder(states_RLD, mask_RL, mask_RL.sum(1).clamp(min=1)), mask_RL)[:, 0]

    def embed_slots(self, slots_RP: torch.Tensor) -> torch.Tensor:
        """Plan vectors `[R, P, N]` of the planner's bucket ids."""
        return self.note_norm(self.planner.embed(slots_RP))

    def _finish(self, pooled_RKN: torch.Tensor, mask_RL: torch.Tensor) -> torch.Tensor:
        return self.note_norm(pooled_RKN) * mask_RL.any(dim=1)[:, None, None]
