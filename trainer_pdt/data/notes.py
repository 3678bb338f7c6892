"""Notes on a section, whole or up to a character: entities, facts, coverage, snapshots, readiness."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .schema import Coverage, Document, Entity, Fact, Notes, NotesSnapshot, PlanItem, Span, Stream
from .teachers import SectionNotes

ROUND_WORDS = 9
"""Words per round where text is cut without a tokenizer; about 12 tokens of the tiny trunk's tokenizer."""

MAX_SNAPSHOTS = 32
"""Snapshots of a section beside the plan contract; each holds all notes so far."""


def annotate_streams(
    streams: Sequence[Stream],
    items: Sequence[PlanItem],
    sections: Sequence[SectionNotes],
    round_words: int = ROUND_WORDS,
    max_snapshots: int = MAX_SNAPSHOTS,
) -> tuple[Stream, ...]:
    """
    The streams with spans, notes, snapshots by evidence position and readiness of what a teacher noted.

    Args:
        streams (`Sequence[Stream]`): Header, summary and text of every section.
        items (`Sequence[PlanItem]`): The plan's items.
        sections (`Sequence[SectionNotes]`): One per stream.
        round_words (`int`, *optional*, defaults to 9): Words per round, for snapshots and readiness.
        max_snapshots (`int`, *optional*, defaults to 32): Most snapshots of a section.
    """
    told = [replace(stream, spans=section.spans) for stream, section in zip(streams, sections, strict=True)]
    annotated = []
    for stream, section in zip(told, sections, strict=True):
        own = [item for item in items if item.stream == stream.stream_id]
        annotated.append(
            replace(
                stream,
                notes=notes_until(stream.text, own, section, len(stream.text)),
                snapshots=snapshots(stream.text, own, section, round_words, max_snapshots),
                ready=readiness(told, stream, round_words),
            )
        )
    return tuple(annotated)


def notes_until(text: str, items: Sequence[PlanItem], section: SectionNotes, end: int) -> Notes:
    """Notes on the first `end` characters of a section: what it states, and which of its own items are covered."""
    facts = tuple(fact for fact in section.facts if fact.end <= end)
    coverage = tuple(item_coverage(item, text, section, end) for item in items)
    line = notes_line(facts, [item.text for item in items])
    return Notes(line, visible_entities(section.entities, facts, text[:end]), facts, coverage)


def visible_entities(entities: Iterable[Entity], facts: Sequence[Fact], text: str) -> tuple[Entity, ...]:
    """Entities that the text names, or that one of the facts is about."""
    subjects = {fact.subj_id for fact in facts}
    return tuple(
        entity
        for entity in entities
        if entity.id in subjects or any(name and name in text for name in (entity.name, *entity.aliases))
    )


def item_coverage(item: PlanItem, text: str, section: SectionNotes, end: int) -> Coverage:
    """
    Coverage of an item by the first `end` characters.

    An item with a span is covered once its value is complete, partial once its cue has been named before. Another one
    is missing until the section is whole; then the teacher's own judgement counts, and without one it is a hint.
    """
    for span in section.spans:
        if span.item_id == item.item_id:
            if span.end <= end:
                return Coverage(item.item_id, "covered")
            place = text.rfind(span.cue, 0, span.start)
            named = place >= 0 and place + len(span.cue) <= end
            return Coverage(item.item_id, "partial" if named else "missing")
    judged = next((entry for entry in section.coverage if entry.item_id == item.item_id), None)
    if judged is None:
        return Coverage(item.item_id, "missing", "hint")
    return judged if end >= len(text) else replace(judged, status="missing")


def notes_line(facts: Sequence[Fact], planned: Sequence[str]) -> str:
    """Notes as one line: facts if there are any, else what is planned."""
    if facts:
        return "; ".join(f"{fact.predicate}: {fact.object}" for fact in facts)
    return "planned: " + "; ".join(planned)


def snapshots(
    text: str, items: Sequence[PlanItem], section: SectionNotes, round_words: int, max_snapshots: int = MAX_SNAPSHOTS
) -> tuple[NotesSnapshot, ...]:
    """
    Notes by evidence position: snapshot 0 is the plan contract, snapshot r stands after r rounds of `round_words`
    words. Of a section with more rounds than `max_snapshots` evenly spread ones are kept, the last one among them.
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    rounds = -(-len(ends) // round_words)
    wanted = range(1, rounds + 1)
    if rounds > max_snapshots:
        wanted = sorted({-(-rounds * number // max_snapshots) for number in range(1, max_snapshots + 1)})
    # Text behind the last word belongs to the last round.
    places = [(number, ends[number * round_words - 1] if number < rounds else len(text)) for number in wanted]
    return tuple(
        NotesSnapshot(number, end, notes_until(text, items, section, end)) for number, end in [(0, 0), *places]
    )


def readiness(streams: Sequence[Stream], stream: Stream, round_words: int, lag: int = 1) -> tuple[bool, ...]:
    """Per sibling span of `stream`: its source stream states the value at least `lag` rounds before."""
    ready = []
    for span in stream.spans:
        if span.kind == "sibling":
            place = source_of(streams, stream.stream_id, span)
            read = word_round(stream.text, span.start, round_words)
            ready.append(place is not None and _stated_round(streams[place[0]], place[1], round_words) + lag <= read)
    return tuple(ready)


def _stated_round(stream: Stream, number: int, round_words: int) -> int:
    return word_round(stream.text, stream.spans[number].end - 1, round_words)


def word_round(text: str, offset: int, round_words: int) -> int:
    """Round of the word at character `offset` when rounds are `round_words` words long."""
    return max(len(text[: offset + 1].split()) - 1, 0) // round_words


def source_of(streams: Sequence[Stream], reader: int, span: Span) -> tuple[int, int] | None:
    """
    Where a repeated value was first stated.

    Args:
        streams (`Sequence[Stream]`): Streams of the document, as written.
        reader (`int`), span ([`Span`]): A span of kind ``"sibling"`` and the stream that holds it.

    Returns:
        `tuple[int, int]`: Stream and number of the span; `None` if no sibling states it. A fact that the reader owns
        but had to read is traced by its value.
    """
    for other in streams:
        for number, candidate in enumerate(other.spans):
            if span.owner != reader:
                found = other.stream_id == span.owner and candidate.item_id == span.item_id
            else:
                found = other.stream_id != reader and candidate.kind == "own" and candidate.value == span.value
            if found:
                return other.stream_id, number
    return None


def dependencies(document: Document) -> list[tuple[int, tuple[int, int], Span, bool]]:
    """
    Which sentences need a sibling's fact.

    Returns:
        `list`: Per repeated value (stream, character range of its sentence, span, whether the owner states it at least
        one round before).
    """
    found = []
    for stream in document.streams:
        repeated = [span for span in stream.spans if span.kind == "sibling"]
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|\n", stream.text)] + [len(stream.text)]
        for span, ready in zip(repeated, stream.ready, strict=True):
            end = next(end for end in ends if end >= span.end)
            start = max([0, *(other for other in ends if other <= span.start)])
            start += len(stream.text[start:end]) - len(stream.text[start:end].lstrip())
            found.append((stream.stream_id, (start, end), span, ready))
    return found
