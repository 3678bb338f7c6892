"""Continues a run in its folder: exactly, or on request; never by chance with other settings."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from .arguments import PDTTrainingArguments
from .checkpoints import check_complete, check_optimizer, clear_unfinished, delete_checkpoint, find_checkpoints
from .gradient_norms import norm_files
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
    r"max_row_tokens|feature_workers|push_to_hub|per_device_eval_batch_size|"
    r"(do|eval|log|logging|save|hub|trackio|ddp_timeout)(_\w+)?)"
)
"""Training and data fields that do not change what is learnt."""


def find_checkpoint(args: PDTTrainingArguments, settings: Mapping[str, Any]) -> str | None:
    """
    The checkpoint to continue from, `None` for a new run.

    Args:
        args ([`PDTTrainingArguments`]): `resume_from_checkpoint` wins and its settings are not checked; with
            `overwrite_output_dir` what the folder holds does not count, and [`record_run`] deletes it.
        settings (`Mapping`): Of this run, by part; what its manifest will hold.

    Raises:
        ValueError: When `output_dir` holds a run with other settings, naming each of them, or a finished one; when the
            named checkpoint is missing, damaged or without its optimizer, or `output_dir` holds checkpoints that do
            not lead to it.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        step = check_complete(args.resume_from_checkpoint)
        if step >= args.max_steps:
            raise ValueError(_finished("resume_from_checkpoint", args.resume_from_checkpoint, args.max_steps))
        check_optimizer(args.resume_from_checkpoint, args.max_steps - step)
        _check_course(args, step)
        return args.resume_from_checkpoint
    if args.overwrite_output_dir:
        return None
    checkpoints = find_checkpoints(folder)
    last = max(checkpoints, default=None)
    if last is None and not (folder / "config.json").is_file():
        return None
    manifest = folder / MANIFEST_FILE
    earlier = read_json(manifest)["config"] if manifest.is_file() else {}
    changes = list(differences(earlier, to_jsonable(settings)))
    if changes:
        raise ValueError(
            f"output_dir={args.output_dir!r} holds a run with other settings: {'; '.join(changes)}. Allowed: its "
            "settings, which continue it exactly; another output_dir; overwrite_output_dir=True, which starts anew; "
            "or resume_from_checkpoint with the path of its newest checkpoint, in another output_dir of any, which "
            "goes on with the new settings."
        )
    if last is None:
        return None
    if last >= args.max_steps and is_finished(folder, last):
        raise ValueError(_finished("output_dir", args.output_dir, args.max_steps))
    return str(checkpoints[last])


def _check_course(args: PDTTrainingArguments, step: int) -> None:
    """Refuses a named checkpoint of `step` where others would count as newer than those that come after it."""
    folder, named = Path(args.output_dir), Path(args.resume_from_checkpoint)
    leads_here = named.resolve().parent == folder.resolve()
    others = [path.name for found, path in find_checkpoints(folder).items() if not leads_here or found > step]
    if others:
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r} is at step {step}, and "
            f"output_dir={args.output_dir!r} holds {others}, which do not lead to it. Allowed: another output_dir; "
            "these folders deleted; or, without resume_from_checkpoint and with the settings of the run that wrote "
            "them, to go on from the newest."
        )


def is_finished(folder: Path, step: int) -> bool:
    """Whether the model of `step` has been written into a run's folder, and not only its checkpoint."""
    state = folder / TRAINER_STATE_NAME
    written = state.is_file() and (folder / TRAINING_ARGS_NAME).is_file()
    return written and read_json(state)["global_step"] == step


def _mark_unfinished(folder: Path) -> None:
    """Deletes what an earlier run left that would make the model in the folder count as one that is finished."""
    for name in (TRAINER_STATE_NAME, TRAINING_ARGS_NAME):
        (folder / name).unlink(missing_ok=True)


def _delete_course(folder: Path) -> None:
    """Deletes checkpoints and gradient norms."""
    for checkpoint in find_checkpoints(folder).values():
        delete_checkpoint(checkpoint)
    clear_unfinished(folder)
    for norms in norm_files(folder).values():
        norms.unlink()


def _finished(name: str, value: str, max_steps: int) -> str:
    return (
        f"{name}={value!r} holds a run that is finished at max_steps={max_steps}: no step is left. Allowed: another "
        "output_dir; overwrite_output_dir=True, which starts anew; or resume_from_checkpoint with a checkpoint's path "
        "and a larger max_steps."
    )


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
    Writes what a new run is, or adds to the manifest of a continued one with what it was continued; until the run has
    written its model it does not count as finished. With `overwrite_output_dir` checkpoints and gradient norms of the
    run before go here and not earlier: a run whose model, data or arguments are refused has deleted nothing.

    Args:
        args ([`PDTTrainingArguments`]): Of the run.
        settings (`Mapping`): As given to [`find_checkpoint`].
        checkpoint (`str`, *optional*): What that returned.
    """
    folder = Path(args.output_dir)
    _mark_unfinished(folder)
    if args.overwrite_output_dir and checkpoint is None:
        _delete_course(folder)
    path = folder / MANIFEST_FILE
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
