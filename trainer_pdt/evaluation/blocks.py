"""Agreement of whole blocks, scored with the text given: planted contradictions and a model's own text.

Letters: B documents, S streams, R = B * S rows, T tokens, V rounds, M tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modeling_pdt import PDTForParallelDecoding, Rollout
from modeling_pdt.gate import agreement_probability

from ..branches import build_rollout, silence
from ..collator import PDTDataCollator
from ..data.counting import StreamText
from ..data.schema import Document, Span, Stream
from ..data.worlds_lexicon import CUES
from ..data.worlds_parser import parse_section
from ..features import FeatureMaker
from .modes import batches

Decisions = list[list[tuple[float, bool]]]
"""`(probability, truth)` by document."""


@dataclass(frozen=True)
class BlockScore:
    """
    One block of one stream.

    Args:
        document (`int`), stream (`int`), round (`int`): Which block.
        contradicts (`bool`): It holds a repeated fact with another value than its source states.
        judgeable (`bool`): It holds a repeated fact whose source states it in a visible or the same round.
        disagreement (`float`): One minus the head's agreement.
        zeroed (`float`): The same with all notes zeroed.
        logp_gap (`float`): Largest log-probability that reading the fresh notes takes from a token of the block.
    """

    document: int
    stream: int
    round: int
    contradicts: bool
    judgeable: bool
    disagreement: float
    zeroed: float
    logp_gap: float


def document_from_texts(document: Document, texts: Sequence[StreamText]) -> Document:
    """The document with other sections: spans are what the parser finds, notes are left empty."""
    owners = {item.item_id.split("/", 1)[1]: item for item in document.items}
    streams = []
    for stream, text in zip(document.streams, texts, strict=True):
        spans = []
        for mention in parse_section(text.text):
            item = owners.get(mention.cue)
            if item is None:
                continue
            source = CUES[mention.cue].source
            linked = source in owners and owners[source].stream != stream.stream_id
            kind = "sibling" if item.stream != stream.stream_id or linked else "own"
            spans.append(Span(mention.start, mention.end, kind, mention.cue, mention.value, item.item_id, item.stream))
        streams.append(Stream(stream.stream_id, stream.header, stream.summary, text.text, tuple(spans)))
    return replace(document, streams=tuple(streams))


def documents_from_texts(documents: Sequence[Document], texts: Sequence[Sequence[StreamText]]) -> list[Document]:
    """[`document_from_texts`] of each document."""
    return [document_from_texts(document, text) for document, text in zip(documents, texts, strict=True)]


def _linked_as_stated(document: Document) -> Document:
    """The document with the value of every linked fact as its source states it: tells where a linked fact is from."""
    stated: dict[str, str] = {}
    for stream in document.streams:
        for span in stream.spans:
            if span.kind == "own":
                stated.setdefault(span.cue, span.value)
    streams = []
    for stream in document.streams:
        spans = tuple(
            replace(span, value=stated.get(CUES[span.cue].source, ""))
            if span.kind == "sibling" and span.owner == stream.stream_id
            else span
            for span in stream.spans
        )
        streams.append(replace(stream, spans=spans))
    return replace(document, streams=tuple(streams))


def traced_features(features: FeatureMaker, document: Document) -> dict[str, Any]:
    """Features of a document with any sections; a linked fact that contradicts its source is compared with it too."""
    traced = _linked_as_stated(document)
    made = features(document)
    return made if traced == document else {**made, "clean": features.view(document, traced, set(), 0.0)}


@torch.no_grad()
def score_blocks(
    model: PDTForParallelDecoding,
    features: FeatureMaker,
    documents: Sequence[Document],
    view: str = "clean",
    batch_size: int = 16,
) -> list[BlockScore]:
    """
    Every block of the documents.

    Args:
        features (`FeatureMaker`): Its corrupted view is what `view="corrupted"` scores.
        documents (`Sequence[Document]`): As written, or from [`document_from_texts`].
        view (`str`): `"clean"` or `"corrupted"`.
    """
    collator = PDTDataCollator.from_config(model.config, features.tokenizer, with_corrupted=view == "corrupted")
    scores = []
    for number, batch in enumerate(batches(documents, batch_size)):
        inputs = collator([traced_features(features, document) for document in batch])
        inputs = inputs["corrupted"] if view == "corrupted" else inputs
        values = _score_batch(model, inputs)
        streams = inputs["input_ids"].shape[0] // len(batch)
        for row, round_number in inputs["block_exists"].nonzero().tolist():
            scores.append(
                BlockScore(
                    document=number * batch_size + row // streams,
                    stream=row % streams,
                    round=round_number,
                    contradicts=bool(inputs["contradicts"][row, round_number]),
                    judgeable=bool(inputs["judgeable"][row, round_number]),
                    **{name: float(value[row, round_number]) for name, value in values.items()},
                )
            )
    return scores


def _score_batch(model: PDTForParallelDecoding, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    fresh = replace(build_rollout(inputs, model.config), wants_coverage=True, wants_agreement=True)
    fresh = replace(fresh, lag_R1=torch.zeros_like(fresh.lag_R1))
    section = torch.nn.functional.pad(inputs["write_round"][:, 1:] >= 0, (0, 1))
    first = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        stream_ids=inputs["stream_ids"],
        rollout=fresh,
        logits_mask=section,
    )

    def again(rollout: Rollout) -> Any:
        return model(tap=first.tap, stream_ids=inputs["stream_ids"], rollout=rollout, logits_mask=section)

    zeroed = again(replace(fresh, perturbation_RVKN=-first.speculation))
    silent = again(replace(silence(fresh), wants_coverage=False, wants_agreement=False))
    targets = inputs["input_ids"][:, 1:][section[:, :-1]]
    gap_M = _log_probability(silent.logits, targets) - _log_probability(first.logits, targets)
    gap = torch.full(section.shape, float("-inf"))
    gap[section] = gap_M
    scaling = model.generation_config.agreement_scaling
    rounds = torch.arange(fresh.rounds)[None, :, None]
    member = inputs["read_round"][:, None, :] == rounds
    gap_RV = gap[:, None, :].masked_fill(~member, float("-inf")).amax(dim=-1)
    return {
        "disagreement": 1 - agreement_probability(first.agreement_logits, scaling),
        "zeroed": 1 - agreement_probability(zeroed.agreement_logits, scaling),
        "logp_gap": gap_RV,
    }


def _log_probability(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    return logits_MV.float().log_softmax(-1).gather(1, targets_M[:, None]).squeeze(1)


def block_decisions(
    scores: Sequence[BlockScore],
    documents: int,
    stands: Callable[[BlockScore], float],
    only_judgeable: bool = True,
) -> Decisions:
    """
    `(score, may stand)` of the blocks of each document; documents without a block have none.

    Args:
        scores (`Sequence[BlockScore]`): Blocks of all documents.
        documents (`int`): How many there are.
        stands (`Callable`): What speaks for the block.
        only_judgeable (`bool`, *optional*, defaults to `True`): Leave out blocks that repeat nothing that could be
            judged.
    """
    decisions: Decisions = [[] for _ in range(documents)]
    for score in scores:
        if score.judgeable or not only_judgeable:
            decisions[score.document].append((stands(score), not (score.judgeable and score.contradicts)))
    return decisions


def agreement_decisions(scores: Sequence[BlockScore]) -> Decisions:
    """Per document `(agreement, may stand)` of every block: decoding judges all, most have nothing to deny."""
    documents: dict[int, list[tuple[float, bool]]] = {}
    for score in scores:
        contradicts = score.judgeable and score.contradicts
        documents.setdefault(score.document, []).append((1 - score.disagreement, not contradicts))
    return list(documents.values())
