"""Small builds of the dataset pipeline that its tests share; nothing is downloaded."""

import os
import signal
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from hub_cards import template_path
from trainer_pdt.data.options import OPTIONS
from trainer_pdt.data.pipeline import DatasetBuilder
from trainer_pdt.data.schema import PlanItem
from trainer_pdt.data.teachers import Plan, SectionNotes, SourceDocument, StreamPlan

WORLDS = {
    "sources": [{"kind": "worlds", "count": 21}],
    "shard_size": 8,
    "validation_fraction": 0.3,
    "test_fraction": 0.2,
}
STAGES = ("preflight", "plans", "notes", "splits")


def make_builder(folder: Path, **options: Any) -> DatasetBuilder:
    """A builder of 21 procedural documents in 3 shards; `options` are fields of any stage."""
    disable_progress_bars()
    values = {**WORLDS, "output_dir": str(folder), **options}
    parts = [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in OPTIONS]
    return DatasetBuilder(*parts, card_template=template_path("dataset_card.md"))


def build(folder: Path) -> None:
    """Builds, in a child process for example."""
    make_builder(folder).run()


def build_and_die(folder: Path, writes: int) -> None:
    """Builds, and is killed at the moment when a number of files were to be renamed."""
    rename, left = os.rename, [writes]

    def counted(*paths: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.rename = counted  # type: ignore[assignment]
    build(folder)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_numbers(folder: Path) -> dict[str, int]:
    """Inode of every shard's record and of the dataset's manifest: a new number = made again."""
    found = {
        f"{stage}/{path.parent.name}": path.stat().st_ino
        for stage in STAGES
        for path in (folder / stage).glob("shard-*/shard.json")
    }
    return {**found, "dataset": (folder / "dataset" / "manifest.json").stat().st_ino}


class HalvesTeacher:
    """Cuts any text in the middle and notes nothing; says how many documents it had in hand at a time."""

    most = 0

    def __init__(self, concurrency: int = 1, fail_on: str = "") -> None:
        self.concurrency, self.fail_on = concurrency, fail_on
        self.lock, self.inside = threading.Lock(), 0

    def fingerprint(self, stage: str) -> dict[str, Any]:
        """Nothing changes."""
        return {"teacher": "halves"}

    def estimate(self, source: SourceDocument) -> dict[str, float]:
        """A request per document."""
        return {"requests": 1}

    def plan(self, source: SourceDocument) -> Plan:
        """Two halves."""
        with self.lock:
            self.inside += 1
            HalvesTeacher.most = max(HalvesTeacher.most, self.inside)
        if self.concurrency > 1:
            time.sleep(0.01)
        with self.lock:
            self.inside -= 1
        if source.document_id == self.fail_on:
            raise RuntimeError("out of budget")
        text = source.text
        middle = text.index(" ", len(text) // 2)
        items = (PlanItem("s0/first", "how it begins", 0), PlanItem("s1/second", "how it ends", 1))
        streams = (StreamPlan("Beginning", "", 0, middle), StreamPlan("End", "", middle, len(text)))
        return Plan(source.prompt or f"Tell about {source.title or 'it'}.", items, streams)

    def notes(self, source: SourceDocument, plan: Plan) -> tuple[SectionNotes, ...]:
        """Nothing."""
        return (SectionNotes(),) * 2
