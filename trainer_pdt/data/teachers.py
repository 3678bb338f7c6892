"""What a teacher is: it plans a source document and takes notes on its sections. Standard library only.

A teacher turns a [`SourceDocument`] into a [`Plan`] (stage ``"plans"``) and then into the notes of every section
(stage ``"notes"``). Everything else - validation, noisy variants, snapshots, coverage, splits - is the pipeline's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .schema import Coverage, Entity, Fact, PlanItem, Span

TeacherStage = Literal["plans", "notes"]

SECTION_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class SourceDocument:
    """A document as a source gives it, before any teacher has seen it.

    Args:
        document_id (`str`): Unique in the dataset, stable between runs; holds letters, digits and ``._:-`` only.
        domain (`str`): Kind of document, for example ``"wikipedia"``; splits and reports are told apart by it.
        title (`str`): Title, may be empty.
        sections (`tuple[tuple[str, str]]`): (header, text) in reading order; a source without headings gives one
            section with an empty header. Texts are free of surrounding space and not empty.
        prompt (`str`, *optional*): The request where the source has one (a question); otherwise the teacher writes it.
        split (`str`, *optional*): Split that the source prescribes; otherwise it is drawn.
        provenance (`str`): Where it came from: file and row, dataset and row; for procedural documents the call that
            makes it, as JSON.
        tags (`tuple[str]`): `split_tags` of the published document.
    """

    document_id: str
    domain: str
    title: str
    sections: tuple[tuple[str, str], ...]
    prompt: str | None = None
    split: str | None = None
    provenance: str = ""
    tags: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The texts of the sections without their headers, joined by `SECTION_SEPARATOR`."""
        return SECTION_SEPARATOR.join(text for _, text in self.sections)


@dataclass(frozen=True)
class StreamPlan:
    """The plan of one stream: what its section is called, what it is about, and where it stands in the source.

    Args:
        header (`str`): Heading, one line.
        summary (`str`): One line about the section.
        start (`int`), end (`int`): Character range in [`SourceDocument.text`], end exclusive: the section's text.
    """

    header: str
    summary: str
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """The plan of a document.

    Args:
        prompt (`str`): The request, without the plan.
        items (`tuple[PlanItem]`): Of all streams, in stream order. Ids look like ``"s1/mayor"``; texts name what is to
            be said and never hold a fact's value.
        streams (`tuple[StreamPlan]`): 2 to 8, in the order of the answer; their ranges do not overlap.
    """

    prompt: str
    items: tuple[PlanItem, ...]
    streams: tuple[StreamPlan, ...]


@dataclass(frozen=True)
class SectionNotes:
    """What a teacher notes about one finished section. All character ranges count in the section's text.

    Args:
        entities (`tuple[Entity]`): Ids are unique in the document: the same entity has the same id in every section.
        facts (`tuple[Fact]`): `subj_id` is the id of an entity of the document; `start..end` is the evidence.
        spans (`tuple[Span]`): Stated values in order of `start`, not overlapping; ``text[start:end] == value``.
            `item_id` is an item of the plan, `owner` that item's stream. ``"own"`` where the owner states it,
            ``"sibling"`` where another section repeats it.
        coverage (`tuple[Coverage]`): Statuses of the stream's own items that the teacher judged itself. The pipeline
            adds the others: an item with a span is covered (confirmed by its evidence), any other one is missing (a
            mere hint, which is not supervised).
    """

    entities: tuple[Entity, ...] = ()
    facts: tuple[Fact, ...] = ()
    spans: tuple[Span, ...] = ()
    coverage: tuple[Coverage, ...] = ()


class Rejection(Exception):
    """A document that cannot be used; the pipeline records it and goes on.

    Any other exception stops the build; what is finished stays, and a rerun continues there.

    Args:
        reason (`str`): Stable short name in snake case, counted in manifests and reports: ``"too_few_sections"``.
        detail (`str`): One sentence for people.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Teacher(Protocol):
    """Plans documents and takes notes. Picklable: worker processes get copies.

    The answers must be functions of the arguments and of what `fingerprint` tells: a rerun takes finished shards as
    they are.
    """

    @property
    def concurrency(self) -> int:
        """Documents in flight at a time: 1 for a teacher that computes (it is spread over worker processes), more for
        one that waits for a server (it is called from so many threads of one process)."""

    def fingerprint(self, stage: TeacherStage) -> Mapping[str, Any]:
        """Everything that changes the teacher's output in a stage, JSON-able; a change redoes that stage."""

    def estimate(self, source: SourceDocument) -> Mapping[str, float]:
        """Expected use of plan and notes of one document, summed up by a dry run, for example ``requests``,
        ``input_tokens``, ``output_tokens``, ``cost_usd``; empty where nothing is paid."""

    def plan(self, source: SourceDocument) -> Plan:
        """The plan of a document. Raises [`Rejection`]."""

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """The notes of every stream of a validated plan, in order. Raises [`Rejection`]."""
