"""Checkpoints of a run: what makes one complete, which are kept, and how one comes and goes in a single step."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from .curriculum import Curriculum
from .telemetry import read_json

logger = logging.get_logger(__name__)

COMPLETE_FILE = "complete.json"
"""Last file of a checkpoint; a folder without it is not one."""

MILESTONES = (10, 25, 50, 75, 90, 100)
"""Percent of a run at which a checkpoint is written and stays."""

SHORTEST_RUN_WITH_MILESTONES = 20
"""Steps; in a shorter run nearly every step would be one."""

LOW_DISK, FULL_DISK = 10, 2
"""Free space, in checkpoints, under which one fewer, or a single last one, is kept."""

NEWEST_WEIGHT = 0.3
"""Weight of the newest evaluation in the moving average that decides which checkpoint is the best."""

_WRITING, _DELETING = "_saving-", "_deleting-"
"""Names that `Trainer` leaves out of what it uploads."""

_FORMER = (".saving-", ".deleting-")
"""What runs of earlier versions may have left."""


def staging_folder(run_dir: Path, name: str) -> Path:
    """Where the checkpoint `name` is written before it moves to its place in `run_dir`."""
    return run_dir / f"{_WRITING}{name}"


def clear_unfinished(run_dir: Path) -> None:
    """Deletes what a killed run was writing or deleting, at whatever step it was."""
    for prefix in (_WRITING, _DELETING, *_FORMER):
        for folder in run_dir.glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(folder)


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint so that whoever is killed meanwhile leaves it whole or gone, never a part of it."""
    leaving = folder.with_name(f"{_DELETING}{folder.name}")
    os.replace(folder, leaving)
    shutil.rmtree(leaving)


def move_into_place(written: Path, place: Path) -> None:
    """Moves a complete checkpoint to its place, where an earlier one of the same step may stand."""
    if place.is_dir():
        delete_checkpoint(place)
    os.replace(written, place)


def completion_record(folder: Path, step: int) -> dict[str, Any]:
    """
    What [`COMPLETE_FILE`] says of a checkpoint.

    Args:
        folder (`Path`): With all other files in it.
        step (`int`): Finished optimizer steps.

    Returns:
        `dict` with `step`, and `files`: size in bytes and SHA-256 by path inside the folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"step": step, "files": {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}}


def check_complete(checkpoint: str) -> int:
    """
    The step of a checkpoint whose files are all there and are the ones that were written.

    Raises:
        ValueError: For a folder that is incomplete, damaged or not a checkpoint of a PDT run, with the reason.
    """
    folder = Path(checkpoint)
    marker = folder / COMPLETE_FILE
    problem = None
    if not folder.is_dir():
        problem = "there is no such folder"
    elif not marker.is_file():
        problem = f"{COMPLETE_FILE} is missing, so it was not written to its end, or not by a PDT run"
    if problem is None:
        try:
            record = read_json(marker)
            step, files = int(record["step"]), dict(record["files"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            problem = f"{COMPLETE_FILE} cannot be read ({type(error).__name__}: {error})"
        else:
            problem = _damage(folder, step, files)
    if problem is not None:
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is not a complete checkpoint: {problem}.")
    return step


def check_resumable(checkpoint: str, max_steps: int) -> None:
    """
    Raises `ValueError` for what [`check_complete`] and [`check_optimizer`] refuse, and for a longer run's checkpoint.

    Args:
        checkpoint (`str`): Its folder.
        max_steps (`int`): Optimizer steps of the run that is to go on from it.
    """
    step = check_complete(checkpoint)
    if step > max_steps:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is at step {step}, allowed: at most max_steps={max_steps}."
        )
    check_optimizer(checkpoint, max_steps - step)


def check_optimizer(checkpoint: str, steps_left: int) -> None:
    """
    Raises `ValueError` for a checkpoint that holds a model alone, where steps are left to train.

    Args:
        checkpoint (`str`): Folder of a complete one.
        steps_left (`int`): Of the run that is to go on from it.
    """
    folder = Path(checkpoint)
    has_deepspeed = any(folder.glob("global_step*"))
    needed = (SCHEDULER_NAME,) if has_deepspeed else (OPTIMIZER_NAME, SCHEDULER_NAME)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing and steps_left > 0:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} has no {', '.join(missing)} (save_only_model), allowed with "
            f"{steps_left} steps left: a checkpoint of a run with save_only_model=False. overwrite_output_dir=True "
            "starts anew; `PDTForParallelDecoding.from_pretrained(folder, is_trainable=True)` begins a new run with "
            "its weights."
        )


def _damage(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> str | None:
    if step_of(folder) not in (None, step):
        return f"it holds step {step}, its name says {step_of(folder)}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _fingerprint(path) != expected:
            return f"{name} has another SHA-256 than what was written"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def smoothed(values: Sequence[float]) -> float:
    """Moving average of a metric's values, oldest first, so that one lucky evaluation makes no best checkpoint."""
    mean = values[0]
    for value in values[1:]:
        mean += NEWEST_WEIGHT * (value - mean)
    return mean


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint, `None` for another name."""
    prefix, _, step = folder.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdecimal() else None


def find_checkpoints(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, oldest first."""
    found = {step_of(path): path for path in run_dir.glob("checkpoint-*") if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


@dataclass(frozen=True)
class Retention:
    """
    Which checkpoints stay: those of `lasting` steps, the best, and the last `last`.

    Args:
        lasting (`frozenset[int]`): Steps whose checkpoints are written and stay.
        last (`int`, *optional*): Checkpoints that stay for being the newest, lasting ones counted; all when missing.
    """

    lasting: frozenset[int]
    last: int | None = None

    @classmethod
    def of_run(cls, curriculum: Curriculum, last: int | None) -> "Retention":
        """Milestones and ends of stages last; `last` is `save_total_limit`."""
        steps = {stage.until for stage in curriculum.stages}
        if curriculum.max_steps >= SHORTEST_RUN_WITH_MILESTONES:
            steps |= {curriculum.max_steps * percent // 100 for percent in MILESTONES}
        return cls(frozenset(steps), last or None)

    def newest(self, count: int, free: int, size: int) -> int:
        """
        How many of the newest checkpoints stay.

        Args:
            count (`int`): Checkpoints that exist.
            free (`int`): Free space on the disk in bytes.
            size (`int`): Bytes that a checkpoint takes.
        """
        wanted = count if self.last is None else min(count, self.last)
        if free < FULL_DISK * size:
            return min(1, wanted)
        return max(min(1, wanted), wanted - 1) if free < LOW_DISK * size else wanted

    def superfluous(self, steps: Iterable[int], newest: int, best: int | None = None) -> list[int]:
        """
        Steps whose checkpoints have to go.

        Args:
            steps (`Iterable[int]`): All that exist.
            newest (`int`): From [`Retention.newest`].
            best (`int`, *optional*): Step of the best one.
        """
        ordered = sorted(steps)
        kept = {*ordered[len(ordered) - newest :], *self.lasting, best}
        return [step for step in ordered if step not in kept]

    def apply(self, run_dir: Path, best: int | None = None) -> None:
        """Deletes the checkpoints of `run_dir` that do not stay; a full disk makes fewer stay, with a warning."""
        folders = find_checkpoints(run_dir)
        if not folders:
            return
        newest_files = folders[max(folders)].rglob("*")
        size = sum(path.stat().st_size for path in newest_files if path.is_file())
        free = shutil.disk_usage(run_dir).free
        wanted, newest = self.newest(len(folders), LOW_DISK * size, size), self.newest(len(folders), free, size)
        superfluous = self.superfluous(folders, newest, best)
        if superfluous != self.superfluous(folders, wanted, best):
            logger.warning(
                f"{run_dir}: {free / 1e6:,.0f} MB are free and a checkpoint takes {size / 1e6:,.1f} MB, so the newest "
                f"{newest} checkpoints stay instead of {wanted}."
            )
        for step in superfluous:
            delete_checkpoint(folders[step])


class LastingCheckpointsCallback(TrainerCallback):
    """
    Writes a checkpoint at each step whose checkpoint is to stay, whatever `save_steps` is.

    Args:
        retention ([`Retention`]): Of the run.
    """

    def __init__(self, retention: Retention) -> None:
        self.retention = retention

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the best checkpoint of a run whose folder has moved."""
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for one, unless `save_strategy` is `"no"`."""
        if args.save_strategy != "no" and state.global_step in self.retention.lasting:
            control.should_save = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends what a run that was killed after its last checkpoint had begun to delete; main process only."""
        if args.save_strategy != "no" and state.is_world_process_zero:
            clear_unfinished(Path(args.output_dir))
            self.retention.apply(Path(args.output_dir), state.best_global_step)
