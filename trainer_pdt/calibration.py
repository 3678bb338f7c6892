"""Thresholds of the coverage and agreement heads by a stated rule, with curves, calibration error and intervals;
and what makes agreements shares of blocks that may stand.

Letters: N judgements, D documents, K thresholds, B bootstrap samples.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_pdt import PDTForParallelDecoding, PDTGenerationConfig

from .evaluation.scoring import best_f1_threshold
from .telemetry import read_thresholds, write_thresholds

THRESHOLDS = tuple(step / 50 for step in range(1, 50))
"""Thresholds of the curves."""

ALLOWED_FALSE_ALARMS = 0.03
"""Share of sound blocks that may be written again for nothing: with about ten sound blocks to a contradictory
one, most rewritings that a higher share would add are for nothing."""

JUDGEABLE_FALSE_ALARMS = 0.035
"""The same share among the sound blocks that repeat a fact that can be judged, the population of agreement's bars: so
far below the .05 of the bar that the end of an interval on other documents can meet it."""

BINS = 10

LEAST_SLOPE = 0.001
"""Of a scaling: below it, the head tells nothing."""


@dataclass(frozen=True)
class Judgements:
    """
    What a head said and what was true, document by document.

    Args:
        probability_N (`Tensor`): Of the event: a block may stand, an item is covered.
        truth_N (`BoolTensor`): Whether the event is true.
        document_N (`LongTensor`): Document of each judgement, from 0; documents are what the bootstrap resamples.
        finds (`bool`): The class that a threshold looks for: `True` = the event, flagged at or above the threshold
            (covered items); `False` = its opposite, flagged below (contradictions).
    """

    probability_N: Tensor
    truth_N: Tensor
    document_N: Tensor
    finds: bool

    @classmethod
    def of(cls, documents: Sequence[Sequence[tuple[float, bool]]], finds: bool) -> "Judgements":
        """Judgements of documents, each a list of `(probability, truth)`."""
        flat = [(p, truth, index) for index, rows in enumerate(documents) for p, truth in rows]
        probability, truth, document = zip(*flat, strict=True) if flat else ((), (), ())
        return cls(
            torch.tensor(probability, dtype=torch.float64),
            torch.tensor(truth, dtype=torch.bool),
            torch.tensor(document, dtype=torch.long),
            finds,
        )

    @classmethod
    def of_columns(
        cls,
        probabilities: Sequence[float],
        truths: Sequence[bool],
        documents: Sequence[Hashable] | None = None,
        *,
        finds: bool,
    ) -> "Judgements":
        """Judgements in columns of equal length; each is a document of its own where `documents` does not say."""
        rows: dict[Hashable, list[tuple[float, bool]]] = {}
        names = range(len(probabilities)) if documents is None else documents
        if not len(probabilities) == len(truths) == len(names):
            raise ValueError(
                f"there are {len(probabilities)} probabilities, {len(truths)} truths and {len(names)} documents, "
                "allowed: as many of each."
            )
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError("a probability is not a number from 0 to 1.")
        for name, probability, truth in zip(names, probabilities, truths, strict=True):
            rows.setdefault(name, []).append((probability, truth))
        return cls.of(list(rows.values()), finds)

    def weights(self, samples: int, seed: int = 0) -> Tensor:
        """Weights `[1 + B, N]`: all 1 in the first row, then how often each bootstrap sample drew the document."""
        once = torch.ones(1, self.document_N.numel(), dtype=torch.float64)
        if not self.document_N.numel() or not samples:
            return once
        documents, place_N = self.document_N.unique(return_inverse=True)
        generator = torch.Generator().manual_seed(seed)
        drawn_BD = torch.randint(documents.numel(), (samples, documents.numel()), generator=generator)
        times_BD = torch.zeros(samples, documents.numel(), dtype=torch.float64)
        times_BD.scatter_add_(1, drawn_BD, torch.ones_like(times_BD))
        return torch.cat([once, times_BD[:, place_N]])

    def flagged(self, thresholds_K: Tensor) -> Tensor:
        """What each threshold flags, `[N, K]`."""
        at_or_above_NK = self.probability_N[:, None] >= thresholds_K
        return at_or_above_NK if self.finds else ~at_or_above_NK

    @property
    def wanted_N(self) -> Tensor:
        """What should be flagged."""
        return self.truth_N == self.finds


def confusion(judgements: Judgements, thresholds: Sequence[float], weights_BN: Tensor) -> dict[str, Tensor]:
    """`tp`, `fp`, `fn`, `tn` `[B, K]` of what the thresholds flag."""
    flagged_NK = judgements.flagged(torch.tensor(thresholds, dtype=torch.float64))
    wanted_N1 = judgements.wanted_N[:, None]
    kinds = {
        "tp": flagged_NK & wanted_N1,
        "fp": flagged_NK & ~wanted_N1,
        "fn": ~flagged_NK & wanted_N1,
        "tn": ~flagged_NK & ~wanted_N1,
    }
    return {name: weights_BN @ kind.double() for name, kind in kinds.items()}


def ratios(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Precision, recall, F1 and false positive rate; not a number where nothing is there to divide by."""
    tp, fp, fn, tn = (counts[name] for name in ("tp", "fp", "fn", "tn"))
    return {
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "false_positive_rate": fp / (fp + tn),
    }


def auroc(judgements: Judgements, weights_BN: Tensor) -> Tensor:
    """Area under the ROC `[B]`: chance that a true event has the higher probability, ties half."""
    true_BG, false_BG = _by_probability(judgements, judgements.truth_N, weights_BN)
    below_BG = false_BG.cumsum(dim=1) - false_BG
    return (true_BG * (below_BG + false_BG / 2)).sum(dim=1) / (true_BG.sum(dim=1) * false_BG.sum(dim=1))


def average_precision(judgements: Judgements, weights_BN: Tensor) -> Tensor:
    """Area `[B]` under the precision-recall curve of the wanted class, in steps from the surest flag down."""
    hit_BG, miss_BG = _by_probability(judgements, judgements.wanted_N, weights_BN)
    if judgements.finds:
        hit_BG, miss_BG = hit_BG.flip(1), miss_BG.flip(1)
    hits_BG = hit_BG.cumsum(dim=1)
    flagged_BG = (hits_BG + miss_BG.cumsum(dim=1)).clamp(min=1e-12)
    return (hit_BG * hits_BG / flagged_BG).sum(dim=1) / hit_BG.sum(dim=1)


def _by_probability(judgements: Judgements, chosen_N: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of chosen and other judgements per distinct probability, ascending."""
    values, place_N = judgements.probability_N.unique(return_inverse=True)
    blank = weights_BN.new_zeros(weights_BN.shape[0], values.numel())
    return (
        blank.index_add(1, place_N, weights_BN * chosen_N),
        blank.index_add(1, place_N, weights_BN * ~chosen_N),
    )


def _by_bin(judgements: Judgements, weights_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, summed probability and true events `[B, bins]` of equally wide bins of the probability."""
    place_N = (judgements.probability_N * BINS).long().clamp(0, BINS - 1)
    blank = weights_BN.new_zeros(weights_BN.shape[0], BINS)
    columns = (torch.ones_like(judgements.probability_N), judgements.probability_N, judgements.truth_N.double())
    weight, probability, truth = (blank.index_add(1, place_N, weights_BN * column_N) for column_N in columns)
    return weight, probability, truth


def expected_calibration_error(judgements: Judgements, weights_BN: Tensor) -> Tensor:
    """Mean `[B]` over judgements of |mean probability - share of true events| of their bin."""
    weight_BC, probability_BC, truth_BC = _by_bin(judgements, weights_BN)
    return (probability_BC - truth_BC).abs().sum(dim=1) / weight_BC.sum(dim=1)


def threshold_by_false_alarms(
    judgements: Judgements, weights_BN: Tensor, allowed: float = ALLOWED_FALSE_ALARMS
) -> Tensor:
    """
    The highest threshold `[B]` below which at most a share `allowed` of the sound blocks falls.

    Raises:
        ValueError: When no judgement is sound, or `allowed` is not in [0, 1).
    """
    if not 0 <= allowed < 1:
        raise ValueError(f"allowed must be in [0, 1), got {allowed}.")
    sound_N = judgements.truth_N
    if not bool(sound_N.any()):
        raise ValueError("no clean judgeable block to calibrate on; give more documents.")
    ranked, order = judgements.probability_N[sound_N].sort()
    mass_BN = weights_BN[:, sound_N][:, order].cumsum(dim=1)
    over_BN = mass_BN > allowed * mass_BN[:, -1:]
    threshold_B = torch.where(over_BN, ranked, float("inf")).amin(dim=1)
    return torch.where(threshold_B.isinf(), float("nan"), threshold_B.clamp(1e-4, 1 - 1e-4))


def threshold_by_f1(judgements: Judgements, weights_BN: Tensor) -> Tensor:
    """
    The threshold `[B]` of [`THRESHOLDS`] with the best F1, the lowest of equals; not a number in a sample without an
    item to find.

    Raises:
        ValueError: When no judgement is of the class to find.
    """
    if not bool(judgements.wanted_N.any()):
        raise ValueError("no item was ever covered; give more documents.")
    rates = ratios(confusion(judgements, THRESHOLDS, weights_BN))
    chosen = []
    for recall_K, precision_K in zip(rates["recall"].tolist(), rates["precision"].tolist(), strict=True):
        points = zip(recall_K, precision_K, THRESHOLDS, strict=True)
        curve = [point for point in points if not any(map(math.isnan, point))]
        chosen.append(best_f1_threshold(curve) if curve else math.nan)
    return torch.tensor(chosen, dtype=torch.float64)


RULES: dict[str, tuple[Callable[[Judgements, Tensor], Tensor], str]] = {
    "false_alarms": (
        threshold_by_false_alarms,
        f"the highest threshold that withdraws at most {ALLOWED_FALSE_ALARMS:.0%} of the sound blocks",
    ),
    "judgeable_false_alarms": (
        partial(threshold_by_false_alarms, allowed=JUDGEABLE_FALSE_ALARMS),
        f"the highest threshold that withdraws at most {JUDGEABLE_FALSE_ALARMS:.1%} of the sound judgeable blocks",
    ),
    "best_f1": (threshold_by_f1, "the threshold of 0.02, 0.04, ..., 0.98 with the best F1, the lowest of equals"),
}
"""Rules of calibration and what they say."""


def fit_scaling(judgements: Judgements) -> list[float] | None:
    """
    `[slope, intercept]` of logits under which the judgements are most likely.

    Platt scaling, with his targets that stay short of 0 and 1 (Platt 1999, Probabilistic Outputs for Support Vector
    Machines).

    Args:
        judgements ([`Judgements`]): Probabilities without any scaling.

    Returns:
        `list[float]`, or `None` where one class is missing or a higher probability does not speak for the event.
    """
    truth_N = judgements.truth_N.double()
    true, false = float(truth_N.sum()), float((1 - truth_N).sum())
    if not true or not false:
        return None
    target_N = torch.where(judgements.truth_N, (true + 1) / (true + 2), 1 / (false + 2))
    logit_N = torch.logit(judgements.probability_N, eps=1e-7)
    inputs_N2 = torch.stack([logit_N, torch.ones_like(logit_N)], dim=1)
    scaling_2 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaling_2], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(inputs_N2 @ scaling_2, target_N)
        value.backward()
        return value

    optimizer.step(loss)
    slope, intercept = scaling_2.tolist()
    return [slope, intercept] if slope >= LEAST_SLOPE else None


def scaled(judgements: Judgements, scaling: Sequence[float] | None) -> Judgements:
    """The judgements as they are under a scaling of [`fit_scaling`]."""
    if scaling is None:
        return judgements
    slope, intercept = scaling
    logit_N = torch.logit(judgements.probability_N, eps=1e-7)
    return replace(judgements, probability_N=(slope * logit_N + intercept).sigmoid())


def assess(judgements: Judgements, threshold: float, samples: int = 500, seed: int = 0) -> dict[str, Any]:
    """
    Quality of a head at a threshold and at all others.

    Args:
        judgements ([`Judgements`]): At least one.
        threshold (`float`): Where precision, recall and F1 are taken.
        samples (`int`, *optional*, defaults to 500): Bootstrap samples, drawn by document with `seed`.

    Returns:
        `dict[str, Any]`: `auroc`, `average_precision`, `expected_calibration_error`, `precision`, `recall`, `f1`,
        `false_positive_rate` as `{mean, low, high, n}` with 95 % intervals; `points` (threshold, confusion counts and
        ratios), `selected_point`, `reliability` (per bin: mean probability, share of true events, count), and the
        number of `judgements`, `wanted` ones and `documents`.
    """
    if not judgements.truth_N.numel():
        raise ValueError("judgements is empty, allowed: at least one; give more documents.")
    weights_BN = judgements.weights(samples, seed)
    areas = {
        "auroc": auroc(judgements, weights_BN),
        "average_precision": average_precision(judgements, weights_BN),
        "expected_calibration_error": expected_calibration_error(judgements, weights_BN),
    }
    at_threshold = {
        name: value[:, 0] for name, value in ratios(confusion(judgements, [threshold], weights_BN)).items()
    }
    points = _points(judgements, (threshold, *THRESHOLDS))
    bins = zip(*(column[0].tolist() for column in _by_bin(judgements, weights_BN[:1])), strict=True)
    return {
        **{name: interval(value, judgements) for name, value in (areas | at_threshold).items()},
        "selected_point": points[0],
        "points": points[1:],
        "reliability": [
            {"probability": probability / count, "share": true / count, "count": int(count)}
            for count, probability, true in bins
            if count
        ],
        "judgements": judgements.truth_N.numel(),
        "wanted": int(judgements.wanted_N.sum()),
        "documents": judgements.document_N.unique().numel(),
    }


def calibrate(judgements: Judgements, rule: str, samples: int = 500, seed: int = 0) -> dict[str, Any]:
    """[`assess`] at the threshold of a rule of [`RULES`], with `threshold` (and its interval) and `rule`."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}, allowed: {sorted(RULES)}.")
    choose, words = RULES[rule]
    threshold_B = choose(judgements, judgements.weights(samples, seed))
    threshold = float(threshold_B[0])
    return {
        "rule": words,
        "threshold": interval(threshold_B, judgements),
        **assess(judgements, threshold, samples, seed),
    }


def interval(values_B: Tensor, judgements: Judgements) -> dict[str, float | int | None]:
    """`{mean, low, high, n}`: the value of the whole set, and the 95 % interval of the samples that have one."""
    mean, drawn = float(values_B[0]), values_B[1:][~values_B[1:].isnan()]
    low, high = (
        drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist() if len(drawn) else (None, None)
    )
    return {
        "mean": None if math.isnan(mean) else mean,
        "low": low,
        "high": high,
        "n": judgements.truth_N.numel(),
    }


def _points(judgements: Judgements, thresholds: Sequence[float]) -> list[dict[str, float | int | None]]:
    counts = confusion(judgements, thresholds, judgements.weights(0))
    shares = {name: value[0].tolist() for name, value in ratios(counts).items()}
    whole = {name: value[0].long().tolist() for name, value in counts.items()}
    return [
        {
            "threshold": threshold,
            **{name: None if math.isnan(value[index]) else value[index] for name, value in shares.items()},
            **{name: value[index] for name, value in whole.items()},
        }
        for index, threshold in enumerate(thresholds)
    ]


def save_calibration(model: PDTForParallelDecoding, calibration: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """
    Write `agreement_thresholds.json` and `coverage_thresholds.json`, and what is read back from them as
    `generation_config.json`.

    Args:
        model (`PDTForParallelDecoding`): Its generation configuration takes the thresholds over.
        calibration (`Mapping`): `agreement` and `coverage`, each from [`calibrate`]; one that is missing or `None` is
            left as it is.
        folder (`str` or `Path`): Folder of the model.
    """
    heads = {head: calibration.get(head) for head in ("agreement", "coverage")}
    paths = [write_thresholds(folder, head, report) for head, report in heads.items() if report is not None]
    apply_thresholds(model.generation_config, folder)
    model.generation_config.save_pretrained(folder)
    return paths


def apply_thresholds(config: PDTGenerationConfig, folder: str | Path) -> PDTGenerationConfig:
    """
    Set the thresholds of a generation configuration to those that `folder` holds, and check them.

    Args:
        config (`PDTGenerationConfig`): Changed in place and returned.
        folder (`str` or `Path`): With files of [`save_calibration`]; a threshold without a file stays as it is.
    """
    for name, value in read_thresholds(folder).items():
        setattr(config, name, value)
    config.check()
    return config
