"""Shared-notes cross-attention and the stream adapter: the equations that condition the upper trunk.

Letters: R rows, T tokens, D trunk width, N note width, W notes of a window, H heads, S streams, G groups of rows.
"""

import torch
from torch import nn

from .note_states import NoteStates


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned channel scale, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of `x` to RMS 1 and scales its channels."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


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
        init (`str`): `"trunk_space"` or `"zero"`.
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
            init (`str`): `"trunk_space"`, or `"zero"` for an output projection of zeros.
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
        """Keys and values `[G, H, W, head_dim]` of notes `[G, W, N]`."""
        notes = notes_GWN.to(self.k_proj.weight.dtype)
        shape = (*notes.shape[:2], self.num_heads, self.head_dim)
        return self.k_proj(notes).view(shape).transpose(1, 2), self.v_proj(notes).view(shape).transpose(1, 2)

    def attend(
        self, queries_RTD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Per-head context of already normalised queries.

        Args:
            queries_RTD (`torch.Tensor` of shape `[R, T, D]`): Normalised trunk states.
            keys, values (`torch.Tensor` of shape `[G, H, W, head_dim]`): From [`project`]; R is a multiple of G.
            mask (`torch.BoolTensor` of shape `[R, W]` or `[R, T, W]`): Visible notes.

        Returns:
            `torch.Tensor` of shape `[R, T, H, head_dim]`; zeros where nothing is visible.
        """
        rows, tokens = queries_RTD.shape[:2]
        groups = keys.shape[0]
        per_group = rows // groups
        queries = self.q_proj(queries_RTD).view(groups, per_group * tokens, self.num_heads, self.head_dim)
        scores = queries.transpose(1, 2) @ keys.transpose(2, 3) * self.head_dim**-0.5
        mask = mask[:, None, :].expand(rows, tokens, -1) if mask.dim() == 2 else mask
        scores = scores.masked_fill(~mask.reshape(groups, 1, per_group * tokens, -1), float("-inf"))
        sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        context = (weights @ values).transpose(1, 2)
        return context.reshape(rows, tokens, self.num_heads, self.head_dim)

    def forward(self, hidden_RTD: torch.Tensor, note_states: NoteStates, site: int) -> torch.Tensor:
        """The state with what it read from the notes added, in the state's dtype."""
        queries = self.norm(hidden_RTD)
        context = self.attend(queries, note_states.keys[site], note_states.values[site], note_states.mask)
        gate = self.gate(queries)
        scale = note_states.gate_scale
        scale = scale.view(-1, 1, 1) if torch.is_tensor(scale) else scale
        context = context * (gate * scale).unsqueeze(-1)
        rms = hidden_RTD.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        update = self.o_proj(context.flatten(2)) * rms
        return hidden_RTD + update.to(hidden_RTD.dtype)


class StreamAdapter(nn.Module):
    """
    Bottleneck adapter chosen by stream, zero at the start: `x + up_s(gelu(down_s(norm(x))))`.

    Args:
        num_streams (`int`), width (`int`), bottleneck (`int`): S, D and the inner width.
    """

    def __init__(self, num_streams: int, width: int, bottleneck: int) -> None:
        super().__init__()
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
        stream_R = stream_RT.amax(dim=1)
        index = stream_R.clamp(min=0) % self.down.shape[0]
        inner = torch.baddbmm(self.down_bias[index][:, None], self.norm(hidden_RTD), self.down[index])
        update = torch.bmm(torch.nn.functional.gelu(inner), self.up[index])
        return hidden_RTD + update.masked_fill((stream_RT < 0)[..., None], 0.0).to(hidden_RTD.dtype)
