"""The stages that make shards of shards: plans, notes, splits."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from datasets import Features

from .noisy_notes import collect_objects, noisy_notes
from .options import NotesOptions, PlanOptions, SplitOptions
from .plans import PLAN_FEATURES, checked_plan, plan_from_row, plan_row
from .preflight import source_from_row
from .publish import DOCUMENT_FEATURES, document_from_row
from .quality import check_quality
from .records import build_document
from .runner import Mapper
from .schema import Document, to_plain
from .splits import SPLIT_FEATURES, Groups, assign_split
from .storage import Reject, ShardContent, fingerprint, read_shard
from .teachers import Plan, Rejection, SourceDocument, Teacher

Result = TypeVar("Result")


@dataclass(frozen=True)
class PlanStage:
    """Sources to plans."""

    name: ClassVar[str] = "plans"
    needs: ClassVar[tuple[str, ...]] = ("preflight",)
    features: ClassVar[Features] = PLAN_FEATURES
    version: ClassVar[int] = 1

    teacher: Teacher
    options: PlanOptions

    @property
    def concurrency(self) -> int:
        """Documents in flight."""
        return self.teacher.concurrency

    def setting(self) -> Mapping[str, Any]:
        """Options and teacher."""
        teacher = dict(self.teacher.fingerprint("plans"))
        return {"version": self.version, "options": asdict(self.options), "teacher": teacher}

    def content(self, root: Path, number: int, mapper: Mapper) -> ShardContent:
        """Plans, and documents without one."""
        sources = [source_from_row(row) for row in read_shard(root / "preflight", number)]
        results = mapper(self._plan, sources)
        plans, rejects = _settled((source.document_id for source in sources), results)
        rows = [plan_row(document_id, plan) for document_id, (plan, _) in plans]
        return ShardContent(rows, rejects, {"streams_plan_the_same": sum(clashes for _, (_, clashes) in plans)})

    def _plan(self, source: SourceDocument) -> tuple[Plan, int] | Rejection:
        try:
            return checked_plan(self.teacher.plan(source), source, self.options)
        except Rejection as rejection:
            return rejection


@dataclass(frozen=True)
class NotesStage:
    """Sources and plans to documents of the published schema."""

    name: ClassVar[str] = "notes"
    needs: ClassVar[tuple[str, ...]] = ("preflight", "plans")
    features: ClassVar[Features] = DOCUMENT_FEATURES
    version: ClassVar[int] = 1

    teacher: Teacher
    options: NotesOptions

    @property
    def concurrency(self) -> int:
        """Documents in flight."""
        return self.teacher.concurrency

    def setting(self) -> Mapping[str, Any]:
        """Options and teacher."""
        teacher = dict(self.teacher.fingerprint("notes"))
        return {"version": self.version, "options": asdict(self.options), "teacher": teacher}

    def content(self, root: Path, number: int, mapper: Mapper) -> ShardContent:
        """Documents; made-up facts take their values from documents of the same shard."""
        plans = {row["document_id"]: plan_from_row(row) for row in read_shard(root / "plans", number)}
        sources = [source_from_row(row) for row in read_shard(root / "preflight", number)]
        pairs = [(source, plans[source.document_id]) for source in sources if source.document_id in plans]
        results = mapper(self._document, pairs)
        documents, rejects = _settled((source.document_id for source, _ in pairs), results)
        pool = collect_objects(document for _, (document, _) in documents)
        for _, (document, row) in documents:
            for stream, variants in zip(row["streams"], noisy_notes(document, pool, self.options), strict=True):
                stream["noisy_notes"] = to_plain(variants)
        return ShardContent([row for _, (_, row) in documents], rejects)

    def _document(self, pair: tuple[SourceDocument, Plan]) -> tuple[Document, dict[str, Any]] | Rejection:
        """The document without noisy notes, and its row: made here, while other answers are awaited."""
        source, plan = pair
        try:
            document = build_document(source, plan, self.teacher.notes(source, plan), self.options)
        except Rejection as rejection:
            return rejection
        return document, document.to_dict()


@dataclass(frozen=True)
class SplitStage:
    """Documents to splits."""

    name: ClassVar[str] = "splits"
    needs: ClassVar[tuple[str, ...]] = ("preflight", "notes")
    features: ClassVar[Features] = SPLIT_FEATURES
    version: ClassVar[int] = 1
    concurrency: ClassVar[int] = 1

    options: SplitOptions
    groups: Groups = field(repr=False)

    def setting(self) -> Mapping[str, Any]:
        """Options, and the groups of near duplicates."""
        groups = fingerprint(asdict(self.groups))
        return {"version": self.version, "options": asdict(self.options), "groups": groups}

    def content(self, root: Path, number: int, mapper: Mapper) -> ShardContent:
        """A split for every document that passes the quality checks."""
        columns = ["document_id", "split"]
        wanted = {row["document_id"]: row["split"] for row in read_shard(root / "preflight", number, columns)}
        documents = [document_from_row(row) for row in read_shard(root / "notes", number)]
        results = mapper(partial(self._split, wanted), documents)
        splits, rejects = _settled((document.document_id for document in documents), results)
        return ShardContent([row for _, row in splits], rejects)

    def _split(self, wanted: Mapping[str, str | None], document: Document) -> dict[str, Any] | Rejection:
        try:
            check_quality(document, self.options)
            return assign_split(document.document_id, wanted[document.document_id], self.groups, self.options)
        except Rejection as rejection:
            return rejection


def _settled(
    ids: Iterable[str], results: Iterable[Result | Rejection]
) -> tuple[list[tuple[str, Result]], list[Reject]]:
    """Results with their ids, and rejects."""
    good: list[tuple[str, Result]] = []
    rejects = []
    for document_id, result in zip(ids, results, strict=True):
        if isinstance(result, Rejection):
            rejects.append(Reject(document_id, result.reason, result.detail))
        else:
            good.append((document_id, result))
    return good, rejects
