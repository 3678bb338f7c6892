"""Does a block agree with its siblings? Probabilities that blocks may stand, against the truth."""

from collections.abc import Sequence
from typing import Any

import evaluate

from trainer_pdt.evaluation.scoring import roc
from trainer_pdt.metrics.declared import judge_probabilities, judgement_info

DESCRIPTION = "ROC, calibration error and a threshold by a stated rule of what says which blocks may stand."
INPUTS = {
    "prediction": "Probability that a block may stand.",
    "reference": "Whether it may; what a threshold finds are blocks that may not.",
    "threshold": "Blocks below it are withdrawn. Missing = the threshold of `rule`.",
    "further": """
    rule (`str`, *optional*, defaults to `"false_alarms"`): A rule of `trainer_pdt.calibration.RULES`.""",
    "returned": ";\n    `roc` (pairs of false and true positive rate)",
}


class Agreement(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.calibration` for what a threshold has to turn away."""

    def _info(self) -> evaluate.MetricInfo:
        return judgement_info(DESCRIPTION, **INPUTS)

    def _compute(
        self, predictions: Sequence[float], references: Sequence[bool], rule: str = "false_alarms", **options: Any
    ) -> dict[str, Any]:
        report = judge_probabilities(predictions, references, finds=False, rule=rule, **options)
        return {**report, "roc": roc([1 - p for p in predictions], [not stands for stands in references])}
