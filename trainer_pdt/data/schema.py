"""Records of the published dataset: a document with its plan, its streams, their spans and their notes.

Text and stable ids only. Token ids, note vectors and slot numbers depend on a tokenizer and a trunk, so they are made
later, in ``trainer_pdt.features``. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NOTES_SCHEMA_VERSION = "2.0"

CoverageStatus = Literal["covered", "partial", "missing"]
CoverageProvenance = Literal["confirmed", "hint"]
SpanKind = Literal["own", "sibling"]


@dataclass(frozen=True)
class PlanItem:
    """One unit of content of the plan.

    Args:
        item_id (`str`): Stable within the document, for example ``"s1/mayor"``.
        text (`str`): What the plan says about it; never contains the fact's value.
        stream (`int`): Index of the stream that owns the item.
    """

    item_id: str
    text: str
    stream: int


@dataclass(frozen=True)
class Span:
    """A stretch of a section's text that states a fact's value.

    Args:
        start (`int`), end (`int`): Character range of the value in the section's text, end exclusive.
        kind (`str`): ``"own"`` where the stream chooses the value, ``"sibling"`` where it repeats a sibling's choice.
        cue (`str`): Fact type, for example ``"mayor"``.
        value (`str`): The value as written.
        item_id (`str`): Plan item that the value belongs to.
        owner (`int`): Stream that owns the fact.
        hops (`int`): 1 for a value that its owner chose freely, 2 for one that the owner itself had to read.
    """

    start: int
    end: int
    kind: SpanKind
    cue: str
    value: str
    item_id: str
    owner: int
    hops: int = 1


@dataclass(frozen=True)
class Entity:
    """ENT record of notes schema 2.0."""

    id: str
    name: str
    type: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """FACT record of notes schema 2.0 with the evidence's character range in the section's text."""

    subj_id: str
    predicate: str
    object: str
    start: int
    end: int
    certainty: float = 1.0


@dataclass(frozen=True)
class Coverage:
    """COVERAGE record of notes schema 2.0: how far the section's text has covered a plan item.

    A status is ``"confirmed"`` by evidence (a span) or by a teacher's judgement; a ``"hint"`` is not supervised.
    """

    item_id: str
    status: CoverageStatus
    provenance: CoverageProvenance = "confirmed"


@dataclass(frozen=True)
class Notes:
    """Notes on one section, or on a prefix of it: entities, facts, coverage, and the same as one line of text."""

    text: str
    entities: tuple[Entity, ...] = ()
    facts: tuple[Fact, ...] = ()
    coverage: tuple[Coverage, ...] = ()


@dataclass(frozen=True)
class NotesSnapshot:
    """Notes as they stand when the section has been written up to character ``end`` (0 = the plan contract)."""

    snapshot_id: int
    end: int
    notes: Notes


@dataclass(frozen=True)
class Stream:
    """One stream of a document.

    Args:
        stream_id (`int`): Position of the section in the answer, from 0.
        header (`str`): Heading line, written by the renderer before the section.
        summary (`str`): One line of the plan about the section.
        text (`str`): The section.
        spans (`tuple[Span]`): Every stated value, in order.
        notes (`Notes`): True notes on the whole section.
        noisy_notes (`tuple[Notes]`): Corrupted variants: facts dropped, swapped or made up.
        snapshots (`tuple[NotesSnapshot]`): Notes by evidence position.
        ready (`tuple[bool]`): Per sibling span, in order: the owner states the value early enough for a lag of one
            round of `round_words` words.
    """

    stream_id: int
    header: str
    summary: str
    text: str
    spans: tuple[Span, ...] = ()
    notes: Notes = field(default_factory=lambda: Notes(""))
    noisy_notes: tuple[Notes, ...] = ()
    snapshots: tuple[NotesSnapshot, ...] = ()
    ready: tuple[bool, ...] = ()

    def with_values(self, replaced: Mapping[int, str]) -> "Stream":
        """The same text with the values of some spans, by their number, replaced; notes stay as they are."""
        text, spans, done = "", [], 0
        for number, span in enumerate(self.spans):
            value = replaced.get(number, span.value)
            text += self.text[done : span.start]
            spans.append(replace(span, start=len(text), end=len(text) + len(value), value=value))
            text += value
            done = span.end
        return replace(self, text=text + self.text[done:], spans=tuple(spans))


@dataclass(frozen=True)
class Document:
    """One example of the published dataset: a prompt, a plan and the sections that were written for it.

    Args:
        document_id (`str`): Stable id; splits are made by it before any augmentation.
        domain (`str`): World or source the document belongs to.
        split_tags (`tuple[str]`): Subset of ``"core"``, ``"hard"``, ``"foreign_values"``, ``"heldout_values"``,
            ``"heldout_wordings"``.
        prompt (`str`): The request, without the plan.
        items (`tuple[PlanItem]`): Plan items of all streams in stream order.
        streams (`tuple[Stream]`): In the order of the answer.
    """

    document_id: str
    domain: str
    split_tags: tuple[str, ...]
    prompt: str
    items: tuple[PlanItem, ...]
    streams: tuple[Stream, ...]
    schema_version: str = NOTES_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as `datasets` stores them."""
        return to_plain(self)


def to_plain(value: Any) -> Any:
    """A record without its classes; `dataclasses.asdict` also copies what cannot change, at several times the cost."""
    # Most entries are scalars: a call for each would take most of the time.
    if isinstance(value, tuple):
        return [entry if type(entry) in _SCALARS else to_plain(entry) for entry in value]
    if hasattr(value, "__dict__"):
        return {name: entry if type(entry) in _SCALARS else to_plain(entry) for name, entry in vars(value).items()}
    return value


_SCALARS = frozenset((str, int, float, bool))
