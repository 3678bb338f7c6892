"""Do sections state the same attribute alike? Facts of their notes, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.data.schema import Fact
from trainer_pdt.evaluation.consistency import attribute_consistency
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Share of the attributes that several sections state which all of them state alike."
INPUTS = """
Args:
    predictions (`list[list[list[dict]]]`): Per document, per section, facts with `subj_id`, `predicate` and `object`,
        for example those of a published dataset's notes. An attribute is a subject with a predicate.

Returns:
    `dict`: `attribute_consistency` as `{mean, low, high, n}` over attributes that several sections of a document
    state; intervals resample documents.
"""


class AttributeConsistency(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.consistency.attribute_consistency`."""

    def _info(self) -> evaluate.MetricInfo:
        fact = {name: datasets.Value("string") for name in ("subj_id", "predicate", "object")}
        features = {"predictions": datasets.List(datasets.List(fact))}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(self, predictions: Sequence[Sequence[Sequence[Mapping[str, str]]]]) -> dict[str, Any]:
        documents = [[[Fact(**fact, start=0, end=0) for fact in facts] for facts in one] for one in predictions]
        return take_documents({"attribute_consistency": attribute_consistency(documents)})[0]
