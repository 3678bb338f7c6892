"""Does a block agree with its siblings? Probabilities that blocks may stand, against the truth."""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.calibration import Judgements, assess, calibrate
from trainer_pdt.evaluation.scoring import roc

DESCRIPTION = "ROC, calibration error and a threshold by a stated rule of what says which blocks may stand."
INPUTS = """
Args:
    predictions (`list[float]`): Probability that a block may stand.
    references (`list[bool]`): Whether it may; what a threshold finds are blocks that may not.
    documents (`list`, *optional*): Document of each block; intervals resample documents. Missing = each block counts
        as a document of its own.
    threshold (`float`, *optional*): Blocks below it are withdrawn. Missing = the threshold of `rule`.
    rule (`str`, *optional*, defaults to `"false_alarms"`): A rule of `trainer_pdt.calibration.RULES`.
    samples (`int`, *optional*, defaults to 500), seed (`int`, *optional*, defaults to 0): Of the bootstrap.

Returns:
    `dict`: `auroc`, `average_precision`, `expected_calibration_error`, `precision`, `recall`, `f1`,
    `false_positive_rate`, each `{mean, low, high, n}`; `roc` (pairs of false and true positive rate), `points`,
    `selected_point`, `reliability`, counts; without `threshold` also `threshold` and `rule`.
"""


class Agreement(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.calibration` for what a threshold has to turn away."""

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
        rule: str = "false_alarms",
        samples: int = 500,
        seed: int = 0,
    ) -> dict[str, Any]:
        judgements = Judgements.of_columns(predictions, references, documents, finds=False)
        if threshold is None:
            report = calibrate(judgements, rule, samples, seed)
        else:
            report = assess(judgements, threshold, samples, seed)
        return {**report, "roc": roc([1 - p for p in predictions], [not stands for stands in references])}
