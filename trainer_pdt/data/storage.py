"""Files of the pipeline: shards that are there whole or not at all, manifests, fingerprints.

A shard is a folder `shard-00000` with `rows.parquet` (typed), `rejects.jsonl` and `shard.json`. It is written beside
its place and renamed, so a build that is killed leaves finished shards and rubbish, which the next one clears away.
Nothing in a file depends on the time, the machine or the folder: the same input gives the same bytes.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, load_dataset
from datasets.table import InMemoryTable

ROWS_FILE, REJECTS_FILE, RECORD_FILE, MANIFEST_FILE = "rows.parquet", "rejects.jsonl", "shard.json", "manifest.json"
TEMPORARY = ".part-"

_LOADING = threading.Lock()
"""`load_dataset` replaces functions of other modules as it goes: one thread at a time."""


@dataclass(frozen=True)
class Reject:
    """A document that a stage turned away.

    Args:
        document_id (`str`): Its id; of a row that never became a document, the source's name and row.
        reason (`str`): Short name in snake case.
        detail (`str`): One sentence for people.
    """

    document_id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ShardContent:
    """What a stage makes of one shard.

    Args:
        rows (`list[dict]`): Rows in the columns of the stage.
        rejects (`list[Reject]`): Documents that were turned away.
        counts (`Mapping[str, int]`): Further counts for the manifest.
    """

    rows: list[dict[str, Any]]
    rejects: list[Reject]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardRecord:
    """`shard.json`: what a finished shard was made from, and what it holds."""

    input: str
    rows: int
    rejects: dict[str, int]
    counts: dict[str, int]
    sizes: dict[str, int]
    sha256: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the shard's files."""
        return fingerprint(self.sha256)


def fingerprint(data: Any) -> str:
    """SHA-256 of the JSON form of `data`, whatever the order of keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """The same for JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], features: Features) -> int:
    """Writes rows as typed parquet; returns their bytes in memory."""
    columns = {name: [row[name] for row in rows] for name in features}
    table = InMemoryTable.from_pydict(columns, schema=features.arrow_schema)
    # A fingerprint of its own would be computed by pickling the table.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=path.stem).to_parquet(str(path))


def read_parquet(path: Path, cache: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, read piece by piece; `cache` is a folder for files that are removed again."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=cache) as folder:
        choice = {"columns": list(columns)} if columns else {}
        options = {"split": "train", "streaming": True, "cache_dir": folder, **choice}
        with _LOADING:
            rows = load_dataset("parquet", data_files=[glob.escape(str(path))], **options)
        yield from rows


def shard_folder(stage: Path, number: int) -> Path:
    """Folder of a shard."""
    return stage / f"shard-{number:05d}"


def write_shard(stage: Path, number: int, made_from: str, content: ShardContent, features: Features) -> None:
    """
    Writes a shard; the last act is the rename that makes it exist.

    Args:
        stage (`Path`): Folder of the stage.
        number (`int`): Number of the shard.
        made_from (`str`): Fingerprint of all that the shard depends on.
        content ([`ShardContent`]): What it holds.
        features (`Features`): Columns.
    """
    target = shard_folder(stage, number)
    part = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=stage))
    write_parquet(part / ROWS_FILE, content.rows, features)
    lines = (json.dumps(asdict(reject)) + "\n" for reject in content.rejects)
    write_text(part / REJECTS_FILE, "".join(lines))
    files = [part / ROWS_FILE, part / REJECTS_FILE]
    record = ShardRecord(
        input=made_from,
        rows=len(content.rows),
        rejects=dict(sorted(Counter(reject.reason for reject in content.rejects).items())),
        counts=dict(sorted(content.counts.items())),
        sizes={path.name: path.stat().st_size for path in files},
        sha256={path.name: file_digest(path) for path in files},
    )
    write_json(part / RECORD_FILE, asdict(record))
    part.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(part, target)


def read_record(stage: Path, number: int) -> ShardRecord | None:
    """The record of a finished shard; `None` if there is none, or if a file has another size than when written."""
    folder = shard_folder(stage, number)
    if not (folder / RECORD_FILE).is_file():
        return None
    record = ShardRecord(**read_json(folder / RECORD_FILE))
    found = {name: (folder / name).stat().st_size for name in record.sizes if (folder / name).is_file()}
    return record if found == record.sizes else None


def read_shard(stage: Path, number: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a finished shard, or some columns of them."""
    return read_parquet(shard_folder(stage, number) / ROWS_FILE, stage, columns)


def read_rejects(stage: Path, number: int) -> list[Reject]:
    """Rejects of a finished shard."""
    text = (shard_folder(stage, number) / REJECTS_FILE).read_text(encoding="utf-8")
    return [Reject(**json.loads(line)) for line in text.split("\n") if line]


def clear_parts(folder: Path) -> None:
    """Removes what a killed build was writing in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_stage_manifest(stage: Path, records: Iterable[ShardRecord], **values: Any) -> dict[str, Any]:
    """Sums up a finished stage in its `manifest.json`, which says that the stage is complete."""
    records = list(records)
    rejects: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
        counts.update(record.counts)
    manifest = {
        "stage": stage.name,
        **values,
        "shards": len(records),
        "rows": sum(record.rows for record in records),
        "rejects": dict(sorted(rejects.items())),
        "counts": dict(sorted(counts.items())),
        "sha256": fingerprint([record.digest for record in records]),
    }
    write_json(stage / MANIFEST_FILE, manifest)
    return manifest
