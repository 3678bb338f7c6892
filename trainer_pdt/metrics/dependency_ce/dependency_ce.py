"""Do notes tell what a token depends on? Cross-entropy of tokens that depend on a sibling, and of all others."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.given_text import NOTES, dependency_measures
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Cross-entropy of tokens that depend on a sibling and of the others, with notes and with interventions."
INPUTS = """
Args:
    predictions (`list[list[float]]`): Per document, cross-entropy of each token in nats, with notes.
    references (`list[list[bool]]`): Per document, whether each token depends on a sibling.
    conditions (`dict[str, list[list[float]]]`, *optional*): By name of an intervention, cross-entropy of the same
        tokens under it, for example without notes or with another document's.

Returns:
    `dict`: `dependency` and `non_dependency`, by condition (`notes` and those given); `dependency_gain` and
    `non_dependency_gain`, by condition how much lower it is with notes. Values are `{mean, low, high, n}` over tokens;
    intervals resample documents.
"""


class DependencyCE(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.given_text.dependency_measures`."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = {name: datasets.List(datasets.Value(kind)) for name, kind in (("ce", "float64"), ("depends", "bool"))}
        return metric_info(DESCRIPTION, INPUTS, predictions=tokens["ce"], references=tokens["depends"])

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[bool]],
        conditions: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> dict[str, Any]:
        losses = {**(conditions or {}), NOTES: predictions}
        return take_documents(dependency_measures(losses, references))[0]
