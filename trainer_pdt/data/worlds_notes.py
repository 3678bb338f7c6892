"""Notes of procedural documents: what a section states, corrupted notes."""

import random
from dataclasses import replace

from .notes import ROUND_WORDS, annotate_streams, notes_line
from .schema import Coverage, Document, Entity, Fact, Notes, PlanItem, Stream
from .teachers import SectionNotes
from .worlds_lexicon import CUES, PERSON, values_of

SUBJECT_ID = "e0"

CORRUPTIONS = ("drop", "swap", "hallucinate")


def annotate(document: Document, subject: str, rng: random.Random, round_words: int = ROUND_WORDS) -> Document:
    """The document with notes, noisy notes (one per entry of `CORRUPTIONS`), snapshots and readiness labels."""
    sections = _all_section_notes(document, subject)
    streams = annotate_streams(document.streams, document.items, sections, round_words)
    noisy = (tuple(corrupt(stream.notes, kind, rng) for kind in CORRUPTIONS) for stream in streams)
    return replace(
        document,
        streams=tuple(replace(stream, noisy_notes=notes) for stream, notes in zip(streams, noisy, strict=True)),
    )


def _all_section_notes(document: Document, subject: str) -> tuple[SectionNotes, ...]:
    """What every section states: the subject and persons, a fact per span, items that nobody states."""
    persons = dict.fromkeys(
        span.value for stream in document.streams for span in stream.spans if CUES[span.cue].value_type == PERSON
    )
    ids = {name: f"e{number}" for number, name in enumerate(persons, start=1)}
    return tuple(_section_notes(stream, document.items, subject, document.domain, ids) for stream in document.streams)


def _section_notes(
    stream: Stream, items: tuple[PlanItem, ...], subject: str, domain: str, ids: dict[str, str]
) -> SectionNotes:
    told = {span.item_id for span in stream.spans}
    named = dict.fromkeys(span.value for span in stream.spans if span.value in ids)
    return SectionNotes(
        entities=(Entity(SUBJECT_ID, subject, domain), *(_person(ids[name], name) for name in named)),
        facts=tuple(Fact(SUBJECT_ID, span.cue, span.value, span.start, span.end) for span in stream.spans),
        spans=stream.spans,
        coverage=tuple(
            Coverage(item.item_id, "missing")
            for item in items
            if item.stream == stream.stream_id and item.item_id not in told
        ),
    )


def _person(entity_id: str, name: str) -> Entity:
    return Entity(entity_id, name, PERSON, (name.split()[-1],))


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
        text=notes_line(facts, [entry.item_id.split("/", 1)[1] for entry in notes.coverage]),
        entities=_entities(notes, facts),
        facts=tuple(facts),
    )


def _entities(notes: Notes, facts: list[Fact]) -> tuple[Entity, ...]:
    """The subject and every person that `facts` name; a made-up person gets an id of its own."""
    known = {entity.name: entity for entity in notes.entities}
    persons = dict.fromkeys(fact.object for fact in facts if CUES[fact.predicate].value_type == PERSON)
    return (notes.entities[0], *(known.get(name) or _person(f"{SUBJECT_ID}/{name}", name) for name in persons))
