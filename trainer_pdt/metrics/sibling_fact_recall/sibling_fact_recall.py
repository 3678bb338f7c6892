"""Do streams repeat the facts that only their siblings chose? Counted exactly, on procedural worlds."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.data.counting import StreamText, reference_rate
from trainer_pdt.data.publish import DOCUMENT_FEATURES, document_from_row
from trainer_pdt.evaluation.scoring import count_written, plan_adherence, rate_dict, reference_classes
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Share of repeated facts with the value that their owner stated in an earlier, visible round."
INPUTS = """
Args:
    predictions (`list[list[dict]]`): Per document, per stream in plan order, `text`, the section without header and
        end token, and `round_ends`, the character offset at which each round ended. Empty = one round; then nothing
        was stated in an earlier one.
    references (`list[dict]`): Rows of a published dataset of procedural worlds: their plans are what was decoded.
    lag (`int`, *optional*, defaults to 1): A round sees the rounds that lie at least so far back.
    capacity (`int`, *optional*, defaults to 16): Rounds that the bus keeps.

Returns:
    `dict`: `sibling_fact_recall`; the same by timing class (`classes`: feasible, pending, same, late, evicted) and how
    the texts keep to the plan (`plan`). Values are `{mean, low, high, n}`.
"""


class SiblingFactRecall(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.data.counting`."""

    def _info(self) -> evaluate.MetricInfo:
        stream = {"text": datasets.Value("string"), "round_ends": datasets.List(datasets.Value("int32"))}
        features = {"predictions": datasets.List(stream), "references": dict(DOCUMENT_FEATURES)}
        return metric_info(DESCRIPTION, INPUTS, **features)

    def _compute(
        self,
        predictions: Sequence[Sequence[Mapping[str, Any]]],
        references: Sequence[Mapping[str, Any]],
        lag: int = 1,
        capacity: int = 16,
    ) -> dict[str, Any]:
        texts = [[StreamText(s["text"], tuple(s["round_ends"])) for s in streams] for streams in predictions]
        counts = count_written([document_from_row(row) for row in references], texts, lag, capacity)
        report = {
            "sibling_fact_recall": rate_dict(reference_rate(counts)),
            "classes": reference_classes(counts),
            "plan": plan_adherence(counts),
        }
        return take_documents(report)[0]
