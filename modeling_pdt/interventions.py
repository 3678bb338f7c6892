"""Interventions: controlled changes to what the streams read, for evaluation and ablation.

Every intervention edits the request for a window before the bus answers it, the window itself, or the gate's scale.
Letters: M rows of a request, W notes of a window, N note width, P plan places (the first columns of a window).
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class WindowRequest:
    """
    Which notes a set of rows wants to read.

    Args:
        rows (`torch.LongTensor` of shape `[M]`): Readers; the plan is always their own prompt's.
        sources (`torch.LongTensor` of shape `[M]`): Rows in whose place the notes are read.
        read_round, lag (`torch.LongTensor` of shape `[M]`): Round that each row writes, and its lag.
        own_notes (`bool`): Read the row's own notes in place of its siblings'.
    """

    rows: torch.Tensor
    sources: torch.Tensor
    read_round: torch.Tensor
    lag: torch.Tensor
    own_notes: bool = False


class Intervention:
    """Base class; by default changes nothing."""

    name = "none"

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Edits the request."""
        return request

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Edits notes `[M, W, N]` and mask `[M, W]`; the first `plan_places` columns are the plan."""
        return notes, mask

    def gate_scale(self, scale: float) -> float:
        """Edits the gate's scale."""
        return scale


class Ablate(Intervention):
    """The bus is off: no note is visible. The plan stays unless `plan=True`."""

    name = "ablate"

    def __init__(self, plan: bool = False) -> None:
        self.plan = plan

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hides the columns."""
        mask = mask.clone()
        mask[:, 0 if self.plan else plan_places :] = False
        return notes, mask


class ZeroNotes(Intervention):
    """Notes are visible but all zeros."""

    name = "zero_notes"

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeroes the notes."""
        notes = notes.clone()
        notes[:, plan_places:] = 0
        return notes, mask


class GateZero(Intervention):
    """SNC is silent."""

    name = "gate_zero"

    def gate_scale(self, scale: float) -> float:
        """Zero."""
        return 0.0


class Swap(Intervention):
    """Every prompt reads the notes of another prompt of the batch: the next one, or the one given."""

    name = "swap"

    def __init__(self, donors: list[int] | None = None) -> None:
        self.donors = donors

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Reads in the donor's place."""
        donors = self.donors if self.donors is not None else [(b + 1) % num_prompts for b in range(num_prompts)]
        if len(donors) != num_prompts or not all(0 <= donor < num_prompts for donor in donors):
            raise ValueError(f"Swap.donors must name one prompt in [0, {num_prompts - 1}] per prompt, got {donors}.")
        donor_B = torch.tensor(donors, device=request.rows.device)
        prompt, stream = request.sources // num_streams, request.sources % num_streams
        return replace(request, sources=donor_B[prompt] * num_streams + stream)


class Stale(Intervention):
    """Notes arrive `rounds` rounds later than the lag."""

    name = "stale"

    def __init__(self, rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"Stale.rounds must be >= 1, got {rounds}.")
        self.rounds = rounds

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Adds to the lag."""
        return replace(request, lag=request.lag + self.rounds)


class NormScramble(Intervention):
    """Every note keeps its norm and loses its direction, the same in every window."""

    name = "norm_scramble"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces the notes by random vectors of the same norm."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(notes.shape[1:], generator=generator).to(notes).expand_as(notes)
        noise = noise * notes.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return torch.cat([notes[:, :plan_places], noise[:, plan_places:]], dim=1), mask


class SelfOnly(Intervention):
    """Every stream reads its own notes in place of its siblings'."""

    name = "self_only"

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Asks for own notes."""
        return replace(request, own_notes=True)
