"""The extractive teacher: any text with sections becomes streams, a plan and notes, by rules and without a network.

Sections are grouped into streams of similar length. A fact belongs to the first stream that states it; where another
one repeats the value, it repeats its sibling's fact. What is found is stated word for word, so every item of the plan
has its evidence; what request, title, headings or other items already tell is no fact. Standard library only.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .schema import Entity, Fact, PlanItem, Span
from .statements import (
    KINDS,
    Statement,
    content_words,
    cut_at_sentence,
    find_statements,
    find_whole,
    split_sentences,
    whole_value,
)
from .teachers import (
    SECTION_SEPARATOR,
    Plan,
    Rejection,
    SectionNotes,
    SourceDocument,
    StreamPlan,
    TeacherStage,
)

RULES_VERSION = 1
"""Raised when a rule changes what is found, so that finished stages are done again."""

MIN_STREAMS, MAX_STREAMS = 2, 8
MAX_HEADER, MAX_SUMMARY = 80, 160

REQUESTS = (
    "Describe {title} in {count} sections.",
    "Write about {title} in {count} parts.",
    "Explain {title}. Use {count} sections.",
)
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight")

ITEM_TEXTS = {
    "field": "{cue}",
    "attribute": "the {cue}",
    "definition": "the {cue}",
    "version": "the {cue}",
    "date": "the time: {cue}",
    "quantity": "the {cue}",
    "name": "the name: {cue}",
    "identifier": "the identifier: {cue}",
}

_ORGANISATION = re.compile(
    r"\b(?:Association|Company|Corporation|Foundation|Group|Inc|Institute|Laboratory|University)\b"
)


@dataclass(frozen=True)
class StatedItem:
    """A statement that the plan names: its owner, and (stream, start) of every repetition by a sibling."""

    statement: Statement
    owner: int
    repeats: tuple[tuple[int, int], ...]

    @property
    def item_id(self) -> str:
        """Owner and cue."""
        return f"s{self.owner}/{self.statement.cue}"


@dataclass(frozen=True)
class ExtractiveTeacher:
    """
    A [`Teacher`] that finds what a text states. Offline, exact about evidence, blind to what no rule describes.

    Args:
        max_streams (`int`, *optional*, defaults to 8): Most streams per document, 2 to 8.
        min_section_words (`int`, *optional*, defaults to 20): Fewest words of a stream's section.
        max_section_words (`int`, *optional*, defaults to 160): Most words of a stream's section; what follows in the
            source is left out, at the end of a sentence where there is one.
        max_items (`int`, *optional*, defaults to 4): Most plan items per stream; facts that siblings repeat go first.
        min_repeats (`int`, *optional*, defaults to 0): Fewest repetitions of siblings' facts in a document.
    """

    max_streams: int = MAX_STREAMS
    min_section_words: int = 20
    max_section_words: int = 160
    max_items: int = 4
    min_repeats: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_streams": (MIN_STREAMS, MAX_STREAMS),
            "min_section_words": (1, self.max_section_words),
            "max_section_words": (1, 100_000),
            "max_items": (1, 64),
            "min_repeats": (0, 1000),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {low} to {high}.")

    @property
    def concurrency(self) -> int:
        """One document at a time: this teacher computes."""
        return 1

    def fingerprint(self, stage: TeacherStage) -> Mapping[str, Any]:
        """All options and the version of the rules."""
        return {"teacher": "extractive", "rules": RULES_VERSION, **asdict(self)}

    def estimate(self, source: SourceDocument) -> Mapping[str, float]:
        """Nothing is paid."""
        return {}

    def plan(self, source: SourceDocument) -> Plan:
        """
        Streams, request and items of a document.

        Raises:
            [`Rejection`]: `too_few_sections`, `too_short`, `too_few_facts`, `too_few_repeats`.
        """
        sections, text = self._sections(source), source.text
        if len(sections) < MIN_STREAMS:
            raise Rejection("too_few_sections", f"{len(sections)} section(s) with text, must be {MIN_STREAMS}.")
        reason = ("too_short", f"no grouping gives every stream {self.min_section_words} words.")
        for count in range(min(self.max_streams, len(sections)), MIN_STREAMS - 1, -1):
            streams = self._streams(source, sections, count)
            if any(len(text[s.start : s.end].split()) < self.min_section_words for s in streams):
                continue
            prompt = source.prompt or written_request(source, streams)
            items = self._items(source, prompt, streams)
            owners = {item.owner for item in items}
            if len(owners) < count:
                reason = ("too_few_facts", "with every grouping some stream states no fact of its own.")
                continue
            if sum(len(item.repeats) for item in items) < self.min_repeats:
                raise Rejection("too_few_repeats", f"fewer than {self.min_repeats} facts are repeated by a sibling.")
            plan_items = tuple(PlanItem(item.item_id, item_text(item.statement), item.owner) for item in items)
            values = [item.statement.value for item in items]
            told = tuple(StreamPlan(s.header, _mask(s.summary, values), s.start, s.end) for s in streams)
            return Plan(prompt, plan_items, told)
        raise Rejection(*reason)

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """Entities, facts and spans of every stream; an item that the plan does not name any more is left out."""
        named = {item.item_id for item in plan.items}
        items = [item for item in self._items(source, plan.prompt, plan.streams) if item.item_id in named]
        entities = _entities(source, items)
        sections = []
        for number in range(len(plan.streams)):
            spans = sorted(stated_spans(items, number), key=lambda span: span.start)
            subjects = {item.item_id: _subject(item, entities) for item in items}
            facts = tuple(Fact(subjects[s.item_id], s.cue, s.value, s.start, s.end) for s in spans)
            known = {"e0", *(fact.subj_id for fact in facts)}
            used = tuple(e for e in entities.values() if e.id in known or e.name in {s.value for s in spans})
            sections.append(SectionNotes(used, facts, tuple(spans)))
        return tuple(sections)

    def _sections(self, source: SourceDocument) -> list[tuple[str, int, int]]:
        """(header, start, end) of sections from the start of a document, as many as the streams can hold."""
        found, start, words = [], 0, 0
        for header, text in source.sections:
            if words >= self.max_streams * self.max_section_words:
                break
            found.append((header, start, start + len(text)))
            words += len(text.split())
            start += len(text) + len(SECTION_SEPARATOR)
        return found

    def _streams(
        self, source: SourceDocument, sections: Sequence[tuple[str, int, int]], count: int
    ) -> tuple[StreamPlan, ...]:
        text = source.text
        weights = [len(text[start:end].split()) for _, start, end in sections]
        streams, seen = [], set()
        for first, last in group_evenly(weights, count):
            headers = dict.fromkeys(header for header, _, _ in sections[first : last + 1] if header)
            header = _shorten(", ".join(headers) or f"Part {len(streams) + 1}", MAX_HEADER)
            header = header if header.lower() not in seen else f"{header} ({len(streams) + 1})"
            seen.add(header.lower())
            start = sections[first][1]
            end = start + cut_at_sentence(text[start : sections[last][2]], self.max_section_words)
            lead = next((sentence for _, sentence in split_sentences(text[start:end])), "")
            streams.append(StreamPlan(header, _shorten(lead, MAX_SUMMARY), start, end))
        return tuple(streams)

    def _items(self, source: SourceDocument, prompt: str, streams: Sequence[StreamPlan]) -> list[StatedItem]:
        """The facts that the plan names, in stream order and then in order of the text."""
        text = source.text
        texts = [text[stream.start : stream.end] for stream in streams]
        told = [prompt, source.title, *(stream.header for stream in streams)]
        return choose_items([find_statements(part) for part in texts], texts, told, self.max_items)


def choose_items(
    found: Sequence[Sequence[Statement]], texts: Sequence[str], told: Sequence[str], max_items: int
) -> list[StatedItem]:
    """
    The statements that a plan names, in stream order and then in order of the text.

    Args:
        found (`Sequence[Sequence[Statement]]`): Statements by stream; the first stream that states a fact owns it.
        texts (`Sequence[str]`): The streams' sections.
        told (`Sequence[str]`): What is known before anything is written; a value that stands there is no fact.
        max_items (`int`): Most items per stream; facts that siblings repeat go first.
    """
    chosen: list[StatedItem] = []
    for owner, statements in enumerate(found):
        candidates = []
        for statement in statements:
            places = {n: _repetition(statement, other) for n, other in enumerate(texts) if n != owner}
            repeats = tuple((n, place) for n, place in places.items() if place is not None)
            if not any(n < owner for n, _ in repeats):
                candidates.append(StatedItem(statement, owner, repeats))
        candidates.sort(key=lambda i: (-len(i.repeats), KINDS.index(i.statement.kind), i.statement.start))
        own: list[StatedItem] = []
        for item in candidates:
            if len(own) < max_items and _is_new(item.statement, [i.statement for i in chosen + own], told):
                own.append(item)
        chosen += sorted(own, key=lambda item: item.statement.start)
    return chosen


def group_evenly(weights: Sequence[int], count: int) -> list[tuple[int, int]]:
    """
    Contiguous groups whose sums are as even as they can be (least sum of squares).

    Args:
        weights (`Sequence[int]`): One number per section, for example its words.
        count (`int`): Groups, 1 to `len(weights)`.

    Returns:
        `list[tuple[int, int]]`: First and last index of every group.
    """
    if not 1 <= count <= len(weights):
        raise ValueError(f"count is {count}, must be 1 to {len(weights)}, the number of weights.")
    totals = [0]
    for weight in weights:
        totals.append(totals[-1] + weight)
    best: dict[int, tuple[int, list[int]]] = {end: (total**2, [0]) for end, total in enumerate(totals) if end}
    for groups in range(2, count + 1):
        best = {
            end: min(
                (best[cut][0] + (totals[end] - totals[cut]) ** 2, [*best[cut][1], cut])
                for cut in range(groups - 1, end)
            )
            for end in range(groups, len(weights) + 1)
        }
    starts = [*best[len(weights)][1], len(weights)]
    return [(first, after - 1) for first, after in pairwise(starts)]


def _shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0].rstrip(" ,;:") + " ..."


def _mask(text: str, values: Sequence[str]) -> str:
    """The text with dots instead of values, longest first."""
    for value in sorted(values, key=len, reverse=True):
        text = whole_value(value).sub("...", text)
    return text


def written_request(source: SourceDocument, streams: Sequence[StreamPlan]) -> str:
    """A request that the document would answer."""
    title = source.title or streams[0].header
    choice = hashlib.sha256(source.document_id.encode()).digest()[0] % len(REQUESTS)
    return REQUESTS[choice].format(title=title, count=NUMBER_WORDS[len(streams) - MIN_STREAMS])


def item_text(statement: Statement) -> str:
    """What a plan says about a statement."""
    return ITEM_TEXTS[statement.kind].format(cue=statement.cue)


def _repetition(statement: Statement, text: str) -> int | None:
    """Where another section repeats a value. A number has to stand in a sentence that shares a word with its cue."""
    words = set(content_words(statement.cue))
    for found in whole_value(statement.value).finditer(text):
        if statement.kind in ("name", "identifier", "definition") or (
            statement.kind in ("field", "attribute") and statement.value[0].isupper()
        ):
            return found.start()
        start = max(text.rfind(". ", 0, found.start()), text.rfind("\n", 0, found.start())) + 1
        end = min(
            place for place in (text.find(". ", found.end()), text.find("\n", found.end()), len(text)) if place >= 0
        )
        if words & set(content_words(text[start:end])):
            return found.start()
    return None


def _is_new(statement: Statement, chosen: Sequence[Statement], told: Sequence[str]) -> bool:
    """Whether nothing told or planned holds the value, no chosen value is in its cue, and cue and value are unused."""
    value, own_text = statement.value, item_text(statement)
    plan_texts = [*told, *(item_text(other) for other in chosen)]
    if value.lower() in own_text.lower() or any(_tells(text, value) for text in plan_texts):
        return False
    return not any(
        other.cue == statement.cue or other.value == value or _tells(own_text, other.value) for other in chosen
    )


def _tells(text: str, value: str) -> bool:
    return find_whole(value.lower(), text.lower()) >= 0


def stated_spans(items: Sequence[StatedItem], stream: int) -> list[Span]:
    """Values that a stream states itself, then those that it repeats where they do not overlap others."""
    spans: list[Span] = []
    for item in items:
        s = item.statement
        if item.owner == stream:
            spans.append(Span(s.start, s.end, "own", s.cue, s.value, item.item_id, stream))
    for item in items:
        s = item.statement
        for place in (place for reader, place in item.repeats if reader == stream):
            end = place + len(s.value)
            if all(end <= other.start or place >= other.end for other in spans):
                spans.append(Span(place, end, "sibling", s.cue, s.value, item.item_id, item.owner))
    return spans


def _entities(source: SourceDocument, items: Sequence[StatedItem]) -> dict[str, Entity]:
    """By name: the document's subject as ``e0``, then what definitions define and names that are facts."""
    entities = {source.title: Entity("e0", source.title or source.document_id, source.domain)}
    for item in items:
        s = item.statement
        named = s.kind == "name" or (s.kind == "attribute" and s.value[0].isupper())
        name, kind = (s.subject, "term") if s.subject else (s.value, _entity_type(s)) if named else ("", "")
        if name and name not in entities:
            alias = re.search(rf"{re.escape(name)} \(([A-Z][A-Za-z]{{1,9}})\)", s.sentence)
            entities[name] = Entity(f"e{len(entities)}", name, kind, (alias.group(1),) if alias else ())
    return entities


def _entity_type(statement: Statement) -> str:
    if _ORGANISATION.search(statement.value):
        return "organisation"
    is_person = statement.cue.endswith(" by") and 2 <= len(statement.value.split()) <= 3
    return "person" if is_person else "name"


def _subject(item: StatedItem, entities: Mapping[str, Entity]) -> str:
    return (
        entities[item.statement.subject].id if item.statement.subject in entities and item.statement.subject else "e0"
    )
