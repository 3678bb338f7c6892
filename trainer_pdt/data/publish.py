"""Documents as a typed `datasets.Dataset` and back: one row per document, streams nested inside."""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk

from .schema import Coverage, Document, Entity, Fact, Notes, NotesSnapshot, PlanItem, Span, Stream

_TEXT, _INDEX, _NUMBER = Value("string"), Value("int32"), Value("float32")

_NOTES = {
    "text": _TEXT,
    "entities": List({"id": _TEXT, "name": _TEXT, "type": _TEXT, "aliases": List(_TEXT)}),
    "facts": List(
        {"subj_id": _TEXT, "predicate": _TEXT, "object": _TEXT, "start": _INDEX, "end": _INDEX, "certainty": _NUMBER}
    ),
    "coverage": List({"item_id": _TEXT, "status": _TEXT, "provenance": _TEXT}),
}

_SPAN = {
    "start": _INDEX,
    "end": _INDEX,
    "kind": _TEXT,
    "cue": _TEXT,
    "value": _TEXT,
    "item_id": _TEXT,
    "owner": _INDEX,
    "hops": _INDEX,
}

_STREAM = {
    "stream_id": _INDEX,
    "header": _TEXT,
    "summary": _TEXT,
    "text": _TEXT,
    "spans": List(_SPAN),
    "notes": _NOTES,
    "noisy_notes": List(_NOTES),
    "snapshots": List({"snapshot_id": _INDEX, "end": _INDEX, "notes": _NOTES}),
    "ready": List(Value("bool")),
}

DOCUMENT_FEATURES = Features(
    {
        "document_id": _TEXT,
        "domain": _TEXT,
        "split_tags": List(_TEXT),
        "prompt": _TEXT,
        "items": List({"item_id": _TEXT, "text": _TEXT, "stream": _INDEX}),
        "streams": List(_STREAM),
        "schema_version": _TEXT,
    }
)
"""Columns of the published dataset."""


def documents_to_dataset(documents: Iterable[Document]) -> Dataset:
    """A dataset with one row per document and the columns of `DOCUMENT_FEATURES`."""
    return Dataset.from_list([document.to_dict() for document in documents], features=DOCUMENT_FEATURES)


def load_published(path: str, cache_dir: str | None = None) -> DatasetDict:
    """
    A published dataset: a folder of `save_to_disk`, a folder that a build exported, or a Hub id.

    Raises:
        ValueError: For a folder of something else.
    """
    if (Path(path) / "dataset_dict.json").is_file():
        return load_from_disk(path)
    splits: dict[str, list[str]] = {}
    for file in sorted(Path(path).resolve().glob("data/*.parquet")):
        splits.setdefault(file.name.split("-")[0], []).append(glob.escape(str(file)))
    if splits:
        # Of a folder, the cache of `load_dataset` may know no more than its name; of files it knows path and time.
        return load_dataset("parquet", data_files=splits, cache_dir=cache_dir)
    if Path(path).is_dir():
        raise ValueError(
            f"dataset_path={path!r}, allowed: a folder with data/*.parquet (the dataset folder of a build) or with "
            "dataset_dict.json (save_to_disk), it has neither; or a dataset of the Hub."
        )
    return load_dataset(path, cache_dir=cache_dir)


def document_from_row(row: Mapping[str, Any]) -> Document:
    """The document of a dataset row; equal to the one that was published."""
    return Document(
        document_id=row["document_id"],
        domain=row["domain"],
        split_tags=tuple(row["split_tags"]),
        prompt=row["prompt"],
        items=tuple(PlanItem(**item) for item in row["items"]),
        streams=tuple(_stream(stream) for stream in row["streams"]),
        schema_version=row["schema_version"],
    )


def _stream(row: Mapping[str, Any]) -> Stream:
    return Stream(
        stream_id=row["stream_id"],
        header=row["header"],
        summary=row["summary"],
        text=row["text"],
        spans=tuple(Span(**span) for span in row["spans"]),
        notes=_notes(row["notes"]),
        noisy_notes=tuple(_notes(notes) for notes in row["noisy_notes"]),
        snapshots=tuple(
            NotesSnapshot(entry["snapshot_id"], entry["end"], _notes(entry["notes"])) for entry in row["snapshots"]
        ),
        ready=tuple(row["ready"]),
    )


def _notes(row: Mapping[str, Any]) -> Notes:
    return Notes(
        text=row["text"],
        entities=tuple(
            Entity(entry["id"], entry["name"], entry["type"], tuple(entry["aliases"])) for entry in row["entities"]
        ),
        facts=tuple(Fact(**fact) for fact in row["facts"]),
        coverage=tuple(Coverage(**entry) for entry in row["coverage"]),
    )
