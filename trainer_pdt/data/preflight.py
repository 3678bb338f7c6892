"""First stage: cleans documents and turns away what is not worth a teacher's time, duplicates included."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from .near_duplicates import NearDuplicateIndex, near_duplicate_signature, text_digest
from .options import PreflightOptions
from .sources import Row, Source
from .storage import (
    Reject,
    ShardContent,
    ShardRecord,
    clear_parts,
    fingerprint,
    read_record,
    read_shard,
    write_shard,
    write_stage_manifest,
)
from .teachers import SourceDocument

PREFLIGHT_VERSION = 1
INDEX_FILE = ".part-index.sqlite"

_TEXT = Value("string")
PREFLIGHT_FEATURES = Features(
    {
        "document_id": _TEXT,
        "domain": _TEXT,
        "title": _TEXT,
        "sections": List({"header": _TEXT, "text": _TEXT}),
        "prompt": _TEXT,
        "split": _TEXT,
        "provenance": _TEXT,
        "tags": List(_TEXT),
        "digest": _TEXT,
        "signature": _TEXT,
    }
)
"""Columns of the first stage; `prompt` and `split` may be missing."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters other than tab and line break, and those that turn the direction of writing."""

_DISAMBIGUATION = re.compile(r"\bmay (?:also )?refer to:?\s*$", re.MULTILINE)
_OPENING = 400

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Checked:
    """A document that passed, with what finds its duplicates."""

    document: SourceDocument
    digest: str
    signature: str

    def row(self) -> dict[str, Any]:
        """In the columns of `PREFLIGHT_FEATURES`."""
        sections = [{"header": header, "text": text} for header, text in self.document.sections]
        fields = {name: getattr(self.document, name) for name in PREFLIGHT_FEATURES if hasattr(self.document, name)}
        return {**fields, "sections": sections, "digest": self.digest, "signature": self.signature}


def source_from_row(row: Mapping[str, Any]) -> SourceDocument:
    """The document of a row of the first stage."""
    sections = tuple((section["header"], section["text"]) for section in row["sections"])
    names = ("document_id", "domain", "title", "prompt", "split", "provenance")
    return SourceDocument(sections=sections, tags=tuple(row["tags"]), **{name: row[name] for name in names})


def check_document(row: Row, options: PreflightOptions) -> Checked | Reject:
    """Cleans a document and checks it alone; a reject passes as it is."""
    if isinstance(row, Reject):
        return row
    raw = "".join([row.title, row.prompt or "", *(part for section in row.sections for part in section)])
    size = len(raw.encode())
    if size > options.max_document_bytes:
        return Reject(row.document_id, "too_large", f"{size} bytes, at most {options.max_document_bytes}")
    controls = len(_CONTROLS.findall(raw))
    if controls > options.max_control_ratio * len(raw):
        return Reject(row.document_id, "control_characters", f"{controls} in {len(raw)} characters")
    document = _cleaned(row, options)
    reject = _reason(document, options)
    if reject is not None:
        return Reject(row.document_id, *reject)
    text = f"{document.prompt or ''}\n{document.text}"
    return Checked(document, text_digest(text), near_duplicate_signature(document.text))


def _cleaned(document: SourceDocument, options: PreflightOptions) -> SourceDocument:
    dropped = {header.lower() for header in options.drop_headers}
    sections = ((_line(header), _clean(text)) for header, text in document.sections)
    return replace(
        document,
        title=_line(document.title),
        domain=_line(document.domain),
        prompt=_clean(document.prompt) or None if document.prompt is not None else None,
        sections=tuple((header, text) for header, text in sections if text and header.lower() not in dropped),
    )


def _clean(text: str) -> str:
    """Line breaks of one kind, no control characters, no space around."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _line(text: str) -> str:
    return " ".join(_clean(text).split())


def _reason(document: SourceDocument, options: PreflightOptions) -> tuple[str, str] | None:
    text = document.text
    words = len(text.split())
    if words < options.min_words:
        return "too_short", f"{words} words, at least {options.min_words}"
    if words > options.max_words:
        return "too_long", f"{words} words, at most {options.max_words}"
    letters = [character for character in text if character.isalpha()]
    others = sum(not _is_latin(character) for character in letters)
    if others > options.max_non_latin_ratio * len(letters):
        return "other_script", f"{others} of {len(letters)} letters are not Latin"
    if _DISAMBIGUATION.search(text[:_OPENING]):
        return "disambiguation", "lists what a title may refer to"
    return None


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


class Preflight:
    """
    Reads the sources in order and writes shards of `shard_size` rows read. Shards that are there are not made again.

    Args:
        folder (`Path`): Folder of the stage.
        sources (`Sequence[Source]`): Where documents come from.
        options ([`PreflightOptions`]): What is checked.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], options: PreflightOptions) -> None:
        self.folder, self.sources, self.options = folder, sources, options
        self.setting = {
            "version": PREFLIGHT_VERSION,
            "options": asdict(options),
            "sources": [dict(source.fingerprint()) for source in sources],
        }
        self.input = fingerprint(self.setting)

    def run(self, mapper: Map) -> list[ShardRecord]:
        """Makes what is missing; `mapper` applies a function to a list, in order, perhaps in several processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_parts(self.folder)
        records: list[ShardRecord] = []
        with NearDuplicateIndex(self.folder / INDEX_FILE, self.options.near_duplicate_similarity) as index:
            while (record := self._kept(len(records))) is not None:
                for row in read_shard(self.folder, len(records), ["document_id", "digest", "signature"]):
                    index.add(row["document_id"], row["digest"], row["signature"])
                records.append(record)
            size = self.options.shard_size
            rows = islice(self._rows(), len(records) * size, None)
            while chunk := list(islice(rows, size)):
                checked = mapper(partial(check_document, options=self.options), chunk)
                content = self._content(checked, index)
                write_shard(self.folder, len(records), self._shard_input(len(records)), content, PREFLIGHT_FEATURES)
                records.append(self._kept(len(records)))  # type: ignore[arg-type]
        write_stage_manifest(self.folder, records, input=self.input, setting=self.setting)
        return records

    def _shard_input(self, number: int) -> str:
        return fingerprint([self.input, number])

    def _kept(self, number: int) -> ShardRecord | None:
        record = read_record(self.folder, number)
        return record if record is not None and record.input == self._shard_input(number) else None

    def _rows(self) -> Iterator[Row]:
        for source in self.sources:
            yield from source.rows(self.options.max_document_bytes, self.folder)

    def _content(self, checked: Iterable[Checked | Reject], index: NearDuplicateIndex) -> ShardContent:
        rows, rejects = [], []
        for result in checked:
            reject = result if isinstance(result, Reject) else self._duplicate(result, index)
            if reject is not None:
                rejects.append(reject)
            else:
                index.add(result.document.document_id, result.digest, result.signature)
                rows.append(result.row())
        return ShardContent(rows, rejects)

    def _duplicate(self, checked: Checked, index: NearDuplicateIndex) -> Reject | None:
        document_id = checked.document.document_id
        if index.has_id(document_id):
            return Reject(document_id, "duplicate_id", "an earlier document has this id")
        if same := index.same_text(checked.digest):
            return Reject(document_id, "duplicate", f"the text of {same}")
        if self.options.near_duplicates == "reject" and (others := index.similar(checked.signature)):
            return Reject(document_id, "near_duplicate", f"nearly the text of {others[0]}")
        return None
