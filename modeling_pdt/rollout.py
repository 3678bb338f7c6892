"""Training and scoring of whole rows: notes of all blocks at once, and what every token may read.

Letters: R rows, B documents, S streams, T tokens, V rounds, L tokens of a block or text, K notes per block, N note
width, P plan items, D trunk width.
"""

from dataclasses import dataclass, field, replace

import torch

from .adapter_layer import PDTStack
from .bus import training_window
from .heads import soft_minimum
from .note_states import NoteStates
from .outputs import PDTOutput
from .prefix import begin_alike
from .trunk_split import TapState


@dataclass(frozen=True)
class EncodedTexts:
    """
    Short texts as the heads read them.

    Args:
        sources (`tuple`): The stack and the tensors they were made with; kept, so that their identity is the key.
        present (`torch.BoolTensor` of shape `[M]`): Texts that have tokens.
        states (`torch.Tensor` of shape `[present texts, L, D]`, *optional*): Their tap states.
        states_mask (`torch.BoolTensor` of shape `[present texts, L]`): Their tokens.
    """

    sources: tuple[PDTStack, torch.Tensor, torch.Tensor]
    present: torch.Tensor
    states: torch.Tensor | None
    states_mask: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """
    How rows of adjacent siblings write and read notes in one forward.

    Args:
        num_streams (`int`): S; rows of one document are adjacent.
        block_size (`int`): Tokens per block.
        capacity (`int`): Rounds kept readable.
        write_round_RT (`torch.LongTensor` of shape `[R, T]`): Round of the section token that a position consumes, -1
            for prompt, header and padding.
        read_round_RT (`torch.LongTensor` of shape `[R, T]`): Round of the token that a position predicts, -1 for
            prompt and padding.
        lag_R1 (`torch.LongTensor` of shape `[R, 1]`): Lag of each reader.
        item_ids_BPL, item_mask_BPL (*optional*): Tokens of the plan items; an item without tokens is absent.
        plan_slots_BP, plan_mask_BP (*optional*): Planner buckets, where snapshot 0 is to come from them.
        plan_on_bus (`bool`): Whether the plan is readable; the coverage head reads it all the same.
        note_ids_RVL, note_mask_RVL (*optional*): Tokens of the true notes of every block, for teacher notes.
        teacher_RV (`torch.BoolTensor` of shape `[R, V]`, *optional*): Blocks whose published note is the teacher's.
        keep_RV (`torch.BoolTensor` of shape `[R, V]`, *optional*): Blocks whose note is published at all.
        perturbation_RVKN (`torch.Tensor`, *optional*): Added to the published notes.
        donor_R (`torch.LongTensor` of shape `[R]`, *optional*): Row whose notes are published in place of each row's.
        wants_coverage, wants_agreement (`bool`): Heads to run.
        encoded (`dict`): Texts that a pass has sent through the lower trunk; copies made with `replace` share it, so
            that further passes over the same rows need not.
    """

    num_streams: int
    block_size: int
    capacity: int
    write_round_RT: torch.Tensor
    read_round_RT: torch.Tensor
    lag_R1: torch.Tensor
    item_ids_BPL: torch.Tensor | None = None
    item_mask_BPL: torch.Tensor | None = None
    plan_slots_BP: torch.Tensor | None = None
    plan_mask_BP: torch.Tensor | None = None
    plan_on_bus: bool = True
    note_ids_RVL: torch.Tensor | None = None
    note_mask_RVL: torch.Tensor | None = None
    teacher_RV: torch.Tensor | None = None
    keep_RV: torch.Tensor | None = None
    perturbation_RVKN: torch.Tensor | None = None
    donor_R: torch.Tensor | None = None
    wants_coverage: bool = False
    wants_agreement: bool = False
    encoded: dict[tuple[int, int, int], EncodedTexts] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rounds(self) -> int:
        """V: rounds that any row of the batch writes."""
        return max(1, int(self.write_round_RT.max()) + 1)

    def snapshot_zero(
        self, plan_BPN: torch.Tensor | None, plan_mask_BP: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What windows hold of the plan and its mask."""
        return (plan_BPN, plan_mask_BP) if self.plan_on_bus else (None, None)

    def first_reader(self, stream_ids: torch.Tensor | None = None) -> int:
        """Column of the first token, of any row, that reads notes or has a stream `[R, T]`; 0 if there is none."""
        conditioned = self.read_round_RT >= 0
        if stream_ids is not None:
            conditioned = conditioned | (stream_ids >= 0)
        return int(conditioned.any(dim=0).int().argmax())


@dataclass(frozen=True)
class BusRollout:
    """Notes, window and plan of a batch of whole rows; see [`Rollout`] for the letters."""

    note_states: NoteStates
    written_RVKN: torch.Tensor
    teacher_RVKN: torch.Tensor | None
    published_RVKN: torch.Tensor
    on_bus_RV: torch.Tensor
    plan_BPN: torch.Tensor | None
    plan_mask_BP: torch.Tensor | None


def run_lower_half(
    stack: PDTStack,
    tap: TapState,
    rollout: Rollout | None,
    stream_ids: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    upper: bool,
) -> TapState:
    """
    Rows up to the tap. Of a rollout, the columns that nothing conditions run apart, see [`~trunk_split.share_prefix`],
    unless a cache or ready masks forbid it.

    Args:
        stack (`PDTStack`), tap (`TapState`): The rows, before any layer or at the tap already.
        rollout (`Rollout`, *optional*): Of these rows.
        stream_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Stream of each token, -1 for none.
        input_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Siblings that begin with the same tokens share
            their first columns.
        attention_mask (`torch.Tensor` of shape `[R, T]`, *optional*): 1 for real tokens.
        upper (`bool`): Whether the upper half will follow.
    """
    plain = torch.is_tensor(attention_mask) and attention_mask.dim() == 2 and tap.hidden.shape[1] > 1
    if rollout is None or tap.prefix is not None or tap.cache is not None or not plain:
        return stack.lower_from(tap)
    columns = min(max(rollout.first_reader(stream_ids), 1), tap.hidden.shape[1] - 1)
    siblings = rollout.num_streams
    rows = (input_ids, attention_mask, tap.position_ids)
    if input_ids is None or not all(begin_alike(part, siblings, columns) for part in rows):
        siblings = 1
    return stack.share_prefix(tap, columns, siblings, attention_mask, upper)


def encode_texts(stack: PDTStack, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tap states `[M, L, D]` of M short texts given as right-padded tokens `[M, L]`; without gradient to the trunk."""
    with torch.no_grad():
        return stack.lower(input_ids=ids, attention_mask=mask.long()).hidden


def read_texts(stack: PDTStack, ids: torch.Tensor, mask: torch.Tensor, rollout: Rollout) -> EncodedTexts:
    """The texts `[..., L]` of a rollout, encoded in the first pass that reads them."""
    key = id(stack), id(ids), id(mask)
    if key not in rollout.encoded:
        tokens, real = ids.flatten(0, -2), mask.bool().flatten(0, -2)
        present = real.any(dim=1)
        states = encode_texts(stack, tokens[present], real[present]) if bool(present.any()) else None
        rollout.encoded[key] = EncodedTexts((stack, ids, mask), present, states, real[present])
    return rollout.encoded[key]


def plan_vectors(stack: PDTStack, rollout: Rollout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Snapshot 0 `[B, P, N]` and its mask: from item texts, else from planner buckets, else none."""
    heads = stack.heads
    if rollout.item_ids_BPL is not None:
        documents, items, _ = rollout.item_ids_BPL.shape
        texts = read_texts(stack, rollout.item_ids_BPL, rollout.item_mask_BPL, rollout)
        vectors = torch.zeros(documents * items, heads.note_norm.weight.shape[0], device=texts.present.device)
        if texts.states is not None:
            encoded = heads.encode_items(texts.states, texts.states_mask)
            vectors = vectors.masked_scatter(texts.present[:, None], encoded)
        return vectors.view(documents, items, -1), texts.present.view(documents, items)
    if rollout.plan_slots_BP is not None:
        return heads.embed_slots(rollout.plan_slots_BP), rollout.plan_mask_BP.bool()
    return None, None


def window_with_plan(
    stack: PDTStack,
    notes: torch.Tensor | None,
    notes_mask: torch.Tensor | None,
    plan_slots: torch.Tensor | None,
    plan_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A ready window of notes with the planner's items as snapshot 0 before it.

    Args:
        notes (`torch.Tensor` of shape `[R, W, N]`, *optional*), notes_mask (*optional*, `[R, W]` or `[R, T, W]`): A
            missing mask shows every note.
        plan_slots (`torch.LongTensor` of shape `[R, P]`, *optional*), plan_mask (*optional*, `[R, P]`): Buckets; 0 is
            no item, and a missing mask shows all others.

    Returns:
        `(notes, mask)` of shapes `[R, P + W, N]` and `[R, P + W]` or `[R, T, P + W]`.

    Raises:
        ValueError: For a bucket outside the plan vocabulary, or a mask without what it masks.
    """
    if (notes is None and notes_mask is not None) or (plan_slots is None and plan_mask is not None):
        raise ValueError("notes_mask goes with notes and plan_mask goes with plan_slots; one was given alone.")
    if notes is not None and notes_mask is None:
        notes_mask = torch.ones(notes.shape[:2], dtype=torch.bool, device=notes.device)
    if plan_slots is None:
        return notes, notes_mask
    size = stack.heads.planner.embedding.num_embeddings
    if bool(((plan_slots < 0) | (plan_slots >= size)).any()):
        raise ValueError(
            f"plan_slots must be in [0, {size - 1}], got {int(plan_slots.min())}..{int(plan_slots.max())}."
        )
    plan = stack.heads.embed_slots(plan_slots)
    shown = plan_slots != 0 if plan_mask is None else plan_mask.bool()
    if notes is None:
        return plan, shown
    if notes_mask.dim() == 3:
        shown = shown[:, None].expand(-1, notes_mask.shape[1], -1)
    return torch.cat([plan, notes], dim=1), torch.cat([shown, notes_mask.bool()], dim=-1)


def gather_blocks(states_RTD: torch.Tensor, write_round_RT: torch.Tensor, block_size: int, rounds: int):
    """
    Section tokens by block.

    Returns:
        `(states, mask)` of shapes `[R, V, block_size, D]` and `[R, V, block_size]`.
    """
    rows, tokens, width = states_RTD.shape
    written = write_round_RT >= 0
    start_R = written.int().argmax(dim=1)
    index = start_R[:, None] + torch.arange(rounds * block_size, device=states_RTD.device)
    inside = index < tokens
    index = index.clamp(max=tokens - 1)
    mask = inside & written.gather(1, index)
    states = states_RTD.gather(1, index[..., None].expand(-1, -1, width))
    shape = (rows, rounds, block_size)
    return states.view(*shape, width), mask.view(shape)


@torch.no_grad()
def last_states(
    stack: PDTStack, tap: TapState, rollout: Rollout, stream_ids: torch.Tensor | None, gate_scale: float
) -> torch.Tensor:
    """
    Last hidden states `[R, T, D]` of rows that read the plan and no notes, as a first pass for `writer_tap="top"`.

    In decoding they read earlier rounds too, whose notes would have to be written before: in whole rows, notes of the
    first round are exact, later ones an approximation unless the gate of SNC is shut.
    """
    plan, plan_mask = rollout.snapshot_zero(*plan_vectors(stack, rollout))
    states = None
    if plan is not None:
        shown = plan_mask.repeat_interleave(rollout.num_streams, dim=0)
        states = stack.project_notes(plan, shown[:, None] & (rollout.read_round_RT >= 0)[..., None], gate_scale)
        states = replace(states, first_reader=rollout.first_reader(stream_ids))
    return stack.upper(tap, states, stream_ids)


def write_notes(stack: PDTStack, states_RTD: torch.Tensor, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Notes `[R, V, K, N]` that every row writes about each of its blocks, and which blocks exist `[R, V]`."""
    states, mask = gather_blocks(states_RTD.detach(), rollout.write_round_RT, rollout.block_size, rollout.rounds)
    notes = stack.heads.write(states.flatten(0, 1), mask.flatten(0, 1), rollout.block_size)
    return notes.view(*mask.shape[:2], *notes.shape[1:]), mask.any(dim=2)


def teacher_notes(stack: PDTStack, rollout: Rollout) -> torch.Tensor | None:
    """Notes `[R, V, K, N]` encoded from the true notes' text; zeros for a block without text."""
    if rollout.note_ids_RVL is None:
        return None
    rows, rounds, _ = rollout.note_ids_RVL.shape
    texts = read_texts(stack, rollout.note_ids_RVL, rollout.note_mask_RVL, rollout)
    num_notes, width = stack.heads.encoder.query.shape[0], stack.heads.note_norm.weight.shape[0]
    notes = torch.zeros(rows * rounds, num_notes, width, device=texts.present.device)
    if texts.states is not None:
        encoded = stack.heads.encode(texts.states, texts.states_mask)
        notes = notes.masked_scatter(texts.present[:, None, None], encoded)
    return notes.view(rows, rounds, num_notes, width)


def run_bus(
    stack: PDTStack, tap: TapState, rollout: Rollout, stream_ids: torch.Tensor | None = None, gate_scale: float = 1.0
) -> BusRollout:
    """Writes every row's notes, mixes in the teacher's, and projects what each token may read."""
    top = stack.writer_tap == "top"
    states = last_states(stack, tap, rollout, stream_ids, gate_scale) if top else tap.hidden
    return publish_notes(stack, rollout, *write_notes(stack, states, rollout), stream_ids, gate_scale)


def publish_notes(
    stack: PDTStack,
    rollout: Rollout,
    written: torch.Tensor,
    exists: torch.Tensor,
    stream_ids: torch.Tensor | None = None,
    gate_scale: float = 1.0,
) -> BusRollout:
    """[`run_bus`] after the writing: `written` and `exists` are from [`write_notes`]."""
    teacher = teacher_notes(stack, rollout)
    published = written
    if rollout.teacher_RV is not None and teacher is not None:
        published = torch.where(rollout.teacher_RV[..., None, None], teacher, written)
    if rollout.perturbation_RVKN is not None:
        published = published + rollout.perturbation_RVKN
    plan, plan_mask = plan_vectors(stack, rollout)
    on_bus = exists if rollout.keep_RV is None else exists & rollout.keep_RV
    if rollout.donor_R is not None:
        published, on_bus = published[rollout.donor_R], on_bus[rollout.donor_R]
    notes, mask = training_window(
        published,
        on_bus,
        rollout.read_round_RT,
        rollout.lag_R1,
        rollout.num_streams,
        rollout.capacity,
        *rollout.snapshot_zero(plan, plan_mask),
    )
    note_states = stack.project_notes(notes, mask, gate_scale)
    note_states = replace(note_states, first_reader=rollout.first_reader(stream_ids))
    return BusRollout(note_states, written, teacher, published, on_bus, plan, plan_mask)


def coverage_logits(stack: PDTStack, tap: TapState, rollout: Rollout, bus: BusRollout) -> torch.Tensor | None:
    """Coverage `[R, V, P]` of every plan item by the row's own text up to the end of each round."""
    if bus.plan_BPN is None:
        return None
    rounds = torch.arange(rollout.rounds, device=tap.hidden.device)[None, :, None]
    write_round = rollout.write_round_RT[:, None, :]
    upto = (write_round >= 0) & (write_round <= rounds)
    items = bus.plan_BPN.repeat_interleave(rollout.num_streams, dim=0)
    return stack.heads.coverage(tap.hidden.detach(), upto, items)


def agreement_logits(
    stack: PDTStack, tap: TapState, rollout: Rollout, bus: BusRollout, coverage_RVP: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Agreement `[R, V]` of every block and `[R, T]` of every token with the notes up to and including its round."""
    states = tap.hidden.detach()
    previous = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
    write_round = rollout.write_round_RT
    notes, mask = training_window(
        bus.published_RVKN.detach(),
        bus.on_bus_RV,
        write_round,
        torch.zeros_like(rollout.lag_R1),
        rollout.num_streams,
        rollout.capacity,
        *rollout.snapshot_zero(None if bus.plan_BPN is None else bus.plan_BPN.detach(), bus.plan_mask_BP),
    )
    index = write_round.clamp(min=0)
    own = bus.written_RVKN.detach().mean(dim=2)
    own = own.gather(1, index[..., None].expand(-1, -1, own.shape[-1]))
    coverage = torch.zeros_like(index, dtype=own.dtype)
    if coverage_RVP is not None:
        items = bus.plan_mask_BP.repeat_interleave(rollout.num_streams, dim=0)[:, None].float()
        mean = (coverage_RVP.detach().sigmoid() * items).sum(-1) / items.sum(-1).clamp(min=1)
        coverage = mean.gather(1, index)
    logits = stack.heads.agreement.token_logits(states, previous, notes, mask, own, coverage)
    rounds = torch.arange(rollout.rounds, device=states.device)[None, :, None]
    return soft_minimum(logits, write_round[:, None, :] == rounds), logits


def run_rollout(
    stack: PDTStack,
    tap: TapState,
    rollout: Rollout,
    stream_ids: torch.Tensor | None,
    gate_scale: float,
    output: PDTOutput,
) -> NoteStates:
    """
    Notes, window and heads of whole rows.

    Args:
        stack (`PDTStack`), tap (`TapState`), rollout (`Rollout`): The rows.
        stream_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Runs the stream head.
        gate_scale (`float`): Multiplies the SNC gate.
        output (`PDTOutput`): Receives notes and logits of the heads.

    Returns:
        `NoteStates`: what every token may read.
    """
    bus = run_bus(stack, tap, rollout, stream_ids, gate_scale)
    output.notes, output.speculation = bus.teacher_RVKN, bus.written_RVKN
    if rollout.wants_coverage or rollout.wants_agreement:
        output.coverage_logits = coverage_logits(stack, tap, rollout, bus)
    if rollout.wants_agreement:
        output.agreement_logits, output.agreement_token_logits = agreement_logits(
            stack, tap, rollout, bus, output.coverage_logits
        )
    if stream_ids is not None:
        output.stream_logits = stack.heads.stream(tap.hidden.detach(), rollout.write_round_RT >= 0)
    return bus.note_states
