"""Held-out documents of the procedural worlds."""

from typing import Any

from ..data.schema import Document
from ..data.worlds import WorldOptions, generate_document


def held_out_documents(split: str, core: int, hard: int, with_notes: bool = False, **options: Any) -> list[Document]:
    """The first `core` documents of a split, then hard ones, numbered on from there."""
    plain, many = WorldOptions(**options), WorldOptions(**{**options, "hard": True})
    kinds = [plain] * core + [many] * hard
    return [generate_document(split, index, kind, with_notes=with_notes) for index, kind in enumerate(kinds)]


def two_hop_documents(count: int) -> list[Document]:
    """The first core test documents with a reference whose source itself only repeats a third section's fact."""
    documents: list[Document] = []
    index = 0
    while len(documents) < count:
        document = generate_document("test", index, WorldOptions(), with_notes=False)
        if any(span.hops == 2 for stream in document.streams for span in stream.spans):
            documents.append(document)
        index += 1
    return documents
