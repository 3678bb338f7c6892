"""Rows of the original system's datasets, parquet and KD JSONL, as documents with the plan and notes they came with.

What its rows add to a document - token ids, note vectors, simulated rollbacks - is left where it is: it depends on a
tokenizer and a trunk, or means nothing.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .plans import CLAMP_CHARACTERS, CLAMP_SHARE
from .schema import PlanItem
from .splits import SPLITS
from .storage import Reject
from .teachers import SourceDocument

ORIGINAL_VERSION = 1
"""Raised when the same row becomes another document."""

_AUGMENTED = re.compile(r"_aug\d+$")


class BadRecord(ValueError):
    """A row that does not have the original's form.

    Args:
        reason (`str`): Of the rejection.
        detail (`str`): Place, value and what is allowed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def original_document(
    row: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    place: str,
    domain: str | None,
    split: str | None,
) -> SourceDocument | Reject:
    """
    The document of a row; its `provenance` is what the original's teacher said about it, as JSON.

    Args:
        row (`Mapping`): The row.
        read (`Callable`): [`read_kd`] or [`read_parquet_row`].
        place (`str`): Names the row where it has no usable id.
        domain (`str`, *optional*), split (`str`, *optional*): Win over those of the row.
    """
    try:
        found = read(row)
        if _AUGMENTED.search(found["sample_id"]):
            raise BadRecord("augmented_copy", "its document is another row; copies would leak between splits")
        record = {"plan": found["plan"], "notes": found["notes"], "confirmed": found["confirmed"]}
        document = SourceDocument(
            document_id=found["sample_id"],
            domain=domain or found["domain"],
            title=found["title"],
            sections=tuple(
                (stream["header"], text) for stream, text in zip(found["plan"], found["sections"], strict=True)
            ),
            prompt=found["prompt"],
            split=split or found["split"],
            provenance=json.dumps(record),
        )
        " ".join([document.domain, document.title, document.prompt or "", document.text]).encode()
    except BadRecord as error:
        return Reject(place, error.reason, error.detail)
    except UnicodeEncodeError as error:
        return Reject(place, "invalid_utf8", f"{error.reason} at character {error.start}")
    return document


def read_kd(row: Mapping[str, Any]) -> dict[str, Any]:
    """A KD record: one stream of a sample, with the plan and notes of all streams in it."""
    about = _need(row, "metadata", dict)
    text = _need(about, "document_text", str, "metadata.")
    entries = _need(_need(about, "teacher_plan", dict, "metadata."), "plan", list, "metadata.teacher_plan.")
    plan = [_stream(entry, f"metadata.teacher_plan.plan[{n}].", "notes") for n, entry in enumerate(entries)]
    provenance = about.get("coverage_provenance") or {}
    split = row.get("split")
    if split not in (None, *SPLITS):
        raise BadRecord("bad_record", f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    return {
        "sample_id": _need(row, "sample_id", str),
        "domain": _need(row, "domain", str),
        "title": "",
        "prompt": None,
        "split": split,
        "plan": plan,
        "sections": list(_kd_sections(about, entries, text)),
        "notes": _notes(_need(row, "true_notes", list), len(plan), "true_notes"),
        "confirmed": provenance.get("confirmed") is True,
    }


def _kd_sections(about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], text: str) -> Iterator[str]:
    """By the plan's slices of the text, else by its segments of paragraphs."""
    place = "metadata.teacher_plan."
    segments = about["teacher_plan"].get("segments")
    for number, entry in enumerate(entries):
        if "section_contract" in entry or segments is None:
            yield _slice(entry, text, f"{place}plan[{number}].")
            continue
        name = _need(entry, "stream_id", str, f"{place}plan[{number}].")
        own = [segment for segment in segments if isinstance(segment, dict) and segment.get("stream") == name]
        if len(own) != 1:
            raise BadRecord("missing_field", f"{place}segments has {len(own)} entries for {name!r}, must have 1")
        first, last = (_need(own[0], f"paragraph_{end}", int, f"{place}segments.") for end in ("start", "end"))
        paragraphs = _need(about, "document_paragraphs", list, "metadata.")
        if not 0 <= first < last <= len(paragraphs):
            raise BadRecord("range_outside", f"paragraphs {first} to {last} of {len(paragraphs)}")
        yield "\n\n".join(str(paragraph) for paragraph in paragraphs[first:last])


def read_parquet_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the collated parquet files: a sample, its plan and notes as JSON texts."""
    plan_json = _json(row, "plan_text", dict)
    text = plan_json["input_text"] if "input_text" in plan_json else _need(row, "x_text", str)
    entries = _need(plan_json, "streams", list, "plan_text.")
    plan = [_stream(entry, f"plan_text.streams[{n}].", "notes_contract") for n, entry in enumerate(entries)]
    return {
        "sample_id": _need(row, "sample_id", str),
        "domain": _need(row, "domain", str),
        "title": "",
        "prompt": plan_json.get("prompt") or None,
        "split": None,
        "plan": plan,
        "sections": [_slice(entry, text, f"plan_text.streams[{n}].") for n, entry in enumerate(entries)],
        "notes": _notes(_json(row, "notes_true", list), len(plan), "notes_true"),
        "confirmed": False,
    }


def _stream(entry: Any, place: str, notes: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise BadRecord("bad_record", f"{place[:-1]} is {type(entry).__name__}, must be an object")
    wanted = _need(entry, notes, list, place)
    for number, text in enumerate(wanted):
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("bad_record", f"{place}{notes}[{number}] is {text!r}, must be text")
    header, summary = (_need(entry, name, str, place) for name in ("header", "summary"))
    return {"header": " ".join(header.split()), "summary": summary, "notes": wanted}


def _slice(entry: Mapping[str, Any], text: str, place: str) -> str:
    contract = _need(entry, "section_contract", dict, place)
    start, end = (_need(contract, name, int, f"{place}section_contract.") for name in ("start_idx", "end_idx"))
    slack = max(CLAMP_SHARE * len(text), CLAMP_CHARACTERS)
    if not -slack <= start < end <= len(text) + slack:
        raise BadRecord("range_outside", f"{place}section_contract: {start} to {end} of {len(text)} characters")
    return text[max(start, 0) : end]


def _notes(entries: Sequence[Any], streams: int, place: str) -> list[dict[str, list]]:
    """ENT, FACT and COVERAGE of every stream, with the fields that are used."""
    if len(entries) != streams:
        raise BadRecord("bad_record", f"{place} has {len(entries)} entries, must have {streams}, one per stream")
    notes = []
    for number, entry in enumerate(entries):
        at = f"{place}[{number}]."
        if not isinstance(entry, dict):
            raise BadRecord("bad_record", f"{at[:-1]} is {type(entry).__name__}, must be an object")
        kinds = {"ENT": ("id", "name", "type"), "FACT": ("subj_id", "predicate", "object")}
        found: dict[str, list] = {}
        for kind, names in {**kinds, "COVERAGE": ("plan_item_id", "status")}.items():
            found[kind] = [
                {name: _need(one, name, str, f"{at}{kind}[{n}].") for name in names}
                for n, one in enumerate(_objects(entry, kind, at))
            ]
        for whole, one in zip(found["ENT"], entry["ENT"], strict=True):
            whole["aliases"] = [str(alias) for alias in one.get("aliases") or ()]
        for n, (whole, one) in enumerate(zip(found["FACT"], entry["FACT"], strict=True)):
            evidence = _need(one, "evidence_span", dict, f"{at}FACT[{n}].")
            whole["evidence"] = _need(evidence, "text", str, f"{at}FACT[{n}].evidence_span.")
            whole["certainty"] = float(_need(one, "certainty", int | float, f"{at}FACT[{n}]."))
        notes.append(found)
    return notes


def _objects(entry: Mapping[str, Any], name: str, place: str) -> list[dict[str, Any]]:
    found = _need(entry, name, list, place)
    for number, one in enumerate(found):
        if not isinstance(one, dict):
            raise BadRecord("bad_record", f"{place}{name}[{number}] is {type(one).__name__}, must be an object")
    return found


def _json(row: Mapping[str, Any], name: str, kind: type) -> Any:
    try:
        return _need({name: json.loads(_need(row, name, str))}, name, kind)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("invalid_json", f"{name}: {str(error)[:200]}") from error


def _need(row: Mapping[str, Any], name: str, kind: Any, place: str = "") -> Any:
    if name not in row:
        raise BadRecord("missing_field", f"{place}{name} is missing")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind))
        raise BadRecord("bad_record", f"{place}{name} is {type(value).__name__}, must be {wanted}")
    return value


def contract_items(plan: Sequence[Mapping[str, Any]]) -> list[PlanItem]:
    """What a plan asked every stream to note, as items."""
    return [
        PlanItem(f"s{stream}/note {number}", text, stream)
        for stream, entry in enumerate(plan)
        for number, text in enumerate(entry["notes"], 1)
    ]
