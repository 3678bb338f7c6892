"""Are plan items covered? Probabilities of a coverage head, or of any judge, against the truth."""

from collections.abc import Sequence
from typing import Any

import evaluate

from trainer_pdt.metrics.declared import judge_probabilities, judgement_info

DESCRIPTION = (
    "Precision, recall, F1, precision-recall area, calibration error and a sweep of thresholds, with intervals."
)
INPUTS = {
    "prediction": "Probability that an item is covered.",
    "reference": "Whether it is.",
    "threshold": """Items at or above it count as covered. Missing = the one with the best F1, with
        its own interval; then it is chosen on what it is measured on.""",
}


class Coverage(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.calibration` for what a threshold has to find."""

    def _info(self) -> evaluate.MetricInfo:
        return judgement_info(DESCRIPTION, **INPUTS)

    def _compute(self, predictions: Sequence[float], references: Sequence[bool], **options: Any) -> dict[str, Any]:
        return judge_probabilities(predictions, references, finds=True, rule="best_f1", **options)
