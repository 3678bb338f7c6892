"""How much a stream attends to notes while it writes, and whether to those that tell what it repeats."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.counting import bootstrap_rate
from .modes import write_parallel
from .scoring import count_written, rate_dict

if TYPE_CHECKING:
    from .suite import Evaluation

logger = logging.getLogger(__name__)


def usage_measures(
    readings: Sequence[Sequence[Mapping[str, Any]]], references: Sequence[Sequence[Mapping[str, int]]]
) -> dict[str, dict[str, Any]]:
    """
    Shares of SNC's attention, and how much of what goes to notes goes to the right one.

    Args:
        readings (`Sequence[Sequence[Mapping]]`): Per document, records of blocks as
            [`~modeling_pdt.readings.ReadingRecorder`] makes them: `stream`, `round`, `gate`, `sink`, `plan`, `notes`.
        references (`Sequence[Sequence[Mapping]]`): Per document, facts that a block repeats: `stream` and `round` that
            repeat, `source` and `source_round` that stated the fact first.

    Returns:
        `dict`: `gate`, and the shares of attention `sink`, `plan` and `notes`, over blocks; `source`, the share of the
        attention to notes that goes to the round which stated the fact, over repeated facts whose source the block
        could see, and `source_even`, what attention to all visible rounds alike would give. Values are
        `{mean, low, high, n}`; intervals resample documents.
    """
    if len(readings) != len(references):
        raise ValueError(
            f"references has {len(references)} documents, must have {len(readings)}, as many as readings."
        )
    blocks: dict[str, Callable[[Mapping[str, Any]], float]] = {
        **{name: lambda block, name=name: block[name] for name in ("gate", "sink", "plan")},
        "notes": lambda block: sum(note["weight"] for note in block["notes"]),
    }
    measures = {
        name: rate_dict(bootstrap_rate((sum(map(value, document)), len(document)) for document in readings))
        for name, value in blocks.items()
    }
    right = [_right_notes(*document) for document in zip(readings, references, strict=True)]
    for place, name in enumerate(("source", "source_even")):
        measures[name] = rate_dict(bootstrap_rate((sum(pair[place] for pair in found), len(found)) for found in right))
    return measures


def _right_notes(
    readings: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, int]]
) -> list[tuple[float, float]]:
    """Per repeated fact, the share of attention to notes that goes to its source, and the even share."""
    blocks = {(block["stream"], block["round"]): block["notes"] for block in readings}
    found = []
    for reference in references:
        notes = {
            (note["stream"], note["round"]): note["weight"]
            for note in blocks.get((reference["stream"], reference["round"]), ())
        }
        source = reference["source"], reference["source_round"]
        if source in notes:
            found.append((notes[source] / sum(notes.values()), 1 / len(notes)))
    return found


def note_usage(evaluation: "Evaluation") -> dict[str, Any]:
    """Section `note_usage`: [`usage_measures`] of the documents as parallel decoding writes them, gate off."""
    documents = evaluation.documents
    logger.info("writing %d documents and recording what they read", len(documents))
    options = {**evaluation.common(), "agreement_threshold": None, "record_readings": True}
    written = evaluation.writers(write_parallel, documents, **options)
    counts = count_written(documents, written.texts, evaluation.lag, evaluation.capacity)
    names = ("stream", "round", "source", "source_round")
    references = [
        [{name: getattr(entry, name) for name in names} for entry in count.select("feasible")] for count in counts
    ]
    return usage_measures(written.readings, references)
