"""Files of a saved model: layout, code, adapter and trunk; strict reading of adapter weights."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM

from .configuration_adapter import PDTAdapterConfig
from .configuration_pdt import PDTConfig

AUTO_MAP = {
    "AutoConfig": "configuration_pdt.PDTConfig",
    "AutoModel": "modeling_pdt.PDTForParallelDecoding",
    "AutoModelForCausalLM": "modeling_pdt.PDTForParallelDecoding",
}
TRUNK_SUBFOLDER = "trunk"
HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def copy_code(folder: Path) -> None:
    """Copies the flat modelling code beside `config.json`, so that `trust_remote_code` can load it."""
    source = Path(__file__).resolve().parent
    for file in sorted(source.glob("*.py")):
        if file.name != "__init__.py" and (folder / file.name).resolve() != file:
            shutil.copyfile(file, folder / file.name)


def resolve_trunk_name(config: PDTConfig, folder_or_repo: str) -> str:
    """The trunk's Hub id or path; a relative path that exists under the model's folder is taken from there."""
    name = config.trunk_name_or_path
    if not name:
        raise ValueError(
            "config.trunk_name_or_path is empty: this model was made on a trunk without a name. Pass trunk=..., or "
            "save with include_trunk=True."
        )
    inside = Path(folder_or_repo) / name
    return str(inside) if os.path.isdir(folder_or_repo) and inside.is_dir() else name


def portable_trunk_name(name: str | None) -> str | None:
    """The trunk's name as it may be written into a file: a local path becomes absolute, a Hub id stays."""
    return str(Path(name).resolve()) if name and os.path.isdir(name) else name or None


def save_trunk(trunk: torch.nn.Module, folder: Path) -> None:
    """
    Writes the bare trunk: configuration, generation configuration and safetensors under the trunk's own names.

    The state is written by name as it is in memory; `save_pretrained` of a dequantised trunk does not round-trip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        re.sub(r"(^|\.)base_layer\.", r"\1", name): tensor
        for name, tensor in trunk.state_dict().items()
        if "pdt_" not in name
    }
    save_torch_state_dict(state, folder)
    config = trunk.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(trunk).__name__]
    config["dtype"] = str(next(trunk.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if trunk.generation_config is not None:
        trunk.generation_config.save_pretrained(folder)


def save_adapter(peft: PeftModel, adapter_name: str, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """
    Writes one adapter's configuration and safetensors into `folder`, whatever the adapter's name.

    Args:
        peft (`PeftModel`): The model that holds it.
        adapter_name (`str`): Its name in this process.
        folder (`Path`): Created if missing.
        state (`dict`, *optional*): State to save in place of the model's own, named as in `peft.state_dict()`.
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


def read_adapter_config(folder_or_repo: str, subfolder: str, hub_kwargs: dict[str, Any]) -> PDTAdapterConfig:
    """
    The adapter's configuration, read strictly.

    Raises:
        ValueError: For keys that `PDTAdapterConfig` does not know, or another PEFT method.
    """
    local = Path(folder_or_repo) / subfolder / "adapter_config.json"
    path = local if local.is_file() else None
    if path is None:
        if os.path.isdir(folder_or_repo):
            raise FileNotFoundError(f"{local} does not exist.")
        path = hf_hub_download(folder_or_repo, f"{subfolder}/adapter_config.json", **hub_kwargs)
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    if values.get("peft_type") != "PDT":
        raise ValueError(f"adapter_config.json: peft_type must be 'PDT', got {values.get('peft_type')!r}.")
    known = set(PDTAdapterConfig.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"adapter_config.json has unknown keys {unknown}; known keys are {sorted(known)}.")
    return PDTAdapterConfig(**{key: value for key, value in values.items() if key != "peft_type"})


def load_adapter_weights(
    peft: PeftModel, adapter_name: str, folder_or_repo: str, subfolder: str, hub_kwargs: dict[str, Any]
) -> None:
    """
    Loads `adapter_model.safetensors` into an injected adapter.

    Raises:
        ValueError: For a missing, an additional or a misshapen tensor, naming it.
    """
    try:
        loaded = load_peft_weights(folder_or_repo, device="cpu", subfolder=subfolder, **hub_kwargs)
    except Exception as error:
        raise ValueError(f"the adapter file in {folder_or_repo}/{subfolder} cannot be read: {error}") from error
    check_adapter_state(loaded, get_peft_model_state_dict(peft, adapter_name=adapter_name), folder_or_repo)
    set_peft_model_state_dict(peft, loaded, adapter_name=adapter_name)


def check_adapter_state(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Raises `ValueError` unless both states have the same names and shapes."""
    problems = [
        *(f"missing {name}" for name in sorted(set(expected) - set(loaded))),
        *(f"unexpected {name}" for name in sorted(set(loaded) - set(expected))),
        *(
            f"{name} has shape {list(loaded[name].shape)}, expected {list(expected[name].shape)}"
            for name in sorted(set(loaded) & set(expected))
            if loaded[name].shape != expected[name].shape
        ),
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the adapter in {where} does not fit this model: {shown}.")


def load_trunk(
    config: PDTConfig, source: str, hub_kwargs: dict[str, Any], trunk_kwargs: dict[str, Any]
) -> torch.nn.Module:
    """The trunk that `config.json` names, loaded with the caller's arguments; never with an explicit `None`."""
    name = resolve_trunk_name(config, source)
    arguments = {key: value for key, value in hub_kwargs.items() if key != "revision"}
    if name == TRUNK_SUBFOLDER and not os.path.isdir(source):
        name, arguments["subfolder"] = source, TRUNK_SUBFOLDER
        arguments.update({key: hub_kwargs[key] for key in ("revision",) if key in hub_kwargs})
    elif config.trunk_revision is not None:
        arguments["revision"] = config.trunk_revision
    for key in ("_attn_implementation", "_experts_implementation"):
        value = config.__dict__.get(f"{key}_internal")
        if value is not None:
            trunk_kwargs.setdefault(key.removeprefix("_"), value)
    return AutoModelForCausalLM.from_pretrained(name, **arguments, **trunk_kwargs)


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
    """
    Uploads a saved model to `repo_id`, made if missing; returns the commit's address.

    Raises:
        ValueError: When the model refers to a trunk on this machine, which nobody else could load.
    """
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("trunk_name_or_path")
    if name != TRUNK_SUBFOLDER and os.path.isdir(name or ""):
        raise ValueError(
            f"trunk_name_or_path={name!r} is a local folder; for an upload it must be a Hub id, or use "
            "include_trunk=True."
        )
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    message = kwargs.pop("commit_message", "Upload PDT adapters")
    return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message, **kwargs))
