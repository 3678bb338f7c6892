"""Reads a checkpoint of the original system with suspicion: tensors and plain values, nothing else."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .names import plain_names

PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (*PICKLES, ".safetensors")
# Of `training_state`, what says where a run stood; optimizer and scheduler are not read.
TRAINING_KEYS = ("global_step", "epoch", "stage_index", "stage_history", "best_eval_loss", "kd_scale")


@dataclass(frozen=True)
class OriginalCheckpoint:
    """
    A file of the original system.

    Args:
        state (`dict[str, torch.Tensor]`): Its tensors on the CPU, under the names of the release.
        renamed (`dict[str, str]`): Names in the file that differ from those.
        source (`dict`): File name, size in bytes, SHA-256, how the tensors lie in it, and their type.
        training (`dict`): Where the run stood, of [`TRAINING_KEYS`]; empty where the file does not say.
        left_out (`list[str]`): Entries of `training_state` that were not taken.
    """

    state: dict[str, torch.Tensor]
    renamed: dict[str, str]
    source: dict[str, Any]
    training: dict[str, Any]
    left_out: list[str]


def read_checkpoint(path: str | Path) -> OriginalCheckpoint:
    """
    Reads `adapters_step_N.pt` (nested), `adapters.pt` (bare) or a safetensors file.

    A pickle is opened with `torch.load(weights_only=True)`: no code of the file can run.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: For a file of another kind, one that holds more than tensors and plain values, and tensors that are
            not dense, floating point, finite and as large as they say.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r}, allowed: a file that ends in {', '.join(SUFFIXES)}.")
    loaded = _load(path)
    form, training = "safetensors" if path.suffix == ".safetensors" else "bare", {}
    if isinstance(loaded.get("adapters"), Mapping):
        unknown = sorted(set(map(str, loaded)) - {"adapters", "training_state"})
        if unknown:
            raise ValueError(f"{path.name} has entries {unknown} beside its tensors, allowed: training_state.")
        form, training, loaded = "nested", loaded.get("training_state") or {}, loaded["adapters"]
    for name, tensor in loaded.items():
        check_tensor(path.name, name, tensor)
    names = plain_names(loaded)
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path.name} holds a tensor twice, under an old and a new name.")
    state = {names[name]: tensor for name, tensor in loaded.items()}
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    return OriginalCheckpoint(
        state,
        {old: new for old, new in names.items() if old != new},
        {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, "form": form, "dtypes": kinds},
        *_training(path.name, training),
    )


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, what is not taken (the optimizer's state) is not read.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path.name} is not read: it holds more than tensors and plain values, or is damaged ({reason}). "
            "Only weights_only=True is ever used; ask its author for safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path.name} is damaged or no {path.suffix} file: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path.name} holds a {type(loaded).__name__}, allowed: a mapping of names to tensors.")
    return loaded


def check_tensor(file: str, name: Any, tensor: Any) -> None:
    """Raises `ValueError` unless this is a named, dense, finite floating-point tensor that is as large as it says."""
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{file}: {name!r} is a {type(tensor).__name__}, allowed: names with tensors.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise ValueError(f"{file}: {name} is {tensor.layout} {tensor.dtype}, allowed: dense floating point.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{file}: {name} says shape {list(tensor.shape)}, but repeats a smaller storage.")
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} has values that are not finite.")


def _training(file: str, training: Any) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(training, Mapping):
        raise ValueError(f"{file}: training_state is a {type(training).__name__}, allowed: a mapping.")
    kept = {key: training[key] for key in TRAINING_KEYS if training.get(key) is not None}
    for key, value in kept.items():
        if not _is_plain(value):
            raise ValueError(f"{file}: training_state.{key} is no plain value.")
    return kept, sorted(str(key) for key in training if key not in TRAINING_KEYS)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)
