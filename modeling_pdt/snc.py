"""Shared-notes cross-attention and the stream adapter: the equations that condition the upper trunk.

Letters: R rows, T tokens, D trunk width, N note width, W notes of a window, H heads, S streams, G groups of rows.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .note_states import NoteStates


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned channel scale, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of `x` to RMS 1 and scales its channels."""
        return torch.nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


def orthogonal_rows(rows: int, columns: int) -> torch.Tensor:
    """A `[rows, columns]` matrix with orthonormal rows (rows <= columns); the identity when it is square."""
    if rows == columns:
        return torch.eye(rows)
    return nn.init.orthogonal_(torch.empty(rows, columns))


class NotesGate(nn.Module):
    """
    The one effective gate of a site: sigmoid of a logit that is shared, per head, or per head and token.

    Args:
        width (`int`), num_heads (`int`): D and H.
        mode (`str`): `"scalar"`, `"per_head"` or `"dynamic"`.
        init (`float`): Initial logit.
    """

    def __init__(self, width: int, num_heads: int, mode: str, init: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((1 if mode == "scalar" else num_heads,), float(init)))
        self.dynamic = nn.Linear(width, num_heads, bias=False) if mode == "dynamic" else None
        if self.dynamic is not None:
            nn.init.zeros_(self.dynamic.weight)

    def forward(self, queries_RTD: torch.Tensor) -> torch.Tensor:
        """Gate values that broadcast over `[R, T, H]`, in (0, 1)."""
        logit = self.logit
        if self.dynamic is not None:
            logit = logit + self.dynamic(queries_RTD)
        return torch.sigmoid(logit)


class SharedNotesCrossAttention(nn.Module):
    """
    Pre-norm multi-head cross-attention from trunk states to the notes of the visible window.

    A learned sink per head takes the weight that no note deserves; without a visible note the output is exactly zero.
    The update is measured in units of the state's own RMS, so that one start serves trunks of any activation scale.

    Args:
        width (`int`), notes_dim (`int`), num_heads (`int`): D, N and H.
        gate_mode (`str`), gate_init (`float`): See [`NotesGate`].
        init (`str`): See [`reset_parameters`].
    """

    def __init__(
        self, width: int, notes_dim: int, num_heads: int, gate_mode: str, gate_init: float, init: str
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.norm = RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(notes_dim, width, bias=False)
        self.v_proj = nn.Linear(notes_dim, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.sink = nn.Parameter(torch.zeros(num_heads))
        self.gate = NotesGate(width, num_heads, gate_mode, gate_init)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str, note_projection_ND: torch.Tensor | None = None) -> None:
        """
        Starts in trunk space: query and output identities, key and value the transpose of the notes' projection.

        Args:
            init (`str`): `"zero"` for an output projection of zeros; anything else, trunk space.
            note_projection_ND (`torch.Tensor` of shape `[N, D]`, *optional*): Rows that map states to notes.
        """
        width, notes_dim = self.k_proj.weight.shape
        if note_projection_ND is None:
            note_projection_ND = orthogonal_rows(notes_dim, width)
        self.q_proj.weight.copy_(torch.eye(width))
        self.k_proj.weight.copy_(note_projection_ND.T)
        self.v_proj.weight.copy_(note_projection_ND.T)
        self.o_proj.weight.copy_(torch.zeros(width, width) if init == "zero" else torch.eye(width))

    def project(self, notes_GWN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled keys and values `[G, H, W + 1, head_dim]` of notes `[G, W, N]`; zeros last, for the sink."""
        notes = torch.nn.functional.pad(notes_GWN.to(self.k_proj.weight.dtype), (0, 0, 0, 1))
        shape = (*notes.shape[:2], self.num_heads, self.head_dim)
        keys, values = self.k_proj(notes) * self.head_dim**-0.5, self.v_proj(notes)
        return keys.view(shape).transpose(1, 2).contiguous(), values.view(shape).transpose(1, 2).contiguous()

    def bias(self, mask: torch.Tensor, tokens: int = 1, rows_per_group: int = 1) -> torch.Tensor:
        """
        What the scores get added: minus infinity where a note is hidden, and the sink's own score.

        Args:
            mask (`torch.BoolTensor` of shape `[R, W]` or `[R, T, W]`): Visible notes.
            tokens (`int`, *optional*, defaults to 1): T; with one window per row, 1 serves any number of tokens.
            rows_per_group (`int`, *optional*, defaults to 1): R / G.

        Returns:
            `torch.Tensor` of shape `[G, H, R / G * T, W + 1]`.
        """
        mask = mask[:, None, :].expand(-1, tokens, -1) if mask.dim() == 2 else mask
        mask = mask.reshape(mask.shape[0] // rows_per_group, 1, rows_per_group * mask.shape[1], mask.shape[2])
        hidden = torch.zeros(mask.shape, dtype=self.sink.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        sink = self.sink.view(1, -1, 1, 1).expand(mask.shape[0], -1, mask.shape[2], 1)
        return torch.cat([hidden.expand(-1, self.num_heads, -1, -1), sink], dim=-1)

    def weights(self, queries_RTD: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attention weights `[G, H, R / G * T, W + 1]`, the sink's last; arguments as in [`attend`]."""
        rows, tokens = queries_RTD.shape[:2]
        groups = keys.shape[0]
        queries = self.q_proj(queries_RTD).view(groups, rows // groups * tokens, self.num_heads, self.head_dim)
        scores = queries.transpose(1, 2) @ keys.transpose(2, 3)
        return scores.add_(bias).softmax(dim=-1)

    def attend(
        self, queries_RTD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """
        Per-head context of already normalised queries.

        Args:
            queries_RTD (`torch.Tensor` of shape `[R, T, D]`): Normalised trunk states.
            keys, values (`torch.Tensor` of shape `[G, H, W + 1, head_dim]`): From [`project`]; R is a multiple of G.
            bias (`torch.Tensor`, broadcastable to `[G, H, R / G * T, W + 1]`): From [`bias`].

        Returns:
            `torch.Tensor` of shape `[R, T, H, head_dim]`; zeros where nothing is visible.
        """
        return self.context(self.weights(queries_RTD, keys, bias), values, queries_RTD.shape[1])

    def context(self, weights: torch.Tensor, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """Per-head context `[R, T, H, head_dim]` from [`weights`] and the values of [`project`]; T is `tokens`."""
        return (weights @ values).transpose(1, 2).reshape(-1, tokens, self.num_heads, self.head_dim)

    def forward(self, hidden_RTD: torch.Tensor, note_states: NoteStates, site: int) -> torch.Tensor:
        """The state with what it read from the notes added, in the state's dtype."""
        start = note_states.first_reader
        reading = hidden_RTD[:, start:] if start else hidden_RTD
        queries = self.norm(reading)
        bias = note_states.biases[site] if note_states.biases else None
        if bias is None:
            mask = note_states.mask[:, start:] if start else note_states.mask
            bias = self.bias(mask, reading.shape[1], note_states.rows_per_group)
        weights = self.weights(queries, note_states.keys[site], bias)
        context = self.context(weights, note_states.values[site], reading.shape[1])
        scale = note_states.gate_scale
        gate = self.gate(queries) * (scale.view(-1, 1, 1) if torch.is_tensor(scale) else scale)
        if note_states.collected is not None:
            note_states.collected.append((gate, weights))
        update = self.o_proj((context * gate.unsqueeze(-1)).flatten(2))
        rms = torch.linalg.vector_norm(reading.detach(), dim=-1, keepdim=True, dtype=torch.float32)
        read = reading + (update * (rms * reading.shape[-1] ** -0.5)).to(reading.dtype)
        return torch.cat([hidden_RTD[:, :start], read], dim=1) if start else read


class StreamAdapter(nn.Module):
    """
    Bottleneck adapter chosen by stream, zero at the start: `x + up_s(dropout(activation(down_s(norm(x)))))`.

    Args:
        num_streams (`int`), width (`int`), bottleneck (`int`): S, D and the inner width.
        activation (`str`): Its name in transformers.
        dropout (`float`): Share of inner values dropped in training.
    """

    def __init__(self, num_streams: int, width: int, bottleneck: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = ACT2FN[activation], nn.Dropout(dropout)
        self.norm = RMSNorm(width)
        self.down = nn.Parameter(torch.empty(num_streams, width, bottleneck))
        self.down_bias = nn.Parameter(torch.zeros(num_streams, bottleneck))
        self.up = nn.Parameter(torch.zeros(num_streams, bottleneck, width))
        nn.init.normal_(self.down, std=width**-0.5)

    def forward(self, hidden_RTD: torch.Tensor, stream_RT: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_RTD (`torch.Tensor` of shape `[R, T, D]`): States.
            stream_RT (`torch.LongTensor` of shape `[R, T]`): Stream of each token, -1 for none. A row
                holds one stream; streams beyond S count modulo S.
        """
        index = stream_RT.amax(dim=1).clamp(min=0) % self.down.shape[0]
        bias, down, up = (part.index_select(0, index) for part in (self.down_bias, self.down, self.up))
        inner = torch.baddbmm(bias[:, None], self.norm(hidden_RTD), down)
        update = torch.bmm(self.dropout(self.activation(inner)), up)
        return hidden_RTD + update.masked_fill((stream_RT < 0)[..., None], 0.0).to(hidden_RTD.dtype)
