"""The procedural teacher: procedural worlds give plan and notes of their documents exactly."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from .schema import Document
from .teachers import SECTION_SEPARATOR, Plan, Rejection, SectionNotes, SourceDocument, StreamPlan, TeacherStage
from .worlds import WorldOptions, generate_document

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
