"""Second pass over notes: variants in which facts are lost, told in other words, or wrong. Standard library only.

A change shows in FACT, in ENT and in the line of text alike; COVERAGE stays what the text says. Draws depend on the
seed, the document, the stream and the variant, never on other documents' draws or on the order of work.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .notes import notes_line
from .options import NotesOptions
from .schema import Document, Entity, Fact, Notes, PlanItem, Stream

WRONG_CERTAINTY = 0.5
"""Certainty of a fact that a noisy variant made up."""

Pool = Mapping[str, Sequence[str]]


def collect_objects(documents: Iterable[Document]) -> dict[str, tuple[str, ...]]:
    """Objects of facts by predicate: what a made-up fact may say."""
    found: dict[str, set[str]] = {}
    for document in documents:
        for fact in (fact for stream in document.streams for fact in stream.notes.facts):
            found.setdefault(fact.predicate, set()).add(fact.object)
    return {predicate: tuple(sorted(objects)) for predicate, objects in sorted(found.items())}


def noisy_notes(document: Document, pool: Pool, options: NotesOptions) -> list[tuple[Notes, ...]]:
    """`options.noisy_variants` noisy notes per stream of a document."""
    wordings = {span.item_id: span for stream in document.streams for span in stream.spans}
    words = {wordings[item.item_id].cue: item.text for item in document.items if item.item_id in wordings}
    made = []
    for stream in document.streams:
        variants = []
        for variant in range(options.noisy_variants):
            key = f"{options.noisy_seed}/{document.document_id}/{stream.stream_id}/{variant}"
            variants.append(_noisy(stream, document.items, words, pool, options, random.Random(key)))
        made.append(tuple(variants))
    return made


def _noisy(
    stream: Stream,
    items: Sequence[PlanItem],
    words: Mapping[str, str],
    pool: Pool,
    options: NotesOptions,
    rng: random.Random,
) -> Notes:
    """One variant. Every fact draws the same numbers, whatever the probabilities."""
    notes = stream.notes
    entities = {entity.id: entity for entity in notes.entities}
    facts: list[Fact] = []
    for fact in notes.facts:
        lost, wrong, told, choice = (rng.random() for _ in range(4))
        if lost < options.noisy_drop:
            continue
        if wrong < options.noisy_hallucinate:
            others = [value for value in pool.get(fact.predicate, ()) if value != fact.object]
            fact = _wrong(fact, others[int(choice * len(others))], entities) if others else fact
        if told < options.noisy_paraphrase:
            fact = _paraphrased(fact, words, entities)
        facts.append(fact)
    if options.noisy_shuffle:
        rng.shuffle(facts)
    planned = [item.text for item in items if item.stream == stream.stream_id]
    if any(fact not in notes.facts for fact in facts) or len(facts) < len(notes.facts):
        kept = tuple(entity for entity in entities.values() if _is_named(entity, facts, notes))
    else:
        kept = notes.entities
    return replace(notes, text=notes_line(facts, planned), entities=kept, facts=tuple(facts))


def _wrong(fact: Fact, value: str, entities: dict[str, Entity]) -> Fact:
    """The fact with another value; an entity that the value names takes part under an id of its own."""
    told = next((entity for entity in entities.values() if fact.object in (entity.name, *entity.aliases)), None)
    if told is not None and told.id != fact.subj_id:
        made_up = Entity(f"{told.id}/{value}", value, told.type)
        entities[made_up.id] = made_up
    return replace(fact, object=value, certainty=WRONG_CERTAINTY)


def _paraphrased(fact: Fact, words: Mapping[str, str], entities: dict[str, Entity]) -> Fact:
    """The fact with the plan's words as predicate, and an entity that it names under its alias."""
    for entity in list(entities.values()):
        if entity.name == fact.object and entity.aliases:
            alias, *others = entity.aliases
            entities[entity.id] = replace(entity, name=alias, aliases=(entity.name, *others))
            fact = replace(fact, object=alias)
    return replace(fact, predicate=words.get(fact.predicate, fact.predicate))


def _is_named(entity: Entity, facts: Sequence[Fact], notes: Notes) -> bool:
    """Whether a fact is about the entity or names it; one that no true fact knew either stays."""
    names = (entity.name, *entity.aliases)

    def known(candidates: Sequence[Fact]) -> bool:
        return any(fact.subj_id == entity.id or fact.object in names for fact in candidates)

    return known(facts) or not known(notes.facts)
