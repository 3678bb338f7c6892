"""Sections of an evaluation on documents of their own: notes as text, two hops, curves."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding

from ..data.counting import DocumentCounts, Reference, reference_rate
from ..data.schema import Document
from .documents import held_out_documents, two_hop_documents
from .modes import PARALLEL_MODES, Written, calibrated_gate, write_full_text, write_parallel, write_sequential
from .scoring import count_written, mean_chance, rate_dict, reference_classes, rollback_counts

if TYPE_CHECKING:
    from .suite import Evaluation

logger = logging.getLogger(__name__)


def note_text(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `note_text`: the bare trunk with its siblings' facts as text of as many tokens as a block has notes.

    Beside it, on the same documents, the notes, the siblings' whole text, and writing one section after the other.
    """
    documents = held_out_documents("test", _count(evaluation, "note_text"), 0)
    logger.info("writing %d documents with notes as text", len(documents))
    config = evaluation.model.config
    ways = _bounds(evaluation)
    ways.pop("ablated")
    ways["full_text"] = lambda some: _write(evaluation, write_full_text, some, block_size=config.block_size)
    ways["note_text"] = lambda some: _write(
        evaluation, write_full_text, some, block_size=config.block_size, slots=config.notes_per_block
    )
    counts = {name: _counts(evaluation, documents, write) for name, write in ways.items()}
    return {name: rate_dict(reference_rate(found)) for name, found in counts.items()}


def two_hop(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `two_hop`: facts that a stream repeats from a sibling that itself only repeats them, and the first hop.

    `linked` is the sibling's own statement, which has to equal a third stream's fact; `repeated` is what the stream
    makes of it, `guessed` the same where the sibling could not read the third stream's fact when it stated its own:
    what is then on the bus contradicts itself. All only where the source is visible.
    """
    documents = two_hop_documents(_count(evaluation, "two_hop"))
    logger.info("writing %d documents with facts over two hops", len(documents))
    hops: dict[str, Callable[[Reference], bool]] = {
        "linked": lambda entry: entry.is_link,
        "repeated": lambda entry: entry.hops == 2 and entry.source_timing == "feasible",
        "guessed": lambda entry: entry.hops == 2 and entry.source_timing != "feasible",
    }
    counts = {name: _counts(evaluation, documents, write) for name, write in _bounds(evaluation).items()}
    return {
        hop: {name: rate_dict(reference_rate(found, where=where)) for name, found in counts.items()}
        for hop, where in hops.items()
    }


def curves(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `curves`: recall by factors of decoding that need no other training, one value after the other.

    Every point counts with its own lag and capacity. With other numbers of streams, what the trunk reaches one
    section after the other stands beside it; thresholds of the gate give what [`rollback_counts`] gives.
    """
    number, result = _count(evaluation, "curves"), {}
    for factor, values in evaluation.arguments.curves.items():
        result[factor] = {}
        for value in values:
            logger.info("writing %d documents: %s %s", number, factor, value)
            make = _threshold_point if factor == "agreement_threshold" else _point
            result[factor][str(value)] = make(evaluation, number, factor, value)
    return result


def write_in_blocks(
    model: PDTForParallelDecoding, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], **options: Any
) -> Written:
    """[`write_parallel`] with a `block_size` beyond the commit horizon, which is raised to it for the call."""
    horizon = model.config.commit_horizon
    model.config.commit_horizon = max(horizon, options["block_size"])
    try:
        return write_parallel(model, tokenizer, documents, **options)
    finally:
        model.config.commit_horizon = horizon


def _point(evaluation: "Evaluation", number: int, factor: str, value: int) -> dict[str, Any]:
    streams = {"num_streams": value} if factor == "num_streams" else {}
    documents = held_out_documents("test", number, 0, **streams)
    options = {} if streams else {factor: value}
    bus = {"lag": options.get("bus_lag"), "capacity": options.get("bus_capacity")}
    write = write_in_blocks if "block_size" in options else write_parallel
    ways = {"pdt": lambda some: _write(evaluation, write, some, agreement_threshold=None, **options)}
    if streams:
        ways = _bounds(evaluation)
    counts = {name: _counts(evaluation, documents, write, **bus) for name, write in ways.items()}
    return {
        **{name: rate_dict(reference_rate(found)) for name, found in counts.items()},
        "classes": reference_classes(counts["pdt"]),
        "chance": mean_chance(counts["pdt"]),
    }


def _threshold_point(evaluation: "Evaluation", number: int, factor: str, value: float) -> dict[str, Any]:
    documents = held_out_documents("test", number, 0)
    evaluation.calibration()
    written = _write_pdt(evaluation, documents, **{**calibrated_gate(evaluation.model), factor: value})
    return rollback_counts(
        count_written(documents, written.texts, evaluation.lag, evaluation.capacity), written.events
    )


def _count(evaluation: "Evaluation", section: str) -> int:
    return evaluation.arguments.section_documents[section]


def _write(evaluation: "Evaluation", write: Callable, documents: Sequence[Document], **options: Any) -> Written:
    return evaluation.writers(write, documents, **evaluation.common(), **options)


def _write_pdt(evaluation: "Evaluation", documents: Sequence[Document], **options: Any) -> Written:
    return _write(evaluation, write_parallel, documents, **{"agreement_threshold": None, **options})


def _bounds(evaluation: "Evaluation") -> dict[str, Callable[[Sequence[Document]], Written]]:
    """The model, what the bus adds to, and what could be reached."""
    ablated = {"interventions": PARALLEL_MODES["ablated"]()}
    return {
        "pdt": lambda some: _write_pdt(evaluation, some),
        "ablated": lambda some: _write_pdt(evaluation, some, **ablated),
        "sequential": lambda some: _write(evaluation, write_sequential, some),
    }


def _counts(
    evaluation: "Evaluation",
    documents: Sequence[Document],
    write: Callable[[Sequence[Document]], Written],
    lag: int | None = None,
    capacity: int | None = None,
) -> list[DocumentCounts]:
    texts = write(documents).texts
    return count_written(documents, texts, lag or evaluation.lag, capacity or evaluation.capacity)
