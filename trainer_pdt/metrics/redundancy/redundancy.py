"""Do the sections of one answer say the same? Cosines of their words."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.data.counting import bootstrap_rate
from trainer_pdt.decode_metrics import redundancies
from trainer_pdt.evaluation.scoring import rate_dict
from trainer_pdt.evaluation.sections import take_documents

DESCRIPTION = "Mean relu(cosine - 0.7) of the TF-IDF vectors of every two sections of an answer."
INPUTS = """
Args:
    predictions (`list[list[str]]`): Sections of each answer.

Returns:
    `dict`: `redundancy` as `{mean, low, high, n}` over pairs, from 0 to 0.3; intervals resample answers.
"""


class Redundancy(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.decode_metrics.redundancies`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: Sequence[Sequence[str]]) -> dict[str, Any]:
        answers = [redundancies(sections) for sections in predictions]
        rate = bootstrap_rate((sum(pairs), len(pairs)) for pairs in answers)
        return take_documents({"redundancy": rate_dict(rate)})[0]
