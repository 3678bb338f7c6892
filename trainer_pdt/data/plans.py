"""Second stage: a teacher's plans, checked, clamped and compared across streams."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from datasets import Features, List, Value

from .options import PlanOptions
from .schema import PlanItem
from .teachers import Plan, Rejection, SourceDocument, StreamPlan

MIN_STREAMS, MAX_STREAMS = 2, 8
CLAMP_SHARE, CLAMP_CHARACTERS = 0.05, 512
"""A range may overrun the text by the larger of these and is clamped; beyond, the plan is rejected."""

MAX_HEADER = 200

_TEXT, _INDEX = Value("string"), Value("int32")
PLAN_FEATURES = Features(
    {
        "document_id": _TEXT,
        "prompt": _TEXT,
        "items": List({"item_id": _TEXT, "text": _TEXT, "stream": _INDEX}),
        "streams": List({"header": _TEXT, "summary": _TEXT, "start": _INDEX, "end": _INDEX}),
    }
)
"""Columns of the second stage."""


def plan_row(document_id: str, plan: Plan) -> dict[str, Any]:
    """A plan in the columns of `PLAN_FEATURES`."""
    return {"document_id": document_id, **asdict(plan)}


def plan_from_row(row: Mapping[str, Any]) -> Plan:
    """The plan of a row."""
    items = tuple(PlanItem(**item) for item in row["items"])
    return Plan(row["prompt"], items, tuple(StreamPlan(**stream) for stream in row["streams"]))


def checked_plan(plan: Plan, source: SourceDocument, options: PlanOptions) -> tuple[Plan, int]:
    """
    The plan with ranges clamped and trimmed, texts on one line and items in stream order.

    Args:
        plan ([`Plan`]): A teacher's plan.
        source ([`SourceDocument`]): What it was made for.
        options ([`PlanOptions`]): How strict.

    Returns:
        `tuple`: The plan, and how many times two streams plan the same. Raises [`Rejection`].
    """
    if not MIN_STREAMS <= len(plan.streams) <= MAX_STREAMS:
        raise Rejection("stream_count", f"{len(plan.streams)} streams, must be {MIN_STREAMS} to {MAX_STREAMS}")
    if not plan.prompt.strip():
        raise Rejection("empty_prompt", "the plan has no request")
    streams = tuple(_checked_stream(stream, source.text, number) for number, stream in enumerate(plan.streams))
    ranges = sorted((stream.start, stream.end) for stream in streams)
    if any(start < end for (_, end), (start, _) in pairwise(ranges)):
        raise Rejection("overlapping_sections", f"ranges {ranges}")
    items = tuple(sorted((_checked_item(item) for item in plan.items), key=lambda item: item.stream))
    _check_items(items, len(streams))
    clashes = [] if options.plan_lint == "ignore" else _clashes(items, streams)
    if clashes and options.plan_lint == "fail":
        raise Rejection("streams_plan_the_same", clashes[0])
    return Plan(plan.prompt.strip(), items, streams), len(clashes)


def _checked_stream(stream: StreamPlan, text: str, number: int) -> StreamPlan:
    header, summary = _line(stream.header), _line(stream.summary)
    if not header or len(header) > MAX_HEADER:
        raise Rejection("bad_header", f"stream {number}: {len(header)} characters, must be 1 to {MAX_HEADER}")
    slack = max(CLAMP_SHARE * len(text), CLAMP_CHARACTERS)
    if stream.start < -slack or stream.end > len(text) + slack or stream.start >= stream.end:
        raise Rejection("range_outside", f"stream {number}: {stream.start} to {stream.end} of {len(text)} characters")
    start, end = max(stream.start, 0), min(stream.end, len(text))
    part = text[start:end]
    start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
    if start >= end:
        raise Rejection("empty_section", f"stream {number}")
    return StreamPlan(header, summary, start, end)


def _checked_item(item: PlanItem) -> PlanItem:
    return replace(item, text=_line(item.text))


def _check_items(items: tuple[PlanItem, ...], num_streams: int) -> None:
    seen = set()
    for item in items:
        if not item.text:
            raise Rejection("empty_item", f"item {item.item_id!r}")
        if not 0 <= item.stream < num_streams:
            raise Rejection("unknown_stream", f"item {item.item_id!r}: stream {item.stream} of {num_streams}")
        topic = item.item_id.removeprefix(f"s{item.stream}/")
        if topic == item.item_id or not topic:
            raise Rejection("bad_item_id", f"item {item.item_id!r}: must start with 's{item.stream}/'")
        if item.item_id in seen:
            raise Rejection("doubled_item", f"item {item.item_id!r}")
        seen.add(item.item_id)
    empty = sorted(set(range(num_streams)) - {item.stream for item in items})
    if empty:
        raise Rejection("stream_without_items", f"streams {empty}")


def _clashes(items: tuple[PlanItem, ...], streams: tuple[StreamPlan, ...]) -> list[str]:
    """Items and headers that two streams share, without case."""
    found = []
    owners: dict[str, int] = {}
    for item in items:
        first = owners.setdefault(item.text.lower(), item.stream)
        if first != item.stream:
            found.append(f"streams {first} and {item.stream} plan {item.text!r}")
    headers: dict[str, int] = {}
    for number, stream in enumerate(streams):
        first = headers.setdefault(stream.header.lower(), number)
        if first != number:
            found.append(f"streams {first} and {number} are called {stream.header!r}")
    return found


def _line(text: str) -> str:
    return " ".join(text.split())
