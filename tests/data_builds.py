"""Small builds of the dataset pipeline that its tests share; nothing is downloaded."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from hub_cards import template_path
from trainer_pdt.data.options import (
    BuildOptions,
    ExportOptions,
    NotesOptions,
    PlanOptions,
    PreflightOptions,
    SplitOptions,
)
from trainer_pdt.data.pipeline import DatasetBuilder

OPTIONS = (BuildOptions, PreflightOptions, PlanOptions, NotesOptions, SplitOptions, ExportOptions)
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
