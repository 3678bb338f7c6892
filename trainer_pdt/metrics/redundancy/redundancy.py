"""Do the sections of one answer say the same? Cosines of their words."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.consistency import section_redundancy
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Mean relu(cosine - 0.7) of the TF-IDF vectors of every two sections of an answer."
INPUTS = """
Args:
    predictions (`list[list[str]]`): Sections of each answer.

Returns:
    `dict`: `redundancy` as `{mean, low, high, n}` over pairs, from 0 to 0.3; intervals resample answers.
"""


class Redundancy(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.consistency.section_redundancy`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("string"))}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(self, predictions: Sequence[Sequence[str]]) -> dict[str, Any]:
        return take_documents({"redundancy": section_redundancy(predictions)})[0]
