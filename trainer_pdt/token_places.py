"""Where a document's sections state and repeat values, as token indices of a section."""

from collections.abc import Mapping, Sequence

from .data.notes import source_of
from .data.schema import Document, Stream
from .variants import is_disputable

NEVER = -1
"""Token index of something that no text states."""

UNKNOWN = -2
"""Token index of a plan item of which the data does not say whether, or where, its section states it."""

NO_LABEL = -1
"""Readiness of a repeated fact that the data does not judge."""


def token_range(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """First token and the one after the last that overlap characters `start..end`; an empty range is token 0."""
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 1)


def mark_tokens(length: int, stream: Stream, ranges: list[tuple[int, int]], planted: set[int]) -> dict[str, list]:
    """Per token of a section the number of its repeated fact, whether it states an own and whether a planted value."""
    reference, own, replaced = [-1] * length, [False] * length, [False] * length
    count = 0
    for number, (span, (start, end)) in enumerate(zip(stream.spans, ranges, strict=True)):
        for token in range(start, end):
            own[token] = span.kind == "own"
            reference[token] = count if span.kind == "sibling" else -1
            replaced[token] = number in planted
        count += span.kind == "sibling"
    return {"reference": reference, "own": own, "planted": replaced}


def source_places(
    document: Document,
    original: Document,
    ranges: list[list[tuple[int, int]]],
    planted: set[tuple[int, int]],
    values: Mapping[str, Sequence[str]],
) -> dict[str, list]:
    """By stream and repeated fact who stated it first, where, and what may contradict it, see `FeatureMaker.view`."""
    names = ("source_stream", "source_token", "contradicts", "disputable", "ready")
    sources: dict[str, list] = {name: [] for name in names}
    for stream in document.streams:
        found = [
            (number, source_of(original.streams, stream.stream_id, original.streams[stream.stream_id].spans[number]))
            for number, span in enumerate(stream.spans)
            if span.kind == "sibling"
        ]
        said = [(number, place and document.streams[place[0]].spans[place[1]]) for number, place in found]
        sources["source_stream"].append([place[0] if place else -1 for _, place in found])
        sources["source_token"].append([ranges[place[0]][place[1]][1] - 1 if place else NEVER for _, place in found])
        sources["contradicts"].append(
            [span is not None and span.value != stream.spans[number].value for number, span in said]
        )
        sources["disputable"].append(
            [
                place is not None and place not in planted and is_disputable(place[0], span, values)
                for (_, place), (_, span) in zip(found, said, strict=True)
            ]
        )
        sources["ready"].append([int(ready) for ready in stream.ready] if stream.ready else [NO_LABEL] * len(found))
    return sources


def told_tokens(document: Document, ranges: list[list[tuple[int, int]]], lengths: Sequence[int]) -> list[list[int]]:
    """
    By stream and token where a sibling first says what an owner states there for the first time.

    Args:
        document ([`Document`]): The text.
        ranges (`list`): By stream and span, first token and the one after the last.
        lengths (`Sequence[int]`): Tokens of each section.

    Returns:
        `list`: Last token of the earliest sibling's span with the owner's value of that plan item, -1 where there is
        none. It may be a later token than the owner's: what was written first depends on the block size.
    """
    said: dict[tuple[int, str, str], int] = {}
    for stream in document.streams:
        for span, (_, end) in zip(stream.spans, ranges[stream.stream_id], strict=True):
            if span.owner != stream.stream_id:
                fact = span.owner, span.item_id, span.value
                said[fact] = min(end - 1, said.get(fact, end - 1))
    told = [[NEVER] * length for length in lengths]
    for stream in document.streams:
        stated = set()
        for span, (start, end) in zip(stream.spans, ranges[stream.stream_id], strict=True):
            if span.kind == "own" and span.item_id not in stated:
                stated.add(span.item_id)
                place = said.get((stream.stream_id, span.item_id, span.value), NEVER)
                told[stream.stream_id][start:end] = [place] * (end - start)
    return told


def item_tokens(document: Document, ranges: list[list[tuple[int, int]]]) -> list[int]:
    """By plan item the last token of its owner's first statement, [`NEVER`] or [`UNKNOWN`]."""
    stated: dict[str, int] = {}
    for stream in document.streams:
        for span, (_, end) in zip(stream.spans, ranges[stream.stream_id], strict=True):
            if span.owner == stream.stream_id:
                stated.setdefault(span.item_id, end - 1)
        for entry in stream.notes.coverage:
            if entry.provenance == "hint" or entry.status != "missing":
                stated.setdefault(entry.item_id, UNKNOWN)
    return [stated.get(item.item_id, NEVER) for item in document.items]
