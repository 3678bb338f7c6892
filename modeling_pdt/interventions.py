"""Interventions: controlled changes to what the streams read and how they are judged, for evaluation and ablation.

Every intervention edits the request for a window before the bus answers it, the window, the SNC gate's scale, or the
agreement that decides about a block.
Letters: M rows of a request, W notes of a window, N note width, P plan places (the first columns of a window).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .sampling import keyed_uniform


@dataclass(frozen=True)
class WindowRequest:
    """
    Which notes a set of rows wants to read.

    Args:
        rows (`torch.LongTensor` of shape `[M]`): Readers; the plan is always their own prompt's.
        sources (`torch.LongTensor` of shape `[M]`): Rows in whose place the notes are read.
        read_round, lag (`torch.LongTensor` of shape `[M]`): Round that each row writes, and its lag.
        own_notes (`bool` or `torch.BoolTensor` of shape `[M]`): Read the row's own notes in place of its siblings'.
    """

    rows: torch.Tensor
    sources: torch.Tensor
    read_round: torch.Tensor
    lag: torch.Tensor
    own_notes: bool | torch.Tensor = False


def stream_numbers(word: str) -> list[int]:
    """Numbers from a word such as `"1,0"`."""
    return [int(part) for part in word.split(",")]


class Intervention:
    """
    Base class; by default changes nothing.

    `streams` holds the streams whose reading is changed, `None` for all; `argument` makes the first parameter of the
    class from a word on the command line, `None` where there is none.
    """

    name = "none"
    streams: tuple[int, ...] | None = None
    argument: Callable[[str], Any] | None = None

    def on(self, *streams: int) -> "Intervention":
        """The same intervention for some of the streams: `Ablate().on(0, 2)`."""
        if not streams or not all(type(stream) is int and stream >= 0 for stream in streams):
            raise ValueError(f"{type(self).__name__}.on needs one stream >= 0 or more, got {streams}.")
        limited = copy.copy(self)
        limited.streams = tuple(streams)
        return limited

    def to_dict(self) -> dict[str, Any]:
        """Name, arguments and streams; [`intervention_from_dict`] reads it."""
        arguments = {name: value for name, value in vars(self).items() if name != "streams"}
        return {"name": self.name, "arguments": arguments, "streams": self.streams}

    def check(self, num_prompts: int) -> None:
        """Raises `ValueError` when the intervention cannot do anything in a call with so many prompts."""

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Edits the request."""
        return request

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Edits notes `[M, W, N]` and mask `[M, W]`; the first `plan_places` columns are the plan."""
        return notes, mask

    def gate_scale(self, scale: float | torch.Tensor) -> float | torch.Tensor:
        """Edits the gate's scale: one number for all rows, or `[M]`."""
        return scale

    def agreement(
        self, agreement_M: torch.Tensor, rows_M: torch.Tensor, round_M: torch.Tensor, attempt_M: torch.Tensor
    ) -> torch.Tensor:
        """Edits the agreement `[M]` of rows that completed a round at an attempt."""
        return agreement_M


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

    def gate_scale(self, scale: float | torch.Tensor) -> float | torch.Tensor:
        """Zero."""
        return 0.0


class Swap(Intervention):
    """Every prompt reads the notes of another prompt of the batch: the next one, or the one given."""

    name = "swap"
    argument = staticmethod(stream_numbers)

    def __init__(self, donors: list[int] | None = None) -> None:
        self.donors = donors

    def check(self, num_prompts: int) -> None:
        """Needs a donor for every prompt."""
        if self.donors is None and num_prompts < 2:
            raise ValueError(f"Swap needs a batch of >= 2 prompts to read each other's notes, got {num_prompts}.")
        donors = self.donors if self.donors is not None else range(num_prompts)
        if len(donors) != num_prompts or not all(0 <= donor < num_prompts for donor in donors):
            raise ValueError(f"Swap.donors must name one prompt in [0, {num_prompts - 1}] per prompt, got {donors}.")

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Reads in the donor's place."""
        donors = self.donors if self.donors is not None else [(b + 1) % num_prompts for b in range(num_prompts)]
        donor_B = torch.tensor(donors, device=request.rows.device)
        prompt, stream = request.sources // num_streams, request.sources % num_streams
        return replace(request, sources=donor_B[prompt] * num_streams + stream)


class Stale(Intervention):
    """Notes arrive `rounds` rounds later than the lag."""

    name = "stale"
    argument = int

    def __init__(self, rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"Stale.rounds must be >= 1, got {rounds}.")
        self.rounds = rounds

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Adds to the lag."""
        return replace(request, lag=request.lag + self.rounds)


class NormScramble(Intervention):
    """
    Every note keeps its norm and loses its direction: channels shuffled, signs flipped, the same way in every window.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the shuffle.
    """

    name = "norm_scramble"
    argument = int

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Shuffles and flips the channels of every note."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(notes.shape[-1], generator=generator, device="cpu").to(notes.device)
        sign = torch.randint(0, 2, (notes.shape[-1],), generator=generator, device="cpu").to(notes) * 2 - 1
        scrambled = notes[..., order] * sign
        return torch.cat([notes[:, :plan_places], scrambled[:, plan_places:]], dim=1), mask


class Freeze(Intervention):
    """From round `round` on, the window stays as it was when the row wrote that round."""

    name = "freeze"
    argument = int

    def __init__(self, round: int = 1) -> None:
        if round < 0:
            raise ValueError(f"Freeze.round must be >= 0, got {round}.")
        self.round = round

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Reads as in the round where it froze; a block that waits learns nothing new."""
        lag = torch.where(request.read_round < self.round, request.lag, request.lag.clamp(min=0))
        return replace(request, read_round=request.read_round.clamp(max=self.round), lag=lag)


class Shuffle(Intervention):
    """
    Notes of a window exchange their channels, every channel by a permutation of its own: what the notes hold together
    stays, which values belong to one note is lost. (SNC does not see an order of whole notes.)

    Args:
        seed (`int`, *optional*, defaults to 0): Of the permutations.
    """

    name = "shuffle"
    argument = int

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def window(self, notes: torch.Tensor, mask: torch.Tensor, plan_places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Shuffles the visible notes; the plan stays."""
        seen = mask.clone()
        seen[:, :plan_places] = False
        generator = torch.Generator("cpu").manual_seed(self.seed)
        keys = torch.rand(notes.shape[1:], generator=generator, device="cpu").to(notes.device)
        # The visible notes come first, in their own order: places that are empty draw nothing.
        places = (~seen).long().argsort(dim=1, stable=True)[..., None].expand_as(notes)
        hidden = torch.arange(notes.shape[1], device=notes.device) >= seen.sum(dim=1, keepdim=True)
        drawn = (keys + hidden[..., None] * 2.0).argsort(dim=1, stable=True)
        shuffled = torch.empty_like(notes).scatter(1, places, notes.gather(1, places).gather(1, drawn))
        return torch.where(seen[..., None], shuffled, notes), mask


class Tag(Intervention):
    """Changes nothing; its label is in the trace, to tell runs apart."""

    name = "tag"
    argument = str

    def __init__(self, label: str = "") -> None:
        self.label = label


class SelfOnly(Intervention):
    """Every stream reads its own notes in place of its siblings'."""

    name = "self_only"

    def request(self, request: WindowRequest, num_streams: int, num_prompts: int) -> WindowRequest:
        """Asks for own notes."""
        return replace(request, own_notes=True)


class RandomGate(Intervention):
    """A share `rate` of blocks is withdrawn whatever it says: what rewriting alone is worth."""

    name = "random_gate"
    argument = float

    def __init__(self, rate: float = 0.05, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"RandomGate.rate must be in [0, 1], got {rate}.")
        self.rate, self.seed = rate, seed

    def agreement(
        self, agreement_M: torch.Tensor, rows_M: torch.Tensor, round_M: torch.Tensor, attempt_M: torch.Tensor
    ) -> torch.Tensor:
        """0 for the chosen blocks, 1 for all others."""
        uniform = keyed_uniform(torch.full_like(rows_M, self.seed), rows_M, round_M, attempt_M)
        return (uniform >= self.rate).to(agreement_M)


INTERVENTIONS = {
    kind.name: kind
    for kind in (
        *(Ablate, ZeroNotes, GateZero, Swap, Stale, Freeze),
        *(Shuffle, NormScramble, SelfOnly, RandomGate, Tag),
    )
}


def intervention_from_dict(values: dict[str, Any]) -> Intervention:
    """The intervention that [`Intervention.to_dict`] described."""
    made = INTERVENTIONS[values["name"]](**values["arguments"])
    return made if values["streams"] is None else made.on(*values["streams"])


def make_intervention(word: str) -> Intervention:
    """
    An intervention from `name[:argument][@streams]`: `"stale:2"`, `"ablate@0,2"`, `"freeze:1@1"`.

    Raises:
        ValueError: For an unknown name, or an argument or streams that do not fit.
    """
    rest, at, streams = word.partition("@")
    name, colon, value = rest.partition(":")
    if name not in INTERVENTIONS:
        raise ValueError(f"interventions must be of {sorted(INTERVENTIONS)}, got {[name]}.")
    kind = INTERVENTIONS[name]
    if colon and kind.argument is None:
        raise ValueError(f"intervention {word!r}: {name} takes no argument.")
    try:
        made = kind(kind.argument(value)) if colon else kind()
        return made.on(*stream_numbers(streams)) if at else made
    except ValueError as error:
        raise ValueError(f"intervention {word!r} must be name[:argument][@streams]: {error}") from error


def make_interventions(words: list[str]) -> list[Intervention]:
    """Interventions from words; see [`make_intervention`]."""
    return [make_intervention(word) for word in words]


def check_interventions(
    interventions: list | None, num_prompts: int, num_streams: int | None = None
) -> tuple[Intervention, ...]:
    """
    The interventions of a call.

    Raises:
        ValueError: For an object that is none, or one that cannot do anything in this call.
    """
    for intervention in interventions or ():
        if not callable(getattr(intervention, "gate_scale", None)) or isinstance(intervention, type):
            raise ValueError(f"interventions must hold Intervention objects, got {intervention!r}.")
        intervention.check(num_prompts)
        if num_streams is not None and max(intervention.streams or (0,)) >= num_streams:
            raise ValueError(
                f"{type(intervention).__name__}.streams must be in [0, {num_streams - 1}], got {intervention.streams}."
            )
    return tuple(interventions or ())
