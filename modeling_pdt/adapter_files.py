"""Files of one adapter, written whole and read with suspicion: they may come from anybody."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, load_state_dict_from_file
from peft import PeftModel, set_peft_model_state_dict

from .configuration_adapter import PDTAdapterConfig

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"


def check_inside(folder: str | os.PathLike, name: str) -> Path:
    """
    The path of a file or folder below `folder`.

    In a snapshot of the Hub's cache the files are links into the same repository's cache; that is inside, too.

    Raises:
        ValueError: When `name`, or a link on the way, leads out of the folder.
    """
    path, root = Path(folder) / name, Path(folder).resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{name!r} leads out of {folder} to {path.resolve()}; only files inside are read.")
    return path


def find_file(folder_or_repo: str, name: str, hub_kwargs: dict[str, Any]) -> Path:
    """
    A model's file by its name relative to the root: in a folder, or fetched from the Hub.

    Raises:
        FileNotFoundError: When a folder does not hold it.
        ValueError: When it leads out of the folder.
    """
    if not os.path.isdir(folder_or_repo):
        return Path(hf_hub_download(folder_or_repo, name, **hub_kwargs))
    path = check_inside(folder_or_repo, name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    return path


def _below(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def save_adapter(
    peft: PeftModel,
    adapter_name: str,
    folder: Path,
    state: dict[str, torch.Tensor] | None,
    base_name: str | None,
    base_revision: str | None = None,
) -> None:
    """
    Writes one adapter's configuration and safetensors into `folder`, whatever the adapter's name.

    Args:
        peft (`PeftModel`): The model that holds it.
        adapter_name (`str`): Its name in this process.
        folder (`Path`): Created if missing.
        state (`dict`, *optional*): State to save in place of the model's own, named as in `peft.state_dict()`.
        base_name (`str`, *optional*): The trunk's Hub id, for the adapter's configuration.
        base_revision (`str`, *optional*): The trunk's commit, for the same.
    """
    peft.save_pretrained(
        str(folder),
        selected_adapters=[adapter_name],
        save_embedding_layers=False,
        **({} if state is None else {"state_dict": state}),
    )
    # PEFT writes any adapter that is not called "default" into a folder of its name.
    named = folder / adapter_name
    if adapter_name != "default":
        for file in named.iterdir():
            file.replace(folder / file.name)
        named.rmdir()
    # The card is written for the whole repository; PEFT's own would name a folder of this machine as base model.
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base_name, "revision": base_revision}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_config(folder_or_repo: str, subfolder: str, hub_kwargs: dict[str, Any]) -> PDTAdapterConfig:
    """
    The adapter's configuration, read strictly.

    Raises:
        ValueError: For keys that `PDTAdapterConfig` does not know, or another PEFT method.
    """
    path = find_file(folder_or_repo, _below(subfolder, ADAPTER_CONFIG_FILE), hub_kwargs)
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("peft_type") != "PDT":
        raise ValueError(f"adapter_config.json: peft_type must be 'PDT', got {values.get('peft_type')!r}.")
    known = set(PDTAdapterConfig.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"adapter_config.json has unknown keys {unknown}; known keys are {sorted(known)}.")
    return PDTAdapterConfig(**{key: value for key, value in values.items() if key != "peft_type"})


def read_adapter_state(folder_or_repo: str, subfolder: str, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    The tensors of `adapter_model.safetensors`, on the CPU; a pickle is never looked for.

    Raises:
        ValueError: When the file is missing, damaged, or no safetensors file.
    """
    try:
        path = find_file(folder_or_repo, _below(subfolder, ADAPTER_WEIGHTS_FILE), hub_kwargs)
        return load_state_dict_from_file(path, map_location="cpu")
    except Exception as error:
        raise ValueError(f"the adapter file in {folder_or_repo}/{subfolder} cannot be read: {error}") from error


def check_adapter_state(loaded: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
    """Raises `ValueError` unless `loaded` has exactly these names and shapes, and finite values."""
    both = sorted(set(loaded) & set(shapes))
    problems = [
        *(f"missing {name}" for name in sorted(set(shapes) - set(loaded))),
        *(f"unexpected {name}" for name in sorted(set(loaded) - set(shapes))),
        *(
            f"{name} has shape {list(loaded[name].shape)}, expected {list(shapes[name])}"
            for name in both
            if loaded[name].shape != shapes[name]
        ),
        *(f"{name} has type {loaded[name].dtype}" for name in both if not loaded[name].is_floating_point()),
        *(f"{name} has values that are not finite" for name in both if not loaded[name].isfinite().all()),
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the adapter in {where} does not fit this model: {shown}.")


def load_adapter_weights(
    peft: PeftModel, adapter_name: str, folder_or_repo: str, subfolder: str, hub_kwargs: dict[str, Any]
) -> None:
    """
    Loads `adapter_model.safetensors` into an injected adapter.

    Raises:
        ValueError: For a missing, an additional, a misshapen or a not finite tensor, naming it.
    """
    set_peft_model_state_dict(
        peft, read_adapter_state(folder_or_repo, subfolder, hub_kwargs), adapter_name=adapter_name
    )
