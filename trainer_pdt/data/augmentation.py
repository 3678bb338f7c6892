"""Copies of a document that say the same in another way: sections in another order. Standard library only."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .schema import Document, Notes, Stream


def other_orders(document: Document, count: int, seed: int) -> Iterator[Document]:
    """Up to `count` copies with their sections in other orders; ids end in `+order1`, which no source's id does."""
    numbers = list(range(len(document.streams)))
    rng = random.Random(f"{seed}/{document.document_id}/orders")
    seen = {tuple(numbers)}
    for _ in range(4 * count):
        order = tuple(rng.sample(numbers, len(numbers)))
        if order not in seen and len(seen) <= count:
            seen.add(order)
            copy = reordered(document, order)
            yield replace(copy, document_id=f"{document.document_id}+order{len(seen) - 1}")


def reordered(document: Document, order: Sequence[int]) -> Document:
    """
    The document with its sections in another order; ids of plan items follow their stream.

    Args:
        document ([`Document`]): The document.
        order (`Sequence[int]`): Old number of each new stream.
    """
    place = {old: new for new, old in enumerate(order)}
    ids = {item.item_id: f"s{place[item.stream]}/{item.item_id.split('/', 1)[1]}" for item in document.items}
    items = [replace(item, item_id=ids[item.item_id], stream=place[item.stream]) for item in document.items]
    return replace(
        document,
        items=tuple(sorted(items, key=lambda item: item.stream)),
        streams=tuple(_moved(document.streams[old], new, ids, place) for new, old in enumerate(order)),
    )


def _moved(stream: Stream, number: int, ids: dict[str, str], place: dict[int, int]) -> Stream:
    def renamed(notes: Notes) -> Notes:
        coverage = tuple(replace(entry, item_id=ids[entry.item_id]) for entry in notes.coverage)
        return replace(notes, coverage=coverage)

    return replace(
        stream,
        stream_id=number,
        spans=tuple(replace(s, item_id=ids[s.item_id], owner=place[s.owner]) for s in stream.spans),
        notes=renamed(stream.notes),
        noisy_notes=tuple(renamed(notes) for notes in stream.noisy_notes),
        snapshots=tuple(replace(snapshot, notes=renamed(snapshot.notes)) for snapshot in stream.snapshots),
    )
