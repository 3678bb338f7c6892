"""Fourth stage: splits by document, so that near duplicates never meet across them."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features, Value

from .near_duplicates import NearDuplicateIndex
from .options import PreflightOptions, SplitOptions
from .storage import TEMPORARY, read_shard
from .teachers import Rejection

SPLITS = ("train", "validation", "test")
"""By rising claim: of near duplicates with different prescribed splits the last one's split keeps its documents."""

SPLIT_FEATURES = Features(
    {"document_id": Value("string"), "split": Value("string"), "group": Value("string"), "audit": Value("bool")}
)
"""Columns of the fourth stage: `group` is the id that near duplicates have in common."""


@dataclass
class Groups:
    """
    Near duplicates among the documents of the first stage; documents without any are not in memory.

    Args:
        parents (`dict[str, str]`): Id -> id of an earlier member of its group.
        prescribed (`dict[str, str]`): First member -> strongest prescribed split of the group.
    """

    parents: dict[str, str] = field(default_factory=dict)
    prescribed: dict[str, str] = field(default_factory=dict)

    def first(self, document_id: str) -> str:
        """The member that stands for a document's group; the document itself if it is alone."""
        while (parent := self.parents.get(document_id, document_id)) != document_id:
            document_id = parent
        return document_id

    def join(self, first: str, second: str) -> None:
        """Makes two groups one."""
        one, other = sorted((self.first(first), self.first(second)))
        self.parents[one], self.parents[other] = one, one


def find_groups(preflight: Path, num_shards: int, options: PreflightOptions) -> Groups:
    """Groups of near duplicates that the first stage kept; none if it rejects them."""
    groups = Groups()
    if options.near_duplicates == "reject":
        return groups
    columns = ["document_id", "digest", "signature"]
    with NearDuplicateIndex(preflight / f"{TEMPORARY}groups.sqlite", options.near_duplicate_similarity) as index:
        for number in range(num_shards):
            for row in read_shard(preflight, number, columns):
                for other in index.similar(row["signature"]):
                    groups.join(other, row["document_id"])
                index.add(row["document_id"], row["digest"], row["signature"])
    for number in range(num_shards):
        for row in read_shard(preflight, number, ["document_id", "split"]):
            if row["split"] is not None and row["document_id"] in groups.parents:
                first = groups.first(row["document_id"])
                rivals = (row["split"], groups.prescribed.get(first, SPLITS[0]))
                groups.prescribed[first] = max(rivals, key=SPLITS.index)
    return groups


def assign_split(
    document_id: str, prescribed: str | None, groups: Groups, options: SplitOptions
) -> dict[str, str | bool]:
    """
    The row of a document.

    Args:
        document_id (`str`): Its id.
        prescribed (`str`, *optional*): Split that its source asks for. Raises [`Rejection`] where a near duplicate
            stands in a split of higher claim.
        groups ([`Groups`]): Near duplicates.
        options ([`SplitOptions`]): Fractions and seed.
    """
    group = groups.first(document_id)
    split = groups.prescribed.get(group, prescribed)
    if prescribed is not None and split != prescribed:
        raise Rejection("leakage", f"asks for {prescribed}, a near duplicate stands in {split}")
    if split is None:
        place = _uniform(f"{options.split_seed}/{group}")
        is_test, is_held = place < options.test_fraction, place < options.test_fraction + options.validation_fraction
        split = "test" if is_test else "validation" if is_held else "train"
    audit = _uniform(f"{options.split_seed}/audit/{document_id}") < options.audit_fraction
    return {"document_id": document_id, "split": split, "group": group, "audit": audit}


def _uniform(key: str) -> float:
    """A number in 0..1 that follows from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
