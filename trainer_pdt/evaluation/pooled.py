"""Figures over several trainings: estimates are means over seeds, intervals resample seeds and documents.

Every seed is evaluated on the same documents, so both are drawn: seeds with replacement, documents with replacement,
the same documents for every seed and measure. With three seeds the draw of seeds says little about a fourth one; the
figures of the single seeds stand beside it.

Letters: S seeds, D documents, B draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration import Judgements, auroc, average_precision, expected_calibration_error

DRAWS = 1000
DRAWS_AT_ONCE = 100
"""Draws whose weights of every judgement exist at the same time."""

AREA_OF: dict[str, Callable[[Judgements, Tensor], Tensor]] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "expected_calibration_error": expected_calibration_error,
}
"""What is computed from the decisions of a head."""

TRUNK_MODES = ("independent", "sequential", "full_text", "note_text")
"""Modes of writing without adapters, as they begin a part of a path below its section."""

SETTINGS = ("speed/threads",)
"""Whole numbers that count nothing: kept where the seeds agree, where counts are summed."""

AREAS: dict[str, tuple[str, str]] = {
    **{f"coverage/{name}": ("coverage/decisions/own_text", name) for name in AREA_OF},
    **{f"agreement/{name}": ("agreement/decisions/planted", name) for name in AREA_OF},
    **{f"agreement/{name}_generated": ("agreement/decisions/generated", name) for name in AREA_OF},
    **{
        f"agreement/{place}{suffix}": (f"agreement/decisions/{name}{suffix}", "auroc")
        for suffix in ("", "_generated")
        for place, name in (
            ("auroc_all_blocks", "all_blocks"),
            ("zeroed_notes", "zeroed_notes"),
            ("controls/logp_gap", "logp_gap"),
            ("controls/reference_present", "reference_present"),
        )
    },
}
"""Where a figure stands in `evaluation.json`, the decisions it is made of, and how."""


@dataclass(frozen=True)
class Estimate:
    """
    A figure over seeds.

    Args:
        seeds_S (`Tensor`): By seed.
        draws_B (`Tensor`): Of the bootstrap.
        n (`int`, *optional*): What was counted, over all seeds; text that is the same for all of them counts once.
    """

    seeds_S: Tensor
    draws_B: Tensor
    n: int | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.seeds_S.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval; draws in which nothing was counted are left out."""
        drawn = self.draws_B[~self.draws_B.isnan()]
        if not len(drawn):
            return float("nan"), float("nan")
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """`{mean, low, high, n}`."""
        low, high = self.interval
        return {"mean": self.mean, "low": low, "high": high, "n": self.n}

    def __sub__(self, other: "Estimate | float") -> "Estimate":
        return self._with(other, torch.sub)

    def __truediv__(self, other: "Estimate | float") -> "Estimate":
        return self._with(other, torch.div)

    def __rsub__(self, other: float) -> "Estimate":
        return Estimate(other - self.seeds_S, other - self.draws_B, self.n)

    def _with(self, other: "Estimate | float", combine: Callable) -> "Estimate":
        if isinstance(other, Estimate):
            return Estimate(combine(self.seeds_S, other.seeds_S), combine(self.draws_B, other.draws_B), self.n)
        value = torch.tensor(other, dtype=torch.float64)
        return Estimate(combine(self.seeds_S, value), combine(self.draws_B, value), self.n)


class Pooled:
    """
    Evaluations of one recipe's seeds, read as one. A measure that one seed lacks, because what it wrote gave nothing
    to measure, is left out.

    Args:
        reports (`Sequence[Mapping]`): Contents of `evaluation.json`, by seed.
        documents (`Sequence[Mapping]`): Contents of `documents.json`, in the same order.
        draws (`int`, *optional*, defaults to 1000): Of the bootstrap.

    Raises:
        ValueError: When there is none, or the seeds do not have the same sections and documents.
    """

    def __init__(
        self, reports: Sequence[Mapping[str, Any]], documents: Sequence[Mapping[str, Any]], draws: int = DRAWS
    ) -> None:
        if not reports or len(reports) != len(documents):
            raise ValueError(f"{len(reports)} reports and {len(documents)} documents, allowed: one of each per seed.")
        if len({frozenset(path.split("/")[0] for path in found) for found in documents}) > 1:
            raise ValueError("documents: the seeds were not measured alike, allowed: evaluations with equal options.")
        shared = set(documents[0]).intersection(*documents)
        self.documents = [{path: found[path] for path in documents[0] if path in shared} for found in documents]
        self.reports, self.draws = reports, draws
        generator = torch.Generator().manual_seed(0)
        drawn_BS = torch.randint(len(reports), (draws, len(reports)), generator=generator)
        self.weights_BS = torch.nn.functional.one_hot(drawn_BS, len(reports)).sum(1).double() / len(reports)
        self._times: dict[int, Tensor] = {}

    def times(self, documents: int) -> Tensor:
        """How often each draw takes each document, `[1 + B, D]`; in the first row once each."""
        if documents not in self._times:
            generator = torch.Generator().manual_seed(documents)
            drawn_BD = torch.randint(documents, (self.draws, documents), generator=generator)
            times_BD = torch.zeros(self.draws, documents, dtype=torch.float64)
            times_BD.scatter_add_(1, drawn_BD, torch.ones(drawn_BD.shape, dtype=torch.float64))
            self._times[documents] = torch.cat([torch.ones(1, documents, dtype=torch.float64), times_BD])
        return self._times[documents]

    def rate(self, path: str) -> Estimate:
        """A share that was counted by document, by its path in the evaluation."""
        lengths = {len(found[path]) for found in self.documents}
        if len(lengths) != 1:
            raise ValueError(f"{path}: the seeds have {sorted(lengths)} documents, allowed: the same ones.")
        return self.rate_of(path, [found[path] for found in self.documents])

    def rate_of(self, path: str, pairs: Sequence[Sequence[tuple[float, float]]]) -> Estimate:
        """
        A share from what was found and what was counted, by document, for each seed. What the trunk alone wrote, which
        the path says, the same for every seed, counts once.
        """
        columns, counts = [], []
        for found in pairs:
            pairs_D2 = torch.tensor(found, dtype=torch.float64)
            sums = self.times(len(pairs_D2)) @ pairs_D2
            columns.append(sums[:, 0] / sums[:, 1])
            counts.append(int(pairs_D2[:, 1].sum()))
        is_one_text = any(part.startswith(TRUNK_MODES) for part in path.split("/")[1:])
        is_one_text &= all(found == pairs[0] for found in pairs[1:])
        return self._over_seeds(columns, counts[0] if is_one_text else sum(counts))

    def counted(self, path: str) -> Estimate:
        """How much was counted for a share, by seed."""
        counts_S = torch.tensor([sum(trials for _, trials in found[path]) for found in self.documents]).double()
        return Estimate(counts_S, torch.full((self.draws,), float("nan")), int(counts_S.sum()))

    def area(self, path: str, name: str, finds: bool) -> Estimate:
        """A measure of [`AREA_OF`] of the decisions at a path."""
        columns, count = [], 0
        for found in self.documents:
            judgements = Judgements.of([[tuple(entry) for entry in rows] for rows in found[path]], finds)
            some_of = self.times(len(found[path])).split(DRAWS_AT_ONCE)
            columns.append(torch.cat([AREA_OF[name](judgements, part[:, judgements.document_N]) for part in some_of]))
            count += judgements.truth_N.numel()
        return self._over_seeds(columns, count)

    def number(self, path: str) -> Estimate:
        """A figure without documents of its own; only seeds are drawn."""
        values = []
        for report in self.reports:
            value: Any = report
            for key in path.split("/"):
                value = value[key]
            values.append(float(value["mean"] if isinstance(value, Mapping) else value))
        seeds_S = torch.tensor(values, dtype=torch.float64)
        return Estimate(seeds_S, self.weights_BS @ seeds_S)

    def get(self, path: str) -> Estimate:
        """
        The figure at a path of `evaluation.json`, with as much resampled as there is.

        Raises:
            KeyError: When a seed has none there.
        """
        if path in self.documents[0]:
            return self.rate(path)
        if path in AREAS and AREAS[path][0] in self.documents[0]:
            place, name = AREAS[path]
            return self.area(place, name, finds=place.startswith("coverage"))
        return self.number(path)

    def report(self) -> dict[str, Any]:
        """Content of an `evaluation.json` over all seeds: shares and areas pooled, means of other numbers."""
        return self._merge(self.reports, "")

    def _over_seeds(self, columns: Sequence[Tensor], n: int) -> Estimate:
        values_SB, weights_SB = torch.stack(list(columns)), self.weights_BS.T
        drawn_SB = torch.where(weights_SB > 0, weights_SB * values_SB[:, 1:], 0.0)
        return Estimate(values_SB[:, 0], drawn_SB.sum(0), n)

    def _merge(self, parts: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key, first in parts[0].items():
            place, values = f"{path}/{key}" if path else key, [part.get(key) for part in parts]
            is_area = place in AREAS and AREAS[place][0] in self.documents[0]
            if any(value is None for value in values):
                continue
            if place in self.documents[0] or is_area:
                merged[key] = self.get(place).as_dict()
            elif isinstance(first, Mapping):
                merged[key] = self._merge(values, place)
            elif isinstance(first, bool | str) or place in SETTINGS:
                merged |= {key: first} if all(value == first for value in values) else {}
            elif isinstance(first, int):
                merged[key] = sum(values)
            elif isinstance(first, float):
                merged[key] = sum(values) / len(values)
        return merged
