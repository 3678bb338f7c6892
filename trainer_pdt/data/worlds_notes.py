"""Notes of procedural documents: true notes, corrupted ones, snapshots by position, coverage, readiness."""

import random
import re
from dataclasses import replace

from .schema import Coverage, CoverageStatus, Document, Entity, Fact, Notes, NotesSnapshot, PlanItem, Span, Stream
from .worlds_lexicon import CUES, PERSON, values_of

SUBJECT_ID = "e0"
ROUND_WORDS = 9
"""Words per round where text is cut without a tokenizer; about 12 tokens of the tiny trunk's tokenizer."""

CORRUPTIONS = ("drop", "swap", "hallucinate")


def annotate(document: Document, subject: str, rng: random.Random, round_words: int = ROUND_WORDS) -> Document:
    """The document with notes, noisy notes (one per entry of `CORRUPTIONS`), snapshots and readiness labels."""
    streams = []
    for stream in document.streams:
        items = [item for item in document.items if item.stream == stream.stream_id]
        notes = true_notes(stream, items, subject, document.domain)
        streams.append(
            replace(
                stream,
                notes=notes,
                noisy_notes=tuple(corrupt(notes, kind, rng) for kind in CORRUPTIONS),
                snapshots=snapshots(stream, items, subject, document.domain, round_words),
                ready=readiness(document.streams, stream, round_words),
            )
        )
    return replace(document, streams=tuple(streams))


def true_notes(stream: Stream, items: list[PlanItem], subject: str, domain: str, end: int | None = None) -> Notes:
    """Notes on the first `end` characters of a section: what it states, and which of its own items are covered."""
    end = len(stream.text) if end is None else end
    spans = [span for span in stream.spans if span.end <= end]
    persons = [span.value for span in spans if CUES[span.cue].value_type == PERSON]
    entities = [Entity(SUBJECT_ID, subject, domain)]
    entities += [
        Entity(f"e{number}", name, PERSON, (name.split()[-1],))
        for number, name in enumerate(dict.fromkeys(persons), start=1)
    ]
    facts = tuple(Fact(SUBJECT_ID, span.cue, span.value, span.start, span.end) for span in spans)
    coverage = tuple(Coverage(item.item_id, _status(item, stream, end)) for item in items)
    return Notes(_line(facts, items, coverage), tuple(entities), facts, coverage)


def snapshots(
    stream: Stream, items: list[PlanItem], subject: str, domain: str, round_words: int
) -> tuple[NotesSnapshot, ...]:
    """Snapshot 0 is the plan contract; snapshot r are the notes after r rounds of `round_words` words."""
    ends = [match.end() for match in re.finditer(r"\S+", stream.text)]
    cuts = ends[round_words - 1 :: round_words]
    if ends and (not cuts or cuts[-1] != ends[-1]):
        cuts.append(ends[-1])
    return tuple(
        NotesSnapshot(number, end, true_notes(stream, items, subject, domain, end))
        for number, end in enumerate([0, *cuts])
    )


def readiness(streams: tuple[Stream, ...], stream: Stream, round_words: int, lag: int = 1) -> tuple[bool, ...]:
    """Per sibling span of `stream`: its source stream states the value at least `lag` rounds before."""
    ready = []
    for span in stream.spans:
        if span.kind == "sibling":
            source = _source_span(streams, stream.stream_id, span)
            round_read = word_round(stream.text, span.start, round_words)
            ready.append(
                source is not None
                and word_round(streams[source[0]].text, source[1].end - 1, round_words) + lag <= round_read
            )
    return tuple(ready)


def word_round(text: str, offset: int, round_words: int) -> int:
    """Round of the word at character `offset` when rounds are `round_words` words long."""
    return max(len(text[: offset + 1].split()) - 1, 0) // round_words


def corrupt(notes: Notes, kind: str, rng: random.Random) -> Notes:
    """Corrupted notes: a fact dropped, its value swapped for another of the type, or a made-up fact added.

    The change shows in FACT, in ENT (persons) and in the line of text alike; COVERAGE stays as it is.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"`kind` is {kind!r}, must be one of {', '.join(CORRUPTIONS)}.")
    facts = list(notes.facts)
    if kind != "hallucinate" and not facts:
        return notes
    place = rng.randrange(len(facts)) if facts else 0
    if kind == "drop":
        facts.pop(place)
    elif kind == "swap":
        fact = facts[place]
        others = [value for value in values_of(fact.predicate, False) if value != fact.object]
        facts[place] = replace(fact, object=rng.choice(others), certainty=0.5)
    else:
        stated = {fact.predicate for fact in facts}
        cue = rng.choice([cue for cue in CUES if cue not in stated])
        facts.append(Fact(SUBJECT_ID, cue, rng.choice(values_of(cue, False)), 0, 0, certainty=0.5))
    return replace(
        notes,
        text=_line(tuple(facts), [], notes.coverage),
        entities=_entities(notes, facts),
        facts=tuple(facts),
    )


def _entities(notes: Notes, facts: list[Fact]) -> tuple[Entity, ...]:
    """The subject and every person that `facts` name."""
    persons = dict.fromkeys(fact.object for fact in facts if CUES[fact.predicate].value_type == PERSON)
    people = [Entity(f"e{number}", name, PERSON, (name.split()[-1],)) for number, name in enumerate(persons, start=1)]
    return (notes.entities[0], *people)


def _status(item: PlanItem, stream: Stream, end: int) -> CoverageStatus:
    """An item is covered once its value is complete, partial once the sentence has named its cue."""
    for span in stream.spans:
        if span.item_id == item.item_id:
            if span.end <= end:
                return "covered"
            named = stream.text.rfind(span.cue, 0, span.start) + len(span.cue)
            return "partial" if named <= end else "missing"
    return "missing"


def _line(facts: tuple[Fact, ...], items: list[PlanItem], coverage: tuple[Coverage, ...]) -> str:
    """Notes as one line: facts if there are any, else what is planned."""
    if facts:
        return "; ".join(f"{fact.predicate}: {fact.object}" for fact in facts)
    planned = [item.text for item in items] or [entry.item_id.split("/", 1)[1] for entry in coverage]
    return "planned: " + "; ".join(planned)


def _source_span(streams: tuple[Stream, ...], reader: int, span: Span) -> tuple[int, Span] | None:
    """Where the value that `span` repeats was stated first: stream number and span."""
    cue = CUES[span.cue].source if span.owner == reader else span.cue
    for stream in streams:
        if stream.stream_id != reader:
            for other in stream.spans:
                if other.cue == cue and other.owner == stream.stream_id:
                    return stream.stream_id, other
    return None
