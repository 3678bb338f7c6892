"""Finds documents that are nearly the same: MinHash signatures and an index on the disk, so that memory stays flat."""

import hashlib
import re
import sqlite3
from pathlib import Path
from types import TracebackType

SHINGLE_WORDS = 3
BINS = 64
BAND_BINS = 4
"""64 minima in 16 bands of 4: of two documents that share 80 % of their shingles 99.98 % are compared."""

_VALUE_BYTES = 4
_EMPTY = -1


def text_digest(text: str) -> str:
    """SHA-256 of the words of a text, whatever their case and the space between them."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def near_duplicate_signature(text: str) -> str:
    """
    MinHash of a text's shingles of three words, as 512 hexadecimal digits.

    One hash per shingle: it chooses a bin, and every bin keeps its least value (one-permutation hashing); an empty bin
    takes the value of the next one that is not.
    """
    words = re.findall(r"\w+", text.lower())
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    bins = [_EMPTY] * BINS
    for shingle in shingles:
        number = int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=8).digest(), "big")
        place, value = number % BINS, number // BINS % 256**_VALUE_BYTES
        if bins[place] == _EMPTY or value < bins[place]:
            bins[place] = value
    filled = [place for place in range(BINS) if bins[place] != _EMPTY]
    nearest = (next((p for p in filled if p >= place), filled[0]) for place in range(BINS))
    return b"".join(bins[place].to_bytes(_VALUE_BYTES, "big") for place in nearest).hex()


def signature_similarity(first: str, second: str) -> float:
    """Estimated share of common shingles of two signatures, 0 to 1."""
    digits = 2 * _VALUE_BYTES
    same = sum(first[i : i + digits] == second[i : i + digits] for i in range(0, BINS * digits, digits))
    return same / BINS


class NearDuplicateIndex:
    """
    Signatures of documents in an SQLite file; a context manager that removes the file at the end.

    Args:
        path (`Path`): The file; one that is there is replaced.
        similarity (`float`): Least estimated share of common shingles of near duplicates, 0 to 1.
    """

    def __init__(self, path: Path, similarity: float) -> None:
        self.path, self.similarity = path, similarity
        # Every bin that differs spoils one band at most. Texts of one template share a few bands and are not compared.
        self.common_bands = max(1, BINS // BAND_BINS - int(BINS * (1 - similarity)))

    def __enter__(self) -> "NearDuplicateIndex":
        self.path.unlink(missing_ok=True)
        self.base = sqlite3.connect(self.path, isolation_level=None)
        self.base.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE documents (id TEXT PRIMARY KEY, digest TEXT UNIQUE, signature TEXT) WITHOUT ROWID;"
            "CREATE TABLE bands (band TEXT, id TEXT, PRIMARY KEY (band, id)) WITHOUT ROWID;"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.base.close()
        self.path.unlink(missing_ok=True)

    def has_id(self, document_id: str) -> bool:
        """Whether a document of this id was added."""
        return self.base.execute("SELECT 1 FROM documents WHERE id = ?", (document_id,)).fetchone() is not None

    def same_text(self, digest: str) -> str | None:
        """Id of the document with the same [`text_digest`]."""
        found = self.base.execute("SELECT id FROM documents WHERE digest = ?", (digest,)).fetchone()
        return found and found[0]

    def similar(self, signature: str) -> list[str]:
        """Ids of all near duplicates that were added, sorted."""
        bands = _bands(signature)
        marks = ",".join("?" * len(bands))
        found = self.base.execute(
            "SELECT d.id, d.signature FROM documents d JOIN "
            f"(SELECT id FROM bands WHERE band IN ({marks}) GROUP BY id HAVING COUNT(*) >= ?) USING (id)",
            (*bands, self.common_bands),
        )
        return sorted(other for other, known in found if signature_similarity(signature, known) >= self.similarity)

    def add(self, document_id: str, digest: str, signature: str) -> None:
        """Adds a document."""
        self.base.execute("INSERT INTO documents VALUES (?, ?, ?)", (document_id, digest, signature))
        self.base.executemany("INSERT INTO bands VALUES (?, ?)", [(band, document_id) for band in _bands(signature)])


def _bands(signature: str) -> list[str]:
    digits = 2 * _VALUE_BYTES * BAND_BINS
    parts = (signature[i : i + digits] for i in range(0, len(signature), digits))
    return [f"{number:x}:{part}" for number, part in enumerate(parts)]
