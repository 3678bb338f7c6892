"""What modules of `evaluate` declare alike: their information, and the inputs of those that judge probabilities."""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from ..calibration import Judgements, assess, calibrate

JUDGEMENT_INPUTS = """
Args:
    predictions (`list[float]`): {prediction}
    references (`list[bool]`): {reference}
    documents (`list`, *optional*): Document of each judgement; intervals resample documents. Missing = each judgement
        counts as a document of its own.
    threshold (`float`, *optional*): {threshold}{further}
    samples (`int`, *optional*, defaults to 500), seed (`int`, *optional*, defaults to 0): Of the bootstrap.

Returns:
    `dict`: `precision`, `recall`, `f1`, `false_positive_rate`, `auroc`, `average_precision`,
    `expected_calibration_error`, each `{{mean, low, high, n}}`; `points` (counts and ratios per threshold),
    `selected_point`, `reliability`, counts; without `threshold` also `threshold` and `rule`{returned}.
"""
"""Inputs of a module that judges probabilities, with places for what is its own."""


def metric_info(description: str, inputs: str, **features: Any) -> evaluate.MetricInfo:
    """
    Information of a module.

    Args:
        description (`str`), inputs (`str`): What it measures, and of what.
        features: Feature of `predictions`, and of `references` where it takes them.
    """
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(features)
    )


def judgement_info(description: str, **texts: str) -> evaluate.MetricInfo:
    """
    Information of a module that judges probabilities.

    Args:
        description (`str`): What it measures.
        texts: For the places of [`JUDGEMENT_INPUTS`]: `prediction`, `reference`, `threshold`, and where it takes or
            gives more `further` and `returned`.
    """
    inputs = JUDGEMENT_INPUTS.format(**{"further": "", "returned": "", **texts})
    features = {"predictions": datasets.Value("float64"), "references": datasets.Value("bool")}
    return metric_info(description, inputs, **features)


def judge_probabilities(
    predictions: Sequence[float],
    references: Sequence[bool],
    *,
    finds: bool,
    rule: str,
    documents: Sequence[Hashable] | None = None,
    threshold: float | None = None,
    samples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """
    [`~trainer_pdt.calibration.assess`] at a threshold, or [`~trainer_pdt.calibration.calibrate`] without one.

    Args:
        finds (`bool`): The class that a threshold looks for, see [`~trainer_pdt.calibration.Judgements`].
        rule (`str`): How a threshold is chosen.
        predictions, references, documents, threshold, samples, seed: As in [`JUDGEMENT_INPUTS`].
    """
    judgements = Judgements.of_columns(predictions, references, documents, finds=finds)
    if threshold is None:
        return calibrate(judgements, rule, samples, seed)
    return assess(judgements, threshold, samples, seed)
