"""The procedural teacher: procedural worlds give plan and notes of their documents exactly."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .schema import Document
from .teachers import SECTION_SEPARATOR, Plan, Rejection, SectionNotes, SourceDocument, StreamPlan, TeacherStage
from .worlds import SPLITS, WorldOptions, generate_document

WORLDS_VERSION = 1
"""Raised when the worlds write other documents for the same call."""


def world_sources(
    count: int, world_split: str = "train", start: int = 0, split: str | None = None, **options: Any
) -> Iterator[SourceDocument]:
    """Procedural documents as sources that go to `split`; `options` are those of `WorldOptions`."""
    kind = WorldOptions(**options)
    for index in range(start, start + count):
        document = generate_document(world_split, index, kind, with_notes=False)  # type: ignore[arg-type]
        yield SourceDocument(
            document_id=document.document_id,
            domain=document.domain,
            title="",
            sections=tuple((stream.header, stream.text) for stream in document.streams),
            prompt=document.prompt,
            split=split,
            provenance=json.dumps({"world_split": world_split, "index": index, **asdict(kind)}),
            tags=document.split_tags,
        )


@dataclass(frozen=True)
class WorldsSource:
    """
    Procedural documents.

    Args:
        count (`int`): Number of documents.
        world_split (`str`, *optional*, defaults to `"train"`), start (`int`, *optional*): Which documents.
        options (`dict`): Of `WorldOptions`: `num_streams`, `hard`, `foreign_values`, `heldout_values`,
            `heldout_wordings`, `seed`.
        split (`str`, *optional*): Split that the documents go to; drawn when missing.
    """

    count: int
    world_split: str = "train"
    start: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    split: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("start", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` of a worlds source is {value!r}, must be an int of at least {least}.")
        if self.world_split not in SPLITS:
            allowed = ", ".join(SPLITS)
            raise ValueError(f"`world_split` of a worlds source is {self.world_split!r}, must be one of {allowed}.")
        known = [option.name for option in fields(WorldOptions)]
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise ValueError(f"`options` of a worlds source has the unknown keys {unknown}, must be some of {known}.")
        WorldOptions(**self.options)

    def fingerprint(self) -> Mapping[str, Any]:
        """The call."""
        return {**asdict(self), "version": WORLDS_VERSION}

    def rows(self, max_bytes: int, cache: Path) -> Iterator[SourceDocument]:
        """The documents."""
        return world_sources(self.count, self.world_split, self.start, split=self.split, **self.options)


class ProceduralTeacher:
    """Plans and notes of procedural documents; knows the document behind a source by its `provenance`."""

    concurrency = 1

    def fingerprint(self, stage: TeacherStage) -> Mapping[str, Any]:
        """The version of the worlds."""
        return {"teacher": "procedural", "version": WORLDS_VERSION}

    def estimate(self, source: SourceDocument) -> Mapping[str, float]:
        """Nothing is paid."""
        return {}

    def plan(self, source: SourceDocument) -> Plan:
        """The plan that the document was written to."""
        document = _document(source)
        streams, start = [], 0
        for stream in document.streams:
            streams.append(StreamPlan(stream.header, stream.summary, start, start + len(stream.text)))
            start += len(stream.text) + len(SECTION_SEPARATOR)
        return Plan(document.prompt, document.items, tuple(streams))

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """What every section states."""
        streams = _document(source, with_notes=True).streams
        return tuple(
            SectionNotes(stream.notes.entities, stream.notes.facts, stream.spans, stream.notes.coverage)
            for stream in streams
        )


def _document(source: SourceDocument, with_notes: bool = False) -> Document:
    try:
        call = json.loads(source.provenance)
        split, index = call.pop("world_split"), call.pop("index")
        document = generate_document(split, index, WorldOptions(**call), with_notes=with_notes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Rejection("not_procedural", f"provenance {source.provenance[:80]!r} is no call of the worlds") from error
    if document.document_id != source.document_id:
        raise Rejection("not_procedural", f"the call in provenance makes {document.document_id}")
    return document
