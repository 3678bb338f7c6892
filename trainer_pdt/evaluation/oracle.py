"""Rollback against its controls, the best gate there can be among them: one that knows which blocks contradict."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.interventions import Intervention

from ..data.counting import DocumentCounts
from ..data.schema import Document
from .documents import held_out_documents
from .modes import Written, batches, calibrated_gate, write_parallel, write_random_gate
from .scoring import KNOWN_TIMINGS, count_written, rollback_counts

if TYPE_CHECKING:
    from .suite import Evaluation

logger = logging.getLogger(__name__)

Block = tuple[int, int]
"""Stream and round."""


class ChosenBlocks(Intervention):
    """
    The first writing of the chosen blocks is withdrawn, all others stand.

    Args:
        blocks (`Sequence[Sequence[Block]]`): Chosen `(stream, round)` by prompt.
        num_streams (`int`): Streams per prompt.
    """

    name = "chosen_blocks"

    def __init__(self, blocks: Sequence[Sequence[Block]], num_streams: int) -> None:
        self.blocks, self.num_streams = [frozenset(chosen) for chosen in blocks], num_streams

    def check(self, num_prompts: int) -> None:
        """Needs an entry per prompt."""
        if len(self.blocks) != num_prompts:
            raise ValueError(f"ChosenBlocks.blocks must have {num_prompts} entries, one per prompt.")

    def agreement(
        self, agreement_M: torch.Tensor, rows_M: torch.Tensor, round_M: torch.Tensor, attempt_M: torch.Tensor
    ) -> torch.Tensor:
        """0 for the chosen blocks, 1 for all others."""
        places = zip(rows_M.tolist(), round_M.tolist(), attempt_M.tolist(), strict=True)
        stands = [
            attempt > 0 or (row % self.num_streams, number) not in self.blocks[row // self.num_streams]
            for row, number, attempt in places
        ]
        return torch.tensor(stands).to(agreement_M)


def first_contradiction(counts: DocumentCounts, known: Sequence[Block]) -> Block | None:
    """The earliest block, by round, then stream, that repeats a known fact wrongly and is not among `known`."""
    wrong = counts.select(None, lambda entry: entry.timing in KNOWN_TIMINGS and not entry.consistent)
    blocks = {(entry.round, entry.stream) for entry in wrong if (entry.stream, entry.round) not in known}
    return min(blocks)[::-1] if blocks else None


def write_oracle(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    lag: int,
    capacity: int,
    batch_size: int = 32,
    **options: Any,
) -> Written:
    """
    Documents whose contradicting blocks, and no others, are written again once.

    A document is written, its first contradicting block is chosen, and it is written anew up to there and on, until
    none is left that has not been written twice: sampling is a function of seed, place and attempt, so what comes
    before a chosen block stays as it was.

    Args:
        lag, capacity (`int`): Of the bus, for the counts.
        options: Of [`write_parallel`]; `retry_policy="stale"` rewrites without the newest notes.
    """
    written = Written()
    for batch in batches(documents, batch_size):
        chosen: list[list[Block]] = [[] for _ in batch]
        parts: list[Written | None] = [None] * len(batch)
        changed = list(range(len(batch)))
        while changed:
            gate = ChosenBlocks([chosen[index] for index in changed], len(batch[0].streams))
            again = write_parallel(
                model,
                tokenizer,
                [batch[index] for index in changed],
                interventions=[gate],
                batch_size=len(changed),
                **{**options, "agreement_threshold": 0.5},
            )
            counts = count_written([batch[index] for index in changed], again.texts, lag, capacity)
            rewritten = []
            for place, index in enumerate(changed):
                parts[index] = Written([again.texts[place]], [again.results[place]], [again.events[place]])
                if (block := first_contradiction(counts[place], chosen[index])) is not None:
                    chosen[index].append(block)
                    rewritten.append(index)
            changed = rewritten
        written = Written.joined([written, *(part for part in parts if part is not None)])
    return written


def rollback_controls(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `rollback`, on documents of its own: the calibrated gate, no gate, and four controls.

    `head_stale` rewrites the same blocks without fresh notes, `random` as many blocks by chance, `oracle` exactly the
    contradicting ones, with fresh and with stale notes.
    """
    evaluation.calibration()
    documents = held_out_documents("test", evaluation.arguments.section_documents["rollback_controls"], 0)
    gate = calibrated_gate(evaluation.model)
    if gate["agreement_threshold"] is None:
        raise ValueError("agreement_threshold is None and could not be calibrated; give more documents.")
    common, lag, capacity = evaluation.common(), evaluation.lag, evaluation.capacity

    def measured(name: str, write: Any = write_parallel, **options: Any) -> dict[str, Any]:
        logger.info("rewriting in %d documents: %s", len(documents), name)
        written = evaluation.writers(write, documents, **common, **options)
        return rollback_counts(count_written(documents, written.texts, lag, capacity), written.events)

    stale, bus = {"retry_policy": "stale"}, {"lag": lag, "capacity": capacity}
    result = {
        "none": measured("none", agreement_threshold=None),
        "head": measured("head", **gate),
        "head_stale": measured("head_stale", **gate, **stale),
    }
    rate = result["head"]["blocks_rolled"] / max(1, result["head"]["blocks"])
    result["random"] = measured("random", write_random_gate, rate=rate)
    result["oracle"] = measured("oracle", write_oracle, **bus)
    result["oracle_stale"] = measured("oracle_stale", write_oracle, **bus, **stale)
    return {"rollback": result}
