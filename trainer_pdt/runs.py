"""Runs of recipes as resumable pieces: what one is given, what it left, and whether that still holds."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .resume import is_finished
from .telemetry import MANIFEST_FILE, REPORT_FILE, fingerprint, git_state, read_json, write_json
from .training_report import write_training_report

RESULT_FILE, RECIPE_FILE, LOG_FILE = "result.json", "recipe.yaml", "train.log"
MARK_FILE = "mark.json"
"""Says as what a run began; its result says the same, but only at the end."""
TRAIN, EVALUATE, TRUNK = "recipes/train.py", "recipes/evaluate.py", "recipes/pretrain_trunk.py"
PLACES = ("output_dir", "output_folder", "model", "training_report")
"""Fields that say where files are; they change no figure."""

MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
"""glibc keeps freed memory for the next tensor."""


@dataclass(frozen=True)
class Run:
    """
    One call of a recipe.

    Args:
        case (`str`): Name, shared by the seeds.
        seed (`int`): Of the training.
        folder (`Path`): Holds its recipe, log, model or evaluation, and result.
        recipe (`dict`): Complete recipe, `seed` and `output_dir` or `output_folder` included.
        script (`str`, *optional*, defaults to `"recipes/train.py"`): What runs it.
        after (`tuple[Run]`, *optional*): Runs whose model it uses.
        minutes (`float`, *optional*, defaults to 0.0): Expected duration; 0 = not known.
        weights (`str`, *optional*): Fingerprint of what it starts from, see [`weights_of`]; part of the settings.
    """

    case: str
    seed: int
    folder: Path
    recipe: dict[str, Any]
    script: str = TRAIN
    after: tuple["Run", ...] = ()
    minutes: float = 0.0
    weights: str | None = None

    @property
    def model(self) -> Path:
        """The `output_dir` of a training."""
        return self.folder / "model"

    @property
    def has_model(self) -> bool:
        """Whether others can use what it left; a training that was restored from its record has figures alone."""
        return self.script == EVALUATE or any(self.model.rglob("*.safetensors"))

    @property
    def threads(self) -> int:
        """CPU threads of the run."""
        return int(self.recipe.get("threads") or 1)

    @property
    def mark(self) -> str:
        """Fingerprint of the settings, and of those of the runs before it, wherever they are run."""
        settings = {key: value for key, value in self.recipe.items() if key not in PLACES}
        if self.after:
            settings.pop("trunk", None)
            settings["after"] = [run.mark for run in self.after]
        if self.weights is not None:
            settings["weights"] = self.weights
        return fingerprint(settings)

    def result(self) -> dict[str, Any] | None:
        """What was measured with these settings, `None` where they have not been run."""
        path = self.folder / RESULT_FILE
        found = read_json(path) if path.is_file() else {}
        return found if found.get("settings") == self.mark else None

    def is_outdated(self) -> bool:
        """Whether what its folder holds was made with other settings, or from other weights."""
        for name in (MARK_FILE, RESULT_FILE):
            if (path := self.folder / name).is_file():
                return read_json(path)["settings"] != self.mark
        path = self.folder / RECIPE_FILE
        return path.is_file() and fingerprint(read_json(path)) != fingerprint(self.recipe)

    def measured(self, seconds: float) -> dict[str, Any]:
        """The result of the finished run, to be kept as `RESULT_FILE`."""
        result = {"settings": self.mark, "case": self.case, "seed": self.seed, "seconds": round(seconds, 1)}
        if self.script == EVALUATE:
            evaluation = read_json(self.folder / "evaluation.json")
            return {**result, "seconds": evaluation["seconds"], "git": evaluation["git"]}
        if self.script == TRUNK:
            return {**result, "git": [git_state()]}
        values, manifest, report = (
            read_json(self.model / name) for name in ("eval_results.json", MANIFEST_FILE, REPORT_FILE)
        )
        return {
            **result,
            "seconds": report.get("seconds", result["seconds"]),
            "seconds_per_step": report["seconds_per_step"],
            "git": [entry["git"] for entry in (manifest, *manifest.get("continued", []))],
            "measures": {
                name.removeprefix("eval_"): value
                for name, value in values.items()
                if isinstance(value, int | float) and name.startswith("eval_")
            },
        }


def perform(run: Run, root: Path) -> dict[str, Any]:
    """
    The result of a run: the kept one, or that of its recipe, which goes on where an earlier call stopped.

    The lock passes to the recipe's process, so that after a kill of this one nobody works in the folder beside it.

    Args:
        run ([`Run`]): What to do; the runs before it are finished.
        root (`Path`): Repository.

    Raises:
        CalledProcessError: When the recipe failed.
        FileNotFoundError: When a training left no weights.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock, open(run.folder / LOG_FILE, "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (kept := run.result()) is not None:
            return kept
        started, recipe_file = time.monotonic(), run.folder / RECIPE_FILE
        if run.is_outdated():
            shutil.rmtree(run.model, ignore_errors=True)
        write_json(run.folder / MARK_FILE, {"settings": run.mark})
        write_json(recipe_file, run.recipe)
        if run.script == TRAIN and is_finished(run.model, run.recipe["max_steps"]):
            write_training_report(run.model)
        else:
            fixed = {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **MEMORY, **os.environ, **fixed, "PYTHONPATH": str(root)}
            command = [sys.executable, run.script, "--config", place_of(recipe_file, root)]
            handles = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": (lock.fileno(),)}
            subprocess.run(command, cwd=root, env=environment, check=True, **handles)
        if not run.has_model:
            raise FileNotFoundError(f"{run.script} ended, but left no *.safetensors in {place_of(run.model, root)}")
        result = run.measured(time.monotonic() - started)
        return read_json(write_json(run.folder / RESULT_FILE, result))


def weights_of(recipe: Mapping[str, Any], root: Path) -> str | None:
    """SHA-256 of the weights of the recipe's trunk, where that is a folder with one file of them."""
    file = root / str(recipe.get("trunk")) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def place_of(path: Path, root: Path) -> str:
    """A path as recipes take it: relative to the repository where it lies inside."""
    return os.path.relpath(path, root) if path.is_relative_to(root) else str(path)


def perform_all(
    choose: Callable[[Sequence[Run], Sequence[Run]], Sequence[Run]],
    jobs: int,
    root: Path,
    name: str,
    show: Callable[[dict[str, Any]], str],
) -> list[str]:
    """
    Performs runs side by side, those that `choose` names whenever one has ended; returns what failed, in words.

    Args:
        choose (`Callable`): From the runs that are going and those that have ended, well or not, to the ones to start
            now, none of them a second time; the end is where none is going and none is named.
        jobs (`int`): Runs at a time, at most.
        root (`Path`): Repository.
        name (`str`): Who speaks, first word of every line.
        show (`Callable`): What a line says of a result.
    """
    going: dict[Future[dict[str, Any]], Run] = {}
    ended: list[Run] = []
    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for run in choose([*going.values()], ended):
                print_line(f"{name}: starts {run.case}, seed {run.seed}")
                going[pool.submit(perform, run, root)] = run
            if not going:
                return failed
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                ended.append(run)
                if error := future.exception():
                    line = f"{run.case}, seed {run.seed}: {error}; see {run.folder / LOG_FILE}"
                    failed.append(line)
                    print_line(f"{name}: FAILED {line}")
                else:
                    print_line(f"{name}: finished {run.case}, seed {run.seed}{show(future.result())}")


def missing_runs(runs: Sequence[Run], going: Sequence[Run], ended: Sequence[Run]) -> list[Run]:
    """Those without a result that are not going and have not been tried."""
    return [run for run in runs if run.result() is None and run not in going and run not in ended]


def print_line(text: str) -> None:
    """Says a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
