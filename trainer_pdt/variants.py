"""Other renderings of a document's notes and plan: in other words, with other values, other documents' items."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .data.schema import Document, Fact, PlanItem, Span

FACT_FORMAT = " The {cue} is {value}."
"""How one fact of a note is written for the notes encoder."""

FACT_WORDINGS = (" {value} is the {cue}.", " Known about the {cue}: {value}.", " As the {cue} they have {value}.")
"""Second wordings of the same."""


def collect_items(documents: Iterable[Document]) -> dict[str, tuple[str, ...]]:
    """Texts of the plan items of documents, by what they are about: the pool of items that contradict a section."""
    texts: dict[str, set[str]] = {}
    for document in documents:
        for item in document.items:
            texts.setdefault(_topic(item), set()).add(item.text)
    return {topic: tuple(sorted(found)) for topic, found in sorted(texts.items())}


def render_fact(fact: Fact, rng: random.Random | None = None) -> str:
    """A fact for the notes encoder, with `rng` in one of the second wordings."""
    wording = FACT_FORMAT if rng is None else rng.choice(FACT_WORDINGS)
    return wording.format(cue=fact.predicate, value=fact.object)


def is_disputable(stream: int, span: Span, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether notes on `stream` can contradict a value: the stream owns it, and another value of the cue is known."""
    return span.owner == stream and any(value != span.value for value in values.get(span.cue, ()))


def contrary_fact(
    fact: Fact, stream: int, span: Span, values: Mapping[str, Sequence[str]], rng: random.Random
) -> Fact:
    """The fact of `span` with another value of its cue; itself where it cannot be contradicted."""
    if not is_disputable(stream, span, values):
        return fact
    return replace(fact, object=rng.choice([value for value in values[span.cue] if value != span.value]))


def contrary_items(document: Document, items: Mapping[str, Sequence[str]], rng: random.Random) -> list[str]:
    """
    For every plan item the text of one that the document says nothing about.

    Args:
        document ([`Document`]): The document.
        items (`Mapping[str, Sequence[str]]`): Pool, see [`collect_items`].
        rng (`random.Random`): Source of randomness.

    Returns:
        `list[str]`: A text per item; empty texts when the pool has nothing else.
    """
    known = {_topic(item) for item in document.items} | {span.cue for s in document.streams for span in s.spans}
    texts = {item.text for item in document.items}
    others = [text for topic, found in items.items() if topic not in known for text in found if text not in texts]
    return [rng.choice(others) if others else "" for _ in document.items]


def _topic(item: PlanItem) -> str:
    """What an item is about: its id without the section's."""
    return item.item_id.rsplit("/", 1)[-1]
