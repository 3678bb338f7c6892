"""Documents as KD records, the form in which the original system trained: one record per stream.

Token ids and note vectors, which its records also held, depend on a tokenizer and a trunk and are left out. Standard
library only.
"""

from collections.abc import Iterator
from typing import Any

from .schema import Document, Notes, Stream
from .teachers import SECTION_SEPARATOR

COVERAGE_SCORES = {"covered": 1.0, "partial": 0.5, "missing": 0.0}


def kd_records(document: Document, split: str) -> Iterator[dict[str, Any]]:
    """
    The records of a document. They share what is said about the document and differ in the stream and its notes.

    Args:
        document ([`Document`]): The document.
        split (`str`): Its split.
    """
    starts, text = [], ""
    for stream in document.streams:
        text += SECTION_SEPARATOR if starts else ""
        starts.append(len(text))
        text += stream.text
    noted = [_notes(document, s, s.notes, start) for s, start in zip(document.streams, starts, strict=True)]
    metadata = {
        "document_text": text,
        "document_paragraphs": [stream.text for stream in document.streams],
        "teacher_plan": {
            "plan": [_planned(document, s, start) for s, start in zip(document.streams, starts, strict=True)],
            "segments": [
                {"stream": _name(s), "paragraph_start": s.stream_id, "paragraph_end": s.stream_id + 1}
                for s in document.streams
            ],
        },
        "teacher_notes": {
            _name(s): [f"{fact.predicate}: {fact.object}" for fact in s.notes.facts] for s in document.streams
        },
        "notes_versioned": list(_versions(document, starts)),
        "sectional_independence": not any(span.kind == "sibling" for s in document.streams for span in s.spans),
        "coverage_provenance": _provenance(document),
    }
    for stream in document.streams:
        yield {
            "example_id": f"{document.document_id}:{_name(stream)}",
            "sample_id": document.document_id,
            "domain": document.domain,
            "split": split,
            "stream_id": _name(stream),
            "notes_schema_version": document.schema_version,
            "notes_text": stream.notes.text,
            "metadata": metadata,
            "true_notes": noted,
        }


def _name(stream: Stream) -> str:
    return f"stream_{stream.stream_id + 1}"


def _planned(document: Document, stream: Stream, start: int) -> dict[str, Any]:
    return {
        "stream_id": _name(stream),
        "header": stream.header,
        "summary": stream.summary,
        "notes": [item.text for item in document.items if item.stream == stream.stream_id],
        "section_contract": {"type": "source_slice", "start_idx": start, "end_idx": start + len(stream.text)},
    }


def _notes(document: Document, stream: Stream, notes: Notes, start: int) -> dict[str, Any]:
    """Notes schema 2.0; evidence counts in the document's text, and coverage names items by their texts."""
    texts = {item.item_id: item.text for item in document.items}
    return {
        "stream_id": _name(stream),
        "ENT": [
            {"id": e.id, "name": e.name, "aliases": list(e.aliases), "type": e.type, "canonical": e.name}
            for e in notes.entities
        ],
        "FACT": [
            {
                "subj_id": fact.subj_id,
                "predicate": fact.predicate,
                "object": fact.object,
                "evidence_span": {
                    "start": start + fact.start,
                    "end": start + fact.end,
                    "text": stream.text[fact.start : fact.end],
                },
                "certainty": fact.certainty,
            }
            for fact in notes.facts
        ],
        "COVERAGE": [{"plan_item_id": texts[one.item_id], "status": one.status} for one in notes.coverage],
    }


def _versions(document: Document, starts: list[int]) -> Iterator[dict[str, Any]]:
    """Notes of all streams as they stand after a round; a stream that is finished keeps its last ones."""
    for version in sorted({snapshot.snapshot_id for stream in document.streams for snapshot in stream.snapshots}):
        told, scores = {}, {}
        for stream, start in zip(document.streams, starts, strict=True):
            known = [snapshot.notes for snapshot in stream.snapshots if snapshot.snapshot_id <= version]
            told[_name(stream)] = _notes(document, stream, known[-1], start)
            marks = [COVERAGE_SCORES[entry.status] for entry in known[-1].coverage]
            scores[_name(stream)] = sum(marks) / max(1, len(marks))
        source = "plan_contract" if version == 0 else "evidence"
        yield {"version": version, "source": source, "stream_notes": told, "coverage": scores}


def _provenance(document: Document) -> dict[str, Any]:
    hints = any(entry.provenance == "hint" for stream in document.streams for entry in stream.notes.coverage)
    strength = "hint" if hints else "confirmed"
    return {"method": "evidence", "strength": strength, "confirmed": not hints}
