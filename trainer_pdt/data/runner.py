"""Runs stages: only missing shards, in any number of processes, documents of a waiting teacher in threads.

A shard depends on its stage's setting and on the bytes of the same shard of the stages it needs. So a changed option
redoes exactly the stages that depend on it, a killed build goes on at its first missing shard, and the number of
processes changes nothing.
"""

import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from datasets import Features, disable_progress_bars

from .storage import (
    MANIFEST_FILE,
    ShardContent,
    ShardRecord,
    clear_parts,
    fingerprint,
    read_record,
    shard_folder,
    write_shard,
    write_stage_manifest,
)

Item, Result = TypeVar("Item"), TypeVar("Result")
SWITCH_SECONDS = 0.001
"""Python's own 5 ms stretch requests of 50 ms to 79 while a thread computes, 1 ms to 62 (`docs/experiments.md`)."""

Mapper = Callable[[Callable[[Item], Result], Sequence[Item]], list[Result]]
"""Applies a function to a list, in order."""


class Stage(Protocol):
    """A stage that makes shard `n` of shards `n` of the stages that it needs; picklable."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    features: ClassVar[Features]

    @property
    def concurrency(self) -> int:
        """Documents in flight in one process; above 1 the stage runs in a single process."""

    def setting(self) -> Mapping[str, Any]:
        """Everything but its input that changes the stage's output, JSON-able."""

    def content(self, root: Path, number: int, mapper: Mapper) -> ShardContent:
        """What shard `number` holds; `root` is the folder of the build, `mapper` applies a function to documents."""


def run_in_line(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The mapper of a single process."""
    return [function(item) for item in items]


@contextmanager
def process_mapper(workers: int) -> Iterator[Mapper]:
    """A mapper over `workers` processes, which end with this one however it ends."""
    if workers == 1:
        yield run_in_line
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:

        def mapper(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
            return list(pool.map(function, items, chunksize=max(1, min(64, len(items) // (4 * workers)))))

        try:
            yield mapper
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker() -> None:
    """Quiet, and gone when the parent is: a killed parent tells nobody."""
    disable_progress_bars()
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def short_stops() -> Iterator[None]:
    """
    Threads that have their answer go on soon, whatever another one computes: they get the interpreter after
    `SWITCH_SECONDS`, and garbage is looked for only among what is made from now on, not in all imported libraries.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)


def run_waiting(stage: Stage, root: Path, jobs: Iterable[tuple[int, str]]) -> None:
    """
    Makes the shards of a stage that waits, two at a time: the next one's documents are begun while the last of one are
    awaited. Their documents share `stage.concurrency` threads. After an error no new document is begun.
    """
    with short_stops(), ThreadPoolExecutor(stage.concurrency) as documents, ThreadPoolExecutor(2) as shards:

        def mapper(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
            return list(documents.map(function, items))

        futures = [shards.submit(_make_shard, stage, root, mapper, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for pool in (shards, documents):
                pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            future.result()


def run_stage(stage: Stage, root: Path, num_shards: int, mapper: Mapper) -> dict[str, Any]:
    """
    Makes the missing shards of a stage and its manifest.

    Args:
        stage ([`Stage`]): The stage.
        root (`Path`): Folder of the build.
        num_shards (`int`): Shards of the first stage.
        mapper (`Callable`): From [`process_mapper`].

    Returns:
        `dict`: The manifest.
    """
    folder = root / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    clear_parts(folder)
    setting = dict(stage.setting())
    inputs = [shard_input(setting, root, stage.needs, number) for number in range(num_shards)]
    missing = [number for number, made_from in enumerate(inputs) if not _is_there(folder, number, made_from)]
    if missing:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        jobs = [(number, inputs[number]) for number in missing]
        if stage.concurrency > 1:
            run_waiting(stage, root, jobs)
        else:
            mapper(partial(_make_shard, stage, root, run_in_line), jobs)
    remove_shards_from(folder, num_shards)
    records = [record for number in range(num_shards) if (record := read_record(folder, number))]
    return write_stage_manifest(folder, records, setting=setting)


def shard_input(setting: Any, root: Path, needs: Iterable[str], number: int) -> str:
    """Fingerprint of all that a shard depends on."""
    records = {name: read_record(root / name, number) for name in needs}
    return fingerprint([setting, {name: record and record.digest for name, record in records.items()}])


def remove_shards_from(folder: Path, number: int) -> None:
    """Removes shards that no longer exist in the first stage."""
    while (path := shard_folder(folder, number)).exists():
        shutil.rmtree(path)
        number += 1


def _is_there(folder: Path, number: int, made_from: str) -> bool:
    record: ShardRecord | None = read_record(folder, number)
    return record is not None and record.input == made_from


def _make_shard(stage: Stage, root: Path, mapper: Mapper, job: tuple[int, str]) -> None:
    number, made_from = job
    write_shard(root / stage.name, number, made_from, stage.content(root, number, mapper), stage.features)
