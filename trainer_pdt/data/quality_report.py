"""The quality report as Markdown, and documents written out for reading. Standard library only."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .schema import Document


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: what each stage kept and why it turned documents away, and measures per split."""
    splits = report["splits"]
    stages = [
        [name, stage["rows"], sum(stage["rejects"].values()), listed(stage["rejects"]), listed(stage["counts"])]
        for name, stage in report["stages"].items()
    ]
    counts = {key: None for found in splits.values() for key in found["counts"]}
    domains = {key: None for found in splits.values() for key in found["domains"]}
    streams = {key: None for found in splits.values() for key in found["streams"]}
    shares = {key: None for found in splits.values() for key in found["shares"]}
    lines = [
        "# Quality report",
        "",
        "Documents before augmentation. A reference is a value that a section repeats from a sibling.",
        "",
        "## Stages",
        "",
        *_table(["stage", "kept", "rejected", "reasons", "counted"], stages),
    ]
    for title, part, keys in (
        ("Measures", "shares", shares),
        ("Counts", "counts", counts),
        ("Domains", "domains", domains),
        ("Streams per document", "streams", streams),
    ):
        rows = [[key, *(found[part].get(key) for found in splits.values())] for key in keys]
        lines += ["", f"## {title}", "", *_table(["", *splits], rows)]
    return "\n".join(lines) + "\n"


AUDIT_OPENING = "# Documents to read\n\nA random sample. Values in a section: `own`, or repeated from a sibling.\n"


def audit_markdown(document: Document) -> str:
    """A document to read: request, plan, sections and their notes."""
    lines = ["", f"## {document.document_id}", "", f"Request: {_quoted(document.prompt)}"]
    for stream in document.streams:
        items = "; ".join(item.text for item in document.items if item.stream == stream.stream_id)
        lines += ["", f"### {stream.stream_id}. {_quoted(stream.header)}", "", f"Plan: {_quoted(items)}", ""]
        lines += [_quoted(stream.text), "", f"Notes: {_quoted(stream.notes.text)}", ""]
        lines += [
            f"- {_quoted(span.cue)} = {_quoted(span.value)} ({span.kind}, stream {span.owner})"
            for span in stream.spans
        ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]


def _cell(value: Any) -> str:
    return "" if value is None else _quoted(str(value)).replace("|", "\\|")


def listed(counts: Mapping[str, int]) -> str:
    """Counts above 0 with their names."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _quoted(text: str) -> str:
    """Text of documents as one line that Markdown and HTML leave alone."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
