"""Whole answers as the report shows them: sections token by token, blocks, rollbacks, references."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.counting import DocumentCounts, StreamText
from ..data.schema import Document


def describe_answer(
    document: Document,
    texts: Sequence[StreamText],
    results: Sequence[Any],
    events: Sequence[dict],
    counts: DocumentCounts,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """
    One entry of `examples` in `evaluation.json`.

    Args:
        document ([`Document`]): Whose plan was written.
        texts (`Sequence[StreamText]`), results (`Sequence[StreamResult]`): By stream.
        events (`Sequence[dict]`): Of the trace; commits and rollbacks are kept.
        counts (`DocumentCounts`): Its references.
        tokenizer (`PreTrainedTokenizerBase`): Turns tokens into text.
    """
    streams = [
        {
            "header": stream.header,
            "text": text.text,
            "blocks": [list(block) for block in result.blocks],
            "tokens": [tokenizer.decode([token]) for token in result.token_ids],
        }
        for stream, text, result in zip(document.streams, texts, results, strict=True)
    ]
    shown = ("stream", "start", "cue", "value", "timing", "consistent")
    return {
        "prompt": document.prompt,
        "outline": [[item.text, item.stream] for item in document.items],
        "streams": streams,
        "events": [
            {**event, "tokens": [tokenizer.decode([token]) for token in event.get("tokens", [])]}
            for event in events
            if event["kind"] in ("commit", "rollback")
        ],
        "references": [{name: getattr(reference, name) for name in shown} for reference in counts.references],
    }
