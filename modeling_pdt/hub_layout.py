"""Files of a saved model beside its adapter: configuration, code, trunk; and their way to the Hub."""

import inspect
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapter_files import check_inside
from .configuration_pdt import PDTConfig
from .generation_trunk import generate as generate_on_trunk

AUTO_MAP = {
    "AutoConfig": "configuration_pdt.PDTConfig",
    "AutoModel": "modeling_pdt.PDTForParallelDecoding",
    "AutoModelForCausalLM": "modeling_pdt.PDTForParallelDecoding",
}
TRUNK_SUBFOLDER = "trunk"
CUSTOM_GENERATE_FILE = "custom_generate/generate.py"
HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def copy_code(folder: Path) -> None:
    """
    Copies the flat modelling code beside `config.json`, where `trust_remote_code` loads it from, and what a plain
    trunk runs with `custom_generate=` into the folder that transformers asks for.
    """
    source = Path(__file__).resolve().parent
    for file in sorted(source.glob("*.py")):
        if file.name != "__init__.py" and (folder / file.name).resolve() != file:
            shutil.copyfile(file, folder / file.name)
    (folder / CUSTOM_GENERATE_FILE).parent.mkdir(exist_ok=True)
    shutil.copyfile(inspect.getsourcefile(generate_on_trunk), folder / CUSTOM_GENERATE_FILE)


def resolve_trunk_name(config: PDTConfig, folder_or_repo: str) -> str:
    """
    The trunk's Hub id or path; a relative path that exists under the model's folder is taken from there.

    Raises:
        ValueError: When there is no name, one of a folder that does not exist, or one that leads out of the folder or
            out of the Hub.
    """
    name = config.trunk_name_or_path
    if not name:
        raise ValueError(
            "config.trunk_name_or_path is empty: this model was made on a trunk without a name. Pass trunk=..., or "
            "save with include_trunk=True."
        )
    is_folder = os.path.isdir(folder_or_repo)
    if is_folder and (Path(folder_or_repo) / name).is_dir() and not os.path.isabs(name):
        check_trunk_files(folder_or_repo, name)
        return str(check_inside(folder_or_repo, name))
    if is_folder and os.path.isabs(name):
        if not os.path.isdir(name):
            raise ValueError(
                f"trunk_name_or_path={name!r} in the config.json of {folder_or_repo}, allowed: a folder that exists, "
                "or a Hub id. If the trunk was moved, pass trunk=... or trunk_name_or_path=..., or edit config.json."
            )
        return name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"trunk_name_or_path={name!r} in the config.json of {folder_or_repo}, allowed: a Hub id"
            f"{', an absolute path, or a folder inside' if is_folder else ' or ' + repr(TRUNK_SUBFOLDER)}."
        ) from error
    return name


def check_trunk_files(folder: str | os.PathLike, name: str) -> None:
    """
    Refuses a trunk inside a model's folder whose files are elsewhere, be it by links or by an index of shards.

    Raises:
        ValueError: Naming what leads out of `folder`.
    """
    root = check_inside(folder, name)
    for path in root.rglob("*"):
        check_inside(folder, str(path.relative_to(folder)))
    for index in root.glob("*.index.json"):
        for shard in set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()):
            check_inside(folder, os.path.join(name, shard))


def portable_trunk_name(name: str | None) -> str | None:
    """The trunk's name as it may be written into a file: a local path becomes absolute, a Hub id stays."""
    return str(Path(name).resolve()) if name and os.path.isdir(name) else name or None


def public_name(config: PDTConfig) -> str | None:
    """The trunk's name if it means the same to everybody: a Hub id."""
    name = config.trunk_name_or_path
    return None if not name or name == TRUNK_SUBFOLDER or os.path.isdir(name) else name


def quantizer_of(trunk: torch.nn.Module) -> HfQuantizer | None:
    """
    What keeps the trunk's weights quantised; `None` when they are plain numbers.

    transformers leaves the quantizer of a choice like `Mxfp4Config(dequantize=True)` on a trunk whose checkpoint was
    not quantised in the first place.
    """
    quantizer = getattr(trunk, "hf_quantizer", None)
    return None if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False) else quantizer


def save_trunk(trunk: torch.nn.Module, folder: Path) -> None:
    """
    Writes the bare trunk: configuration, generation configuration and safetensors under the trunk's own names.

    The state is written by name as it is in memory; `save_pretrained` of a dequantised trunk does not round-trip.

    Raises:
        ValueError: For a trunk whose weights are quantised: under their names in memory nobody could load them.
    """
    quantizer = quantizer_of(trunk)
    if quantizer is not None:
        method = getattr(quantizer.quantization_config.quant_method, "value", "unknown")
        raise ValueError(
            f"include_trunk=True, allowed: with a trunk that is not quantised, but its weights are ({method}). Save "
            "without the trunk, which config.json names, or load it dequantised."
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        re.sub(r"(^|\.)base_layer\.", r"\1", name): tensor
        for name, tensor in trunk.state_dict().items()
        if "pdt_" not in name
    }
    save_torch_state_dict(state, folder)
    config = trunk.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(trunk).__name__]
    config["dtype"] = str(next(trunk.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if trunk.generation_config is not None:
        trunk.generation_config.save_pretrained(folder)


def load_trunk(
    config: PDTConfig, source: str, hub_kwargs: dict[str, Any], trunk_kwargs: dict[str, Any]
) -> torch.nn.Module:
    """The trunk that `config.json` names, loaded with the caller's arguments; never with an explicit `None`."""
    name = resolve_trunk_name(config, source)
    quantization = trunk_kwargs.get("quantization_config", {})
    if not isinstance(quantization, (dict, QuantizationConfigMixin)):
        raise ValueError(
            f"quantization_config={quantization!r}, allowed: a configuration such as transformers.BitsAndBytesConfig, "
            "or its dict."
        )
    arguments = {key: value for key, value in hub_kwargs.items() if key != "revision"}
    # What the auto class asks for by itself follows the same choices.
    arguments["adapter_kwargs"] = {k: v for k, v in arguments.items() if k in ("cache_dir", "local_files_only")}
    # Pickles are not opened, unless the caller asks for it.
    trunk_kwargs.setdefault("use_safetensors", True)
    if name == TRUNK_SUBFOLDER and not os.path.isdir(source):
        name, arguments["subfolder"] = source, TRUNK_SUBFOLDER
        arguments.update({key: hub_kwargs[key] for key in ("revision",) if key in hub_kwargs})
    elif config.trunk_revision is not None:
        if os.path.isdir(name):
            raise ValueError(f"trunk_revision={config.trunk_revision!r}, allowed: None, the trunk {name} is a folder.")
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
    links = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink())
    if links:
        raise ValueError(f"{folder} holds links, whose targets would be uploaded: {links}, allowed: plain files.")
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    revision = kwargs.get("revision")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    message = kwargs.pop("commit_message", "Upload PDT adapters")
    return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message, **kwargs))
