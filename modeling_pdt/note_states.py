"""NoteStates: the visible window as the instrumented layers use it, a forward argument of the upper trunk."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch


@dataclass(frozen=True)
class NoteStates:
    """
    Keys, values and mask of a window of notes, projected once per round for every SNC site.

    Letters: R rows, G groups of `rows_per_group` adjacent rows that share one window, H heads, W notes, T tokens.

    Args:
        keys, values (`tuple[torch.Tensor]`): Per site, of shape `[G, H, W + 1, head_dim]`; the sink's place is last.
        mask (`torch.BoolTensor` of shape `[R, W]` or `[R, T, W]`): What each row (and token) may read.
        rows_per_group (`int`, *optional*, defaults to 1): R / G.
        gate_scale (`float` or `torch.Tensor` of shape `[R]`, *optional*, defaults to 1.0): Multiplies the gate.
        biases (`tuple[torch.Tensor]`, *optional*): Per site, the mask as [`SharedNotesCrossAttention.bias`] makes it,
            for a window that many forwards read. Empty: made in every forward.
        collected (`list`, *optional*): Receives, of every site in order, its gate with the scale, broadcastable to
            `[R, T, H]`, and its attention `[G, H, R / G * T, W + 1]`. `None`: nothing is kept.
        first_reader (`int`, *optional*, defaults to 0): No row reads anything, nor has a stream, at the tokens before
            this one, as in a prompt; with a mask `[R, T, W]` only.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    rows_per_group: int = 1
    gate_scale: float | torch.Tensor = 1.0
    biases: tuple[torch.Tensor, ...] = ()
    collected: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    first_reader: int = 0

    def after(self, columns: int) -> "NoteStates":
        """The states for rows without their first `columns`, at most `first_reader`, tokens."""
        if columns > self.first_reader or self.biases:
            raise ValueError(f"columns must be <= first_reader={self.first_reader}, without biases, got {columns}.")
        return replace(self, mask=self.mask[:, columns:], first_reader=self.first_reader - columns)

    def select_rows(self, rows: torch.Tensor) -> "NoteStates":
        """The states of `rows` only; requires one window per row."""
        if self.rows_per_group != 1:
            raise ValueError(f"rows_per_group must be 1 to select rows, got {self.rows_per_group}.")
        scale = self.gate_scale[rows] if torch.is_tensor(self.gate_scale) else self.gate_scale
        return replace(
            self,
            keys=tuple(key[rows] for key in self.keys),
            values=tuple(value[rows] for value in self.values),
            mask=self.mask[rows],
            biases=tuple(bias[rows] for bias in self.biases),
            gate_scale=scale,
        )


def equal_runs(windows_GWN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Adjacent windows that are equal, as siblings' are that write the same round: they need to be projected once.

    Args:
        windows_GWN (`torch.Tensor` of shape `[G, W, N]`): Notes of every window, hidden ones included.

    Returns:
        `(first, run)`: the windows that differ from the one before them, and, for each of the G windows, which of
        these it equals; `torch.LongTensor`s of shapes `[runs]` and `[G]`. `None` where no two are known to be equal.
    """
    if windows_GWN.is_meta:
        return None
    # One transfer for both: how many runs there are is known to the host only so.
    differs = (windows_GWN[1:] != windows_GWN[:-1]).flatten(1).any(dim=1).tolist()
    if all(differs):
        return None
    first = [0, *(index for index, flag in enumerate(differs, start=1) if flag)]
    run = list(accumulate(differs, initial=0))
    return tuple(torch.tensor(part, device=windows_GWN.device) for part in (first, run))
