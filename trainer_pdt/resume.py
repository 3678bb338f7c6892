"""Continues a run in its folder: exactly, or on request; never by chance with other settings."""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .arguments import PDTTrainingArguments
from .telemetry import (
    MANIFEST_FILE,
    command_line,
    git_state,
    package_versions,
    read_json,
    run_manifest,
    to_jsonable,
    write_manifest,
)

_WITHOUT_EFFECT = re.compile(
    r"(output_dir|overwrite_output_dir|resume_from_checkpoint|local_rank|run_name|project|report_to|disable_tqdm|"
    r"push_to_hub|per_device_eval_batch_size|(do|eval|log|logging|save|hub|trackio|ddp_timeout)(_\w+)?)"
)
"""Training and data fields that do not change what is learnt."""


def find_checkpoint(args: PDTTrainingArguments, settings: Mapping[str, Any]) -> str | None:
    """
    The checkpoint to continue from, `None` for a new run.

    Args:
        args ([`PDTTrainingArguments`]): `resume_from_checkpoint` wins and is not checked; `overwrite_output_dir`
            deletes the folder's checkpoints.
        settings (`Mapping`): Of this run, by part; what its manifest will hold.

    Raises:
        ValueError: When `output_dir` holds a run with other settings, naming each of them.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        return args.resume_from_checkpoint
    if args.overwrite_output_dir:
        for checkpoint in [*folder.glob("checkpoint-*"), *folder.glob(".saving-*")]:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return None
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None and not (folder / "config.json").is_file():
        return None
    manifest = folder / MANIFEST_FILE
    earlier = read_json(manifest)["config"] if manifest.is_file() else {}
    changes = list(differences(earlier, to_jsonable(settings)))
    if changes:
        raise ValueError(
            f"output_dir={args.output_dir!r} holds a run with other settings: {'; '.join(changes)}. Allowed: its "
            "settings, which continue it exactly; another output_dir; overwrite_output_dir=True, which starts anew; "
            "or resume_from_checkpoint with a checkpoint's path, which goes on with the new settings."
        )
    return last


def differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    """
    Each setting that is not the same, as ``"name: earlier -> now"``; fields without effect on training are left out.

    Args:
        earlier, now (`Any`): JSON values.
        name (`str`, *optional*): Where they stand.
    """
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            if not _WITHOUT_EFFECT.fullmatch(key):
                yield from differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        for index, pair in enumerate(zip(earlier, now, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif earlier != now:
        yield f"{name}: {earlier!r} -> {now!r}"


def record_run(args: PDTTrainingArguments, settings: Mapping[str, Any], checkpoint: str | None) -> Path:
    """
    Writes what a new run is, or adds to the manifest of a continued one with what it was continued.

    Args:
        args ([`PDTTrainingArguments`]): Of the run.
        settings (`Mapping`): As given to [`find_checkpoint`].
        checkpoint (`str`, *optional*): What that returned.
    """
    path = Path(args.output_dir) / MANIFEST_FILE
    if checkpoint is None or args.resume_from_checkpoint or not path.is_file():
        return write_manifest(args.output_dir, run_manifest(seed=args.seed, config=settings))
    manifest = read_json(path)
    again = {
        "checkpoint": Path(checkpoint).name,
        "command": command_line(),
        "git": git_state(),
        "packages": package_versions(),
    }
    return write_manifest(args.output_dir, {**manifest, "continued": [*manifest.get("continued", []), again]})
