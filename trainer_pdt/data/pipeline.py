"""Builds a dataset: preflight, plans, notes, splits, export."""

import fcntl
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .chat import ChatTeacher
from .export import Export
from .extractive import ExtractiveTeacher
from .options import BuildOptions, ExportOptions, NotesOptions, PlanOptions, PreflightOptions, SplitOptions
from .original_teacher import OriginalTeacher
from .preflight import Preflight, source_from_row
from .runner import Mapper, process_mapper, remove_shards_from, run_stage
from .sources import make_source
from .splits import find_groups
from .stages import NotesStage, PlanStage, SplitStage
from .storage import read_shard
from .teachers import Teacher
from .worlds_teacher import ProceduralTeacher

TEACHERS: dict[str, type] = {
    "procedural": ProceduralTeacher,
    "extractive": ExtractiveTeacher,
    "chat": ChatTeacher,
    "original": OriginalTeacher,
}
LOCK_FILE = ".lock"


def make_teacher(name: str, options: dict) -> Teacher:
    """The teacher of a name and its fields."""
    if name not in TEACHERS:
        raise ValueError(f"`teacher` is {name!r}, must be one of {', '.join(TEACHERS)}.")
    try:
        return TEACHERS[name](**options)
    except TypeError as error:
        raise ValueError(f"`teacher_options`: {name!r} {str(error).partition('() ')[2]}") from error


@dataclass(frozen=True)
class DatasetBuilder:
    """
    A build in a folder. What is there and still fits is kept, so a build that was stopped goes on where it was, and a
    changed option redoes the stages that depend on it.

    Args:
        build ([`BuildOptions`]), preflight ([`PreflightOptions`]), plans ([`PlanOptions`]), notes ([`NotesOptions`]),
            splits ([`SplitOptions`]), export ([`ExportOptions`]): Options of the stages.
        card_template (`Path`): Jinja template of the dataset card.
    """

    build: BuildOptions
    preflight: PreflightOptions
    plans: PlanOptions
    notes: NotesOptions
    splits: SplitOptions
    export: ExportOptions
    card_template: Path

    @property
    def root(self) -> Path:
        """Folder of the build."""
        return Path(self.build.output_dir)

    def run(self) -> Path:
        """Makes what is missing, uploads it if asked, and returns the folder of the dataset."""
        teacher = make_teacher(self.build.teacher, self.build.teacher_options)
        with self._locked(), process_mapper(self.build.workers) as mapper:
            num_shards = self._preflight(mapper)
            run_stage(PlanStage(teacher, self.plans), self.root, num_shards, mapper)
            run_stage(NotesStage(teacher, self.notes), self.root, num_shards, mapper)
            groups = find_groups(self.root / "preflight", num_shards, self.preflight)
            run_stage(SplitStage(self.splits, groups), self.root, num_shards, mapper)
            export = Export(self.root, self.export, self.card_template)
            folder = export.run(num_shards, mapper)
            if self.export.push_to_hub:
                export.push()
        return folder

    def estimate(self) -> dict[str, float]:
        """What plans and notes of all documents would take: the first stage, then the teacher's estimates summed."""
        teacher = make_teacher(self.build.teacher, self.build.teacher_options)
        total: Counter[str] = Counter()
        with self._locked(), process_mapper(self.build.workers) as mapper:
            for number in range(self._preflight(mapper)):
                for row in read_shard(self.root / "preflight", number):
                    total["documents"] += 1
                    for name, value in teacher.estimate(source_from_row(row)).items():
                        total[name] += value  # type: ignore[assignment]
        return dict(total)

    def _preflight(self, mapper: Mapper) -> int:
        sources = [make_source(options) for options in self.build.sources]
        folder = self.root / "preflight"
        num_shards = len(Preflight(folder, sources, self.preflight).run(mapper))
        remove_shards_from(folder, num_shards)
        return num_shards

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One build at a time in a folder of its own; the lock ends with the process."""
        if self.root.exists() and not (self.root / LOCK_FILE).exists() and any(self.root.iterdir()):
            raise ValueError(f"`output_dir` {self.root} holds other files, must be new, empty or a build's.")
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / LOCK_FILE, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another build is running in {self.root}") from error
            yield
