"""Writes what a run leaves behind: manifest, stage history, report, thresholds; JSON that is never half written."""

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .data.schema import NOTES_SCHEMA_VERSION

TELEMETRY_SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
STAGE_HISTORY_FILE = "stage_history.json"
REPORT_FILE = "training_report.json"
THRESHOLD_HEADS = ("agreement", "coverage")
RECORDED_PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface-hub"),
    *("deepspeed", "numpy", "parallel-decoder-transformer"),
)
_SECRET = re.compile(r"(?:^|[_-])(?:(?:hub|hf|access|auth|api)[_-]?(?:token|key)|password|secret)$")
_HIDDEN = "<hidden>"


def to_jsonable(value: Any) -> Any:
    """Turn a value into plain JSON types.

    Dataclasses become mappings, paths and enums text, sets sorted lists, scalars and arrays of torch or numpy numbers
    and lists. JSON has no NaN and no infinity: they become `null`. Values of keys that name a secret are hidden.

    Args:
        value (`Any`): What to convert. An unknown type is a `TypeError`.

    Returns:
        `dict`, `list`, `str`, `int`, `float`, `bool` or `None`.
    """
    if isinstance(value, enum.Enum):
        return to_jsonable(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_jsonable({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {_key(key): _HIDDEN if _is_secret(key, item) else to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in value), key=repr)
    if hasattr(value, "tolist"):  # torch.Tensor, numpy.ndarray and their scalars
        return to_jsonable(value.tolist())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


def _key(key: Any) -> str:
    if isinstance(key, str | int):
        return str(to_jsonable(key))
    raise TypeError(f"key {key!r} must be str or int, got {type(key).__name__}")


def _is_secret(key: Any, value: Any) -> bool:
    return value is not None and isinstance(key, str) and bool(_SECRET.search(key.lower()))


def write_json(path: str | Path, data: Any, indent: int | None = 2) -> Path:
    """Write JSON so that a reader sees the old file or the new one, never a part.

    Args:
        path (`str` or `Path`): Target; missing folders are made.
        data (`Any`): Passed through `to_jsonable`.
        indent (`int`, *optional*, defaults to 2): Spaces per level; `None` = all in one line.

    Returns:
        `Path`: The target.
    """
    path = Path(path)
    text = json.dumps(to_jsonable(data), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # `Trainer` leaves names with this beginning out of what it uploads.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"_{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp files are private; a run's record is as readable as its other files.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fingerprint(data: Any) -> str:
    """Return a SHA-256 of the JSON form of `data` that does not depend on the order of keys."""
    text = json.dumps(to_jsonable(data), sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def package_versions(names: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Map package names to installed versions; a package that is not installed gives `None`."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Return `{"sha", "dirty"}` of the repository that holds `folder` (default: this package), `None` outside one."""
    where = Path(folder) if folder is not None else Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None:
        return None
    status = git("status", "--porcelain")
    return {"sha": sha, "dirty": None if status is None else bool(status)}


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command as one line, script relative to the working folder, values of secret options hidden."""
    words = list(sys.argv if argv is None else argv)
    if words and os.path.isabs(words[0]):
        relative = os.path.relpath(words[0])
        words[0] = os.path.basename(words[0]) if relative.startswith("..") else relative
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = name.startswith("-")
        is_secret = is_option and bool(_SECRET.search(name.lower()))
        if is_secret and equals:
            word = f"{name}={_HIDDEN}"
        shown.append(_HIDDEN if hide and not is_option else word)
        hide = is_secret and not equals
    return shlex.join(shown)


def run_manifest(
    *,
    seed: int,
    config: Any,
    argv: Sequence[str] | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Describe a run so that it can be repeated.

    Args:
        seed (`int`): Seed of the run.
        config (`Any`): Resolved settings: a mapping (for example class name to dataclass) or a dataclass.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv`): Command line.
        folder (`str` or `Path`, *optional*): Folder whose git state is recorded; default: this package's.

    Returns:
        `dict[str, Any]`: JSON-able; holds no host name, user or absolute script path.
    """
    config = to_jsonable(config)
    torch = sys.modules.get("torch")
    return {
        "schema": TELEMETRY_SCHEMA_VERSION,
        "command": command_line(argv),
        "seed": seed,
        "git": git_state(folder),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads() if torch is not None else None,
            "devices": torch.cuda.device_count() if torch is not None else None,
        },
        "config": config,
        "config_fingerprint": fingerprint(config),
        "notes_schema_version": NOTES_SCHEMA_VERSION,
    }


def stage_history(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Build the stage history from records that hold at least `name` and `first_step`, in order of steps."""
    stages = [to_jsonable(record) for record in records]
    for index, stage in enumerate(stages):
        absent = {"name", "first_step"} - stage.keys()
        if absent:
            raise ValueError(f"stages[{index}] = {stage}: must hold {', '.join(sorted(absent))}")
        if index and stage["first_step"] < stages[index - 1]["first_step"]:
            previous = stages[index - 1]["first_step"]
            raise ValueError(f"stages[{index}].first_step = {stage['first_step']}: must be >= {previous}")
    return {"schema": TELEMETRY_SCHEMA_VERSION, "stages": stages}


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Write the result of `run_manifest` into a run's folder."""
    return write_json(Path(folder) / MANIFEST_FILE, manifest)


def write_stage_history(folder: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Check and write the stage history into a run's folder, see `stage_history`."""
    return write_json(Path(folder) / STAGE_HISTORY_FILE, stage_history(records))


def write_report(folder: str | Path, report: Mapping[str, Any]) -> Path:
    """Write the report of a training run into its folder."""
    return write_json(Path(folder) / REPORT_FILE, {"schema": TELEMETRY_SCHEMA_VERSION, **report})


def write_thresholds(folder: str | Path, head: str, report: Mapping[str, Any]) -> Path:
    """
    Write how the threshold of a head was set.

    Args:
        folder (`str` or `Path`): Receives `{head}_thresholds.json`.
        head (`str`): One of `THRESHOLD_HEADS`.
        report (`Mapping`): From `trainer_pdt.calibration.calibrate`: `threshold` with `mean`, and `points`, which are
            written as `roc_points`.
    """
    if head not in THRESHOLD_HEADS:
        raise ValueError(f"head={head!r}, allowed: one of {THRESHOLD_HEADS}.")
    rest = {name: value for name, value in report.items() if name not in ("threshold", "points")}
    content = {
        "schema": TELEMETRY_SCHEMA_VERSION,
        f"{head}_threshold": _probability(f"{head}_threshold", report["threshold"]["mean"]),
        "threshold_interval": [report["threshold"]["low"], report["threshold"]["high"]],
        **rest,
        "roc_points": report["points"],
    }
    return write_json(Path(folder) / f"{head}_thresholds.json", content)


def read_thresholds(folder: str | Path) -> dict[str, Any]:
    """
    `{"agreement_threshold", "agreement_scaling", "coverage_threshold"}` of the files of [`write_thresholds`] that
    `folder` holds; a scaling that agreements have not is `None`.
    """
    found: dict[str, Any] = {}
    for head in THRESHOLD_HEADS:
        path, name = Path(folder) / f"{head}_thresholds.json", f"{head}_threshold"
        if path.is_file():
            content = read_json(path)
            if content.get("schema") != TELEMETRY_SCHEMA_VERSION:
                raise ValueError(f"{path}: schema={content.get('schema')!r}, allowed: {TELEMETRY_SCHEMA_VERSION}.")
            found[name] = _probability(name, content.get(name))
            if head == "agreement":
                found["agreement_scaling"] = content.get("agreement_scaling")
    return found


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}, allowed: a number in [0, 1].")
    return float(value)
