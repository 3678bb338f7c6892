"""Are plan items covered? Probabilities of a coverage head, or of any judge, against the truth."""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.calibration import Judgements, assess, calibrate

DESCRIPTION = (
    "Precision, recall, F1, precision-recall area, calibration error and a sweep of thresholds, with intervals."
)
INPUTS = """
Args:
    predictions (`list[float]`): Probability that an item is covered.
    references (`list[bool]`): Whether it is.
    documents (`list`, *optional*): Document of each judgement; intervals resample documents. Missing = each judgement
        counts as a document of its own.
    threshold (`float`, *optional*): Items at or above it count as covered. Missing = the one with the best F1, with
        its own interval; then it is chosen on what it is measured on.
    samples (`int`, *optional*, defaults to 500), seed (`int`, *optional*, defaults to 0): Of the bootstrap.

Returns:
    `dict`: `precision`, `recall`, `f1`, `false_positive_rate`, `auroc`, `average_precision`,
    `expected_calibration_error`, each `{mean, low, high, n}`; `points` (counts and ratios per threshold),
    `selected_point`, `reliability`, counts; without `threshold` also `threshold` and `rule`.
"""


class Coverage(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.calibration` for what a threshold has to find."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("bool")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[bool],
        documents: Sequence[Hashable] | None = None,
        threshold: float | None = None,
        samples: int = 500,
        seed: int = 0,
    ) -> dict[str, Any]:
        judgements = Judgements.of_columns(predictions, references, documents, finds=True)
        if threshold is None:
            return calibrate(judgements, "best_f1", samples, seed)
        return assess(judgements, threshold, samples, seed)
