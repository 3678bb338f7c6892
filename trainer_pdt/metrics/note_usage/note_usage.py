"""Are notes read, and the right ones? Shares of attention of each block, against the facts that it repeats."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from trainer_pdt.evaluation.note_usage import usage_measures
from trainer_pdt.evaluation.sections import take_documents
from trainer_pdt.metrics.declared import metric_info

DESCRIPTION = "Shares of SNC's attention, and how much of what goes to notes goes to those that tell a repeated fact."
INPUTS = """
Args:
    predictions (`list[list[dict]]`): Per document, blocks as `trace.readings` has them: `stream`, `round`, `gate`,
        `sink`, `plan`, and in `notes` one `stream`, `round`, `weight` per round that the block saw. Of a block that
        was written several times the last one counts for `source`.
    references (`list[list[dict]]`): Per document, facts that a block repeats: `stream` and `round` that repeat,
        `source` and `source_round` that stated the fact first. May be empty.

Returns:
    `dict`: `gate`, `sink`, `plan` and `notes` over blocks; over repeated facts `source`, the share of the attention to
    notes that goes to the round which stated the fact, and `source_even`, what attention to all visible rounds alike
    would give. Values are `{mean, low, high, n}`; intervals resample documents.
"""


class NoteUsage(evaluate.Metric):
    """`evaluate` module of `trainer_pdt.evaluation.note_usage.usage_measures`."""

    def _info(self) -> evaluate.MetricInfo:
        place = {name: datasets.Value("int64") for name in ("stream", "round")}
        note = {**place, "weight": datasets.Value("float64")}
        block = {**place, **{name: datasets.Value("float64") for name in ("gate", "sink", "plan")}}
        fact = {**place, **{name: datasets.Value("int64") for name in ("source", "source_round")}}
        blocks = datasets.List({**block, "notes": datasets.List(note)})
        return metric_info(DESCRIPTION, INPUTS, predictions=blocks, references=datasets.List(fact))

    def _compute(
        self, predictions: Sequence[Sequence[Mapping[str, Any]]], references: Sequence[Sequence[Mapping[str, int]]]
    ) -> dict[str, Any]:
        return take_documents(usage_measures(predictions, references))[0]
