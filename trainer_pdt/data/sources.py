"""Where documents come from: procedural worlds, JSON lines, text files, parquet files, datasets of the Hub.

A source yields documents, or rejects where a row never becomes one; both in the same order on every run. Rows are read
one by one, so memory does not grow with their number.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from datasets import load_dataset

from .installed import InstalledSource
from .markup import MARKUP_FILES, MARKUP_VERSION, split_sections
from .original import ORIGINAL_VERSION, original_document, read_kd, read_parquet_row
from .splits import SPLITS
from .storage import Reject, file_digest, read_parquet
from .teachers import SourceDocument
from .worlds_teacher import WorldsSource

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,119}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]+")
_READ_BYTES = 1 << 20

Row = SourceDocument | Reject


class Source(Protocol):
    """Documents in a fixed order."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that changes the rows, JSON-able."""

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """Documents and rejects; no more than about `max_bytes` per row in memory, temporary files in `cache`."""


@dataclass(frozen=True)
class Columns:
    """
    Which column of a row holds what; dots reach into nested columns (`article.title`).

    Args:
        id (`str`, *optional*), title (`str`, *optional*), prompt (`str`, *optional*), domain (`str`, *optional*):
            Columns of text.
        text (`str`, *optional*): Column of the whole text, for documents without sections.
        sections (`str` or `dict[str, str]`, *optional*): Column with a list of mappings, or such a list as JSON; or
            header -> column of text, one section each.
        header (`str`, *optional*, defaults to `"header"`), section_text (`str`, *optional*, defaults to `"text"`),
            parts (`str`, *optional*, defaults to `"parts"`): Keys of a section; parts are mappings alike, whose texts
            belong to the section.
    """

    id: str | None = None
    title: str | None = None
    prompt: str | None = None
    domain: str | None = None
    text: str | None = None
    sections: str | Mapping[str, str] | None = None
    header: str = "header"
    section_text: str = "text"
    parts: str = "parts"

    def document(self, row: Mapping[str, Any], name: str, number: int, domain: str, split: str | None) -> Row:
        """The document of row `number` of the source `name`."""
        place = f"{name}-{number:08d}"
        try:
            texts = {key: self._text(row, getattr(self, key)) for key in ("id", "title", "prompt", "domain", "text")}
            sections = self._sections(row) if self.sections else ((("", texts["text"]),) if texts["text"] else ())
            document = SourceDocument(
                document_id=safe_id(texts["id"], place),
                domain=texts["domain"] or domain,
                title=texts["title"] or "",
                sections=sections,
                prompt=texts["prompt"],
                split=split,
                provenance=f"{name}, row {number}" + (f", id {texts['id'][:200]}" if texts["id"] else ""),
            )
            json.dumps(asdict(document), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return Reject(place, "invalid_utf8", f"{error.reason} at character {error.start}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            return Reject(place, "missing_field", f"{type(error).__name__}: {str(error)[:200]}")
        return document

    @staticmethod
    def _text(row: Mapping[str, Any], path: str | None) -> str | None:
        value: Any = row
        for key in path.split(".") if path else ():
            value = None if value is None else value[key]
        if path is None or value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError(f"column {path!r} holds {type(value).__name__}, must be text or a whole number")
        return str(value)

    def _sections(self, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        if isinstance(self.sections, Mapping):
            return tuple((header, self._text(row, column) or "") for header, column in self.sections.items())
        value = row[self.sections]
        value = json.loads(value) if isinstance(value, str) else value
        return tuple((self._text(part, self.header) or "", "\n\n".join(self._texts(part))) for part in value)

    def _texts(self, part: Mapping[str, Any]) -> Iterator[str]:
        text = self._text(part, self.section_text) if self.section_text in part else None
        if text:
            yield text
        for inner in part.get(self.parts) or ():
            yield from self._texts(inner)


def safe_id(raw: str | None, place: str) -> str:
    """An id of letters, digits and ``._:-``: the raw one where it is safe, else what is left of it and a hash."""
    if raw is None:
        return place
    if SAFE_ID.fullmatch(raw):
        return raw
    digest = hashlib.sha256(raw.encode()).hexdigest()[:12]
    return f"{_UNSAFE.sub('-', raw[:80]).strip('-._:') or 'id'}-{digest}"


@dataclass(frozen=True)
class _Files:
    """What sources of files have in common.

    Args:
        files (`list[str]`): Paths or patterns (`docs/**/*.txt`), read in sorted order.
        name (`str`): Opens generated ids.
        columns (`dict`): Fields of [`Columns`].
        domain (`str`, *optional*): Domain of documents without one of their own; `name` when missing.
        split (`str`, *optional*): Split that the documents go to; drawn when missing.
    """

    files: list[str]
    name: str
    columns: dict[str, Any] = field(default_factory=dict)
    domain: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        _columns(self.columns)

    def fingerprint(self) -> Mapping[str, Any]:
        """The fields, and name and SHA-256 of every file."""
        return {**asdict(self), "contents": [[path.as_posix(), file_digest(path)] for path in self.paths()]}

    def paths(self) -> list[Path]:
        """All files, sorted."""
        found = {Path(path) for pattern in self.files for path in glob.glob(pattern, recursive=True)}
        paths = sorted(path for path in found if path.is_file())
        if not paths:
            raise ValueError(f"`files` of source {self.name!r} is {self.files!r}, must match at least one file.")
        return paths

    def document(self, row: Mapping[str, Any], number: int) -> Row:
        """The document of a row."""
        return _columns(self.columns).document(row, self.name, number, self.domain or self.name, self.split)


@dataclass(frozen=True)
class JsonLinesSource(_Files):
    """JSON lines, one document each."""

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """One per line that is not blank."""
        number = 0
        for path in self.paths():
            with open(path, "rb") as stream:
                for line in _lines(stream, max_bytes):
                    if line is None or line.strip():
                        yield self._row(line, number, max_bytes)
                        number += 1

    def _row(self, line: bytes | None, number: int, max_bytes: int) -> Row:
        place = f"{self.name}-{number:08d}"
        if line is None:
            return Reject(place, "too_large", f"a line of more than {max_bytes} bytes")
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return Reject(place, "invalid_utf8", f"{error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            return Reject(place, "invalid_json", str(error)[:200])
        if not isinstance(row, dict):
            return Reject(place, "invalid_json", f"a line holds {type(row).__name__}, must be an object")
        return self.document(row, number)


@dataclass(frozen=True)
class TextSource(_Files):
    """
    Text files, one document each; the id is made of the path. Markdown and reStructuredText are cut at their headings,
    other files are one section.
    """

    def __post_init__(self) -> None:
        _refuse_columns(self)

    def fingerprint(self) -> Mapping[str, Any]:
        """Fields, files, and the version of what reads headings."""
        return {**super().fingerprint(), "markup": MARKUP_VERSION}

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """One per file."""
        columns = Columns(id="path", title="title", sections="sections")
        for number, path in enumerate(self.paths()):
            place = f"{self.name}-{number:08d}"
            with open(path, "rb") as stream:
                content = stream.read(max_bytes + 1)
            if len(content) > max_bytes:
                yield Reject(place, "too_large", f"a file of more than {max_bytes} bytes")
                continue
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield Reject(place, "invalid_utf8", f"{error.reason} at byte {error.start}")
                continue
            title, sections = split_sections(text) if path.suffix.lower() in MARKUP_FILES else ("", (("", text),))
            parts = [{"header": header, "text": part} for header, part in sections]
            row = {"path": path.as_posix(), "title": title or path.stem, "sections": parts}
            yield columns.document(row, self.name, number, self.domain or self.name, self.split)


@dataclass(frozen=True)
class ParquetSource(_Files):
    """Parquet files, one document per row."""

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """One per row."""
        rows = (row for path in self.paths() for row in read_parquet(path, cache))
        for number, row in enumerate(rows):
            yield self.document(row, number)


@dataclass(frozen=True)
class OriginalParquetSource(ParquetSource):
    """Parquet files of the original system; teacher `original` says again what its teacher said."""

    def __post_init__(self) -> None:
        _refuse_columns(self)

    def fingerprint(self) -> Mapping[str, Any]:
        """Fields, files, and the version of what reads rows."""
        return {**super().fingerprint(), "original": ORIGINAL_VERSION}

    def document(self, row: Mapping[str, Any], number: int) -> Row:
        """The document of a row; copies that the original made for augmentation are rejected."""
        place = f"{self.name}-{number:08d}"
        return original_document(row, read_parquet_row, place, self.domain, self.split)


@dataclass(frozen=True)
class OriginalRecordsSource(JsonLinesSource):
    """KD JSONL of the original system, or of [`ExportOptions.save_kd_jsonl`]: a record per stream of a sample."""

    def __post_init__(self) -> None:
        _refuse_columns(self)

    def fingerprint(self) -> Mapping[str, Any]:
        """Fields, files, and the version of what reads records."""
        return {**super().fingerprint(), "original": ORIGINAL_VERSION}

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """One per sample: the records of a sample follow each other and say the same about it."""
        before = None
        for row in super().rows(max_bytes, cache):
            if row != before:
                yield row
            before = row

    def document(self, row: Mapping[str, Any], number: int) -> Row:
        """The document of a record."""
        return original_document(row, read_kd, f"{self.name}-{number:08d}", self.domain, self.split)


@dataclass(frozen=True)
class HubSource:
    """
    A dataset of the Hub, or any folder or script that `load_dataset` takes, streamed.

    Args:
        dataset (`str`): Its name.
        name (`str`): Opens generated ids.
        columns (`dict`): Fields of [`Columns`].
        config (`str`, *optional*), hub_split (`str`, *optional*, defaults to `"train"`), revision (`str`, *optional*):
            Which part, and which state; without a revision a rerun takes the dataset for unchanged.
        limit (`int`, *optional*): Only so many rows.
        domain (`str`, *optional*), split (`str`, *optional*): See [`JsonLinesSource`].
    """

    dataset: str
    name: str
    columns: dict[str, Any]
    config: str | None = None
    hub_split: str = "train"
    revision: str | None = None
    limit: int | None = None
    domain: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        _columns(self.columns)

    def fingerprint(self) -> Mapping[str, Any]:
        """The fields."""
        return asdict(self)

    def rows(self, max_bytes: int, cache: Path) -> Iterator[Row]:
        """One per row."""
        rows = load_dataset(self.dataset, self.config, split=self.hub_split, revision=self.revision, streaming=True)
        for number, row in enumerate(rows if self.limit is None else rows.take(self.limit)):
            yield _columns(self.columns).document(row, self.name, number, self.domain or self.name, self.split)


SOURCES: dict[str, type] = {
    "worlds": WorldsSource,
    "jsonl": JsonLinesSource,
    "text": TextSource,
    "parquet": ParquetSource,
    "hub": HubSource,
    "installed": InstalledSource,
    "original_kd": OriginalRecordsSource,
    "original_parquet": OriginalParquetSource,
}


def make_source(options: Mapping[str, Any]) -> Source:
    """The source that a mapping of `kind` and fields describes."""
    fields = dict(options)
    kind = fields.pop("kind", None)
    if kind not in SOURCES:
        raise ValueError(f"`kind` of a source is {kind!r}, must be one of {', '.join(SOURCES)}.")
    if fields.get("split") not in (None, *SPLITS):
        raise ValueError(f"`split` of a source is {fields['split']!r}, must be one of {', '.join(SPLITS)}.")
    try:
        return SOURCES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"source of kind {kind!r} {str(error).partition('() ')[2]}") from error


def _refuse_columns(source: _Files) -> None:
    if source.columns:
        raise ValueError(f"`columns` of source {source.name!r} is {source.columns!r}, its kind has none.")


def _columns(columns: Mapping[str, Any]) -> Columns:
    unknown = sorted(columns.keys() - Columns.__dataclass_fields__.keys())
    if unknown:
        allowed = ", ".join(Columns.__dataclass_fields__)
        raise ValueError(f"`columns` has the unknown keys {unknown}, must be some of {allowed}.")
    chosen = Columns(**columns)
    if chosen.text is None and chosen.sections is None:
        raise ValueError("`columns` names neither `text` nor `sections`, must name one of them.")
    return chosen


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines of a file; `None` in the place of one that is longer than `max_bytes`, which is never in memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None
