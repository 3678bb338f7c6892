"""A teacher that says again what the original system's teacher said, as far as it can be found in the text.

Standard library only.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .extractive import StatedItem, choose_items, item_text, stated_spans, written_request
from .original import ORIGINAL_VERSION, contract_items
from .schema import Coverage, Entity, Fact, PlanItem
from .statements import Statement, whole_value
from .teachers import (
    SECTION_SEPARATOR,
    Plan,
    Rejection,
    SectionNotes,
    SourceDocument,
    StreamPlan,
    TeacherStage,
)

_COVER = re.compile(r"^COVER::|::\w+$")


@dataclass(frozen=True)
class OriginalTeacher:
    """
    Plans and notes of documents that come from the source `original_kd` or `original_parquet`.

    A fact whose object stands word for word in its section becomes an item of the plan and a span; other sections that
    repeat the object repeat a sibling's fact. Contracts of the plan stay items; how they are covered is a hint, unless
    the record calls it confirmed.

    Args:
        max_items (`int`, *optional*, defaults to 4): Most facts per stream; those that siblings repeat go first.
    """

    max_items: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.max_items <= 64:
            raise ValueError(f"max_items is {self.max_items!r}, must be 1 to 64.")

    @property
    def concurrency(self) -> int:
        """One document at a time: this teacher computes."""
        return 1

    def fingerprint(self, stage: TeacherStage) -> Mapping[str, Any]:
        """Options and version."""
        return {"teacher": "original", "version": ORIGINAL_VERSION, "max_items": self.max_items}

    def estimate(self, source: SourceDocument) -> Mapping[str, float]:
        """Nothing is paid again."""
        return {}

    def plan(self, source: SourceDocument) -> Plan:
        """The record's streams, what it asked them to note, and the facts that can be found."""
        record = _record(source)
        streams, start = [], 0
        for (header, text), entry in zip(source.sections, record["plan"], strict=True):
            streams.append(StreamPlan(header, entry["summary"], start, start + len(text)))
            start += len(text) + len(SECTION_SEPARATOR)
        prompt = source.prompt or written_request(source, streams)
        items = [
            PlanItem(item.item_id, item_text(item.statement), item.owner)
            for item in self._items(source, prompt, record)
        ]
        return Plan(prompt, (*contract_items(record["plan"]), *items), tuple(streams))

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """The record's entities, found facts, and statuses of what was asked for."""
        record = _record(source)
        named = {item.item_id for item in plan.items}
        items = [item for item in self._items(source, plan.prompt, record) if item.item_id in named]
        facts = {_cue(fact, names): (fact, names) for fact, names in _facts(record)}
        entities = _entities(record)
        sections = []
        for number in range(len(plan.streams)):
            spans = sorted(stated_spans(items, number), key=lambda span: span.start)
            noted = []
            for span in spans:
                fact, names = facts[span.cue]
                subject = entities[_key(names[fact["subj_id"]])]
                certainty = fact["certainty"]
                noted.append(Fact(subject.id, fact["predicate"], span.value, span.start, span.end, certainty))
            used = {fact.subj_id for fact in noted}
            known = tuple(entity for entity in entities.values() if entity.id in used)
            sections.append(SectionNotes(known, tuple(noted), tuple(spans), _coverage(record, number)))
        return tuple(sections)

    def _items(self, source: SourceDocument, prompt: str, record: Mapping[str, Any]) -> list[StatedItem]:
        texts = [text for _, text in source.sections]
        told = [prompt, source.title, *(header for header, _ in source.sections)]
        told += [item.text for item in contract_items(record["plan"])]
        found: list[list[Statement]] = [[] for _ in texts]
        for number, notes in enumerate(record["notes"]):
            names = {entity["id"]: entity["name"] for entity in notes["ENT"]}
            for fact in notes["FACT"]:
                if fact["subj_id"] not in names:
                    raise Rejection("unknown_entity", f"stream {number}: subject {fact['subj_id']!r}")
                statement = _statement(fact, names, texts[number])
                if statement is not None:
                    found[number].append(statement)
        return choose_items(found, texts, told, self.max_items)


def _record(source: SourceDocument) -> dict[str, Any]:
    try:
        record = json.loads(source.provenance)
        streams = len(record["plan"])
    except (ValueError, TypeError, KeyError) as error:
        raise Rejection("not_original", f"provenance {source.provenance[:80]!r} is no record") from error
    if streams != len(source.sections):
        raise Rejection("section_count", f"{len(source.sections)} sections are left of {streams} that were planned")
    return record


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Facts of all streams, last first so that a mapping keeps the owner's, with names of entities by id."""
    for notes in reversed(record["notes"]):
        names = {entity["id"]: entity["name"] for entity in notes["ENT"]}
        yield from ((fact, names) for fact in reversed(notes["FACT"]))


def _cue(fact: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """What a fact is about: its predicate and subject in words."""
    return " ".join(f"{fact['predicate']} of {names[fact['subj_id']]}".replace("_", " ").replace("/", " ").split())


def _statement(fact: Mapping[str, Any], names: Mapping[str, str], text: str) -> Statement | None:
    """Where the section states a fact: in its evidence, else anywhere; `None` if its object is not there."""
    value = fact["object"].strip()
    start = text.find(fact["evidence"]) if fact["evidence"] else -1
    found = value and (
        (whole_value(value).search(text, start, start + len(fact["evidence"])) if start >= 0 else None)
        or whole_value(value).search(text)
    )
    if not found:
        return None
    return Statement("attribute", _cue(fact, names), value, found.start(), found.end(), fact["evidence"], "")


def _key(name: str) -> str:
    return " ".join(name.lower().split())


def _entities(record: Mapping[str, Any]) -> dict[str, Entity]:
    """Entities of the document by name; the original numbers those of every stream anew."""
    found: dict[str, Entity] = {}
    for notes in record["notes"]:
        for entity in notes["ENT"]:
            aliases = tuple(entity["aliases"])
            found.setdefault(_key(entity["name"]), Entity(f"e{len(found)}", entity["name"], entity["type"], aliases))
    return found


def _coverage(record: Mapping[str, Any], number: int) -> tuple[Coverage, ...]:
    """Statuses of a stream's contracts; an unknown one is left for the pipeline to refuse."""
    statuses = {
        _key(_COVER.sub("", one["plan_item_id"])): one["status"] for one in record["notes"][number]["COVERAGE"]
    }
    provenance = "confirmed" if record["confirmed"] else "hint"
    return tuple(
        Coverage(item.item_id, statuses[_key(item.text)], provenance)  # type: ignore[arg-type]
        for item in contract_items(record["plan"])
        if item.stream == number and _key(item.text) in statuses
    )
