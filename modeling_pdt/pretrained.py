"""Loading, saving and publishing of the model, and several named adapters on one trunk."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers.utils import resolve_revision

from .adapter_files import (
    check_adapter_state,
    check_inside,
    read_adapter_config,
    read_adapter_state,
    save_adapter,
)
from .adapter_model import adapter_shapes, check_bare, register_pdt
from .configuration_adapter import PDTAdapterConfig
from .configuration_generation import PDTGenerationConfig
from .configuration_pdt import PDTConfig
from .hub_layout import (
    AUTO_MAP,
    HUB_KEYS,
    TRUNK_SUBFOLDER,
    copy_code,
    load_trunk,
    public_name,
    save_trunk,
    upload,
)

# Arguments of the auto classes that are not for the trunk.
AUTO_KEYS = ("adapter_kwargs", "trust_remote_code", "_from_auto", "_commit_hash", "code_revision")


class PDTPretrained:
    """The part of `PDTForParallelDecoding` that deals with files and with named adapters."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        trunk: nn.Module | None = None,
        config: PDTConfig | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "PDTPretrained":
        """
        Trained adapters, and the trunk they were trained on.

        Everything is read and checked before the trunk is touched: after an error a given trunk is as it was.

        Args:
            pretrained_model_name_or_path (`str`): Folder or Hub repository.
            trunk (`nn.Module`, *optional*): A loaded trunk; default: the one that `config.json` names.
            config (`PDTConfig`, *optional*): A ready configuration.
            is_trainable (`bool`, *optional*, defaults to `False`): Leave the adapters trainable.
            kwargs: Hub arguments (`revision`, `token`, `cache_dir`, `local_files_only`, ...), and arguments of the
                trunk's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `quantization_config`, ...);
                fields of `PDTConfig` override the saved ones. `revision` is the adapters'; the trunk's is in
                `config.json`. The trunk is loaded from safetensors, unless `use_safetensors=False` is given.

        Raises:
            ValueError: For an adapter that does not fit: missing, additional, misshapen or not finite tensors, unknown
                keys, names that lead out of the folder.
        """
        register_pdt()
        source = str(pretrained_model_name_or_path)
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KEYS if kwargs.get(key) is not None}
        for key in (*AUTO_KEYS, *HUB_KEYS):
            kwargs.pop(key, None)
        if os.path.isdir(source):
            for name in ("config.json", "generation_config.json"):
                check_inside(source, name)
        else:
            hub_kwargs["revision"] = pinned_revision(source, hub_kwargs)
        config = PDTConfig.from_pretrained(source, **hub_kwargs) if config is None else copy.deepcopy(config)
        for key in [key for key in kwargs if key in PDTConfig.own_fields()]:
            setattr(config, key, kwargs.pop(key))
        config.check()
        generation_config = PDTGenerationConfig.from_pretrained(source, **hub_kwargs)
        adapter_config, state = read_adapter(source, config.adapter_subfolder, is_trainable, hub_kwargs)
        trunk_kwargs = {key: value for key, value in kwargs.items() if value is not None}
        if trunk is None:
            trunk = load_trunk(config, source, hub_kwargs, trunk_kwargs)
        elif trunk_kwargs:
            raise ValueError(f"{sorted(trunk_kwargs)} are arguments for loading a trunk, but trunk= was given.")
        check_bare(trunk)
        check_adapter_state(state, adapter_shapes(adapter_config, trunk), source)
        peft = get_peft_model(trunk, adapter_config)
        set_peft_model_state_dict(peft, state)
        model = cls(config, peft)
        model.generation_config = generation_config
        model.config._name_or_path = source
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        include_trunk: bool = False,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Writes `config.json`, code, `generation_config.json` and `adapter/`; the trunk only when asked.

        Args:
            save_directory (`str`): Created if missing.
            include_trunk (`bool`, *optional*, defaults to `False`): Also write `trunk/` and refer to it.
            is_main_process (`bool`, *optional*, defaults to `True`): Only the main process writes.
            state_dict (`dict`, *optional*): State to save in place of the model's own (gathered by a sharded trainer).
            push_to_hub (`bool`, *optional*, defaults to `False`): Then upload what this call wrote, and nothing else
                that lies in the folder.
            safe_serialization (`bool`, *optional*, defaults to `True`): Nothing else, weights are never pickled.
            kwargs: Only with `push_to_hub`: `repo_id`, by default the folder's name, and what [`push_to_hub`] takes.

        Raises:
            ValueError: For a folder that is a file, or an unknown argument; nothing is written then.
        """
        if not safe_serialization:
            raise ValueError(f"safe_serialization={safe_serialization!r}, allowed: True, weights are never pickled.")
        if kwargs and not push_to_hub:
            raise ValueError(f"save_pretrained() got {sorted(kwargs)}, allowed: only with push_to_hub=True.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must be a folder, got the file {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        config = PDTConfig.from_dict({**self.config.to_dict(), "auto_map": AUTO_MAP})
        if include_trunk:
            save_trunk(self.trunk, folder / TRUNK_SUBFOLDER)
            config.trunk_name_or_path, config.trunk_revision = TRUNK_SUBFOLDER, None
        # Not the object's own class: FSDP2 gives a model one of another name.
        config.architectures = [AUTO_MAP["AutoModel"].rpartition(".")[2]]
        config.auto_map = dict(AUTO_MAP)
        config.save_pretrained(folder)
        copy_code(folder)
        self.generation_config.save_pretrained(folder)
        adapter_state = None
        if state_dict is not None:
            adapter_state = {key.removeprefix("peft."): value for key, value in state_dict.items()}
        base_name = public_name(self.config)
        base_revision = None if base_name is None else self.config.trunk_revision
        subfolder = folder / config.adapter_subfolder
        save_adapter(self.peft, self.stack.active, subfolder, adapter_state, base_name, base_revision)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.resolve().name)
            self.push_to_hub(repo_id, include_trunk, state_dict=state_dict, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        include_trunk: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> str:
        """
        Saves to a temporary folder and uploads it; returns the commit's address.

        Args:
            repo_id (`str`): Made if missing.
            include_trunk (`bool`, *optional*, defaults to `False`): Also upload the trunk.
            state_dict (`dict`, *optional*): See [`save_pretrained`].
            kwargs: `private`, `token`, `revision` (a branch, made if missing), `commit_message`, `create_pr`, and what
                else `HfApi.upload_folder` takes.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_trunk=include_trunk, state_dict=state_dict)
            return upload(Path(folder), repo_id=repo_id, **kwargs)

    # --- named adapters ---

    def add_adapter(self, adapter_config: PDTAdapterConfig, adapter_name: str = "default") -> None:
        """Adds a new, untrained adapter to the trunk beside the others; the active one stays active."""
        if getattr(adapter_config, "peft_type", None) != "PDT":
            raise ValueError(
                f"adapter_config must be a PDTAdapterConfig, got {type(adapter_config).__name__}: another PEFT method "
                "beside PDT is not possible. Merge it into the trunk first (merge_and_unload)."
            )
        self._check_new(adapter_name)
        self.peft.add_adapter(adapter_name, adapter_config.untrained())

    def load_adapter(
        self,
        folder_or_repo: str | os.PathLike,
        adapter_name: str,
        subfolder: str = "adapter",
        is_trainable: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        """
        Loads another adapter for this trunk beside the others; the active one stays active.

        Block protocol and generation configuration stay this model's.

        Args:
            folder_or_repo (`str`): Of a saved model, or of its adapter with `subfolder=""`.
            adapter_name (`str`): Its name here.
            subfolder (`str`, *optional*, defaults to `"adapter"`): Folder of the adapter inside.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether [`set_adapter`] makes it trainable.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: For a name in use, or an adapter that does not fit; the model is then as it was.
        """
        unknown = sorted(set(hub_kwargs) - set(HUB_KEYS))
        if unknown:
            raise ValueError(f"load_adapter() got unknown arguments {unknown}, allowed: {list(HUB_KEYS)}.")
        self._check_new(adapter_name)
        source = str(folder_or_repo)
        if not os.path.isdir(source):
            hub_kwargs["revision"] = pinned_revision(source, hub_kwargs)
        config, state = read_adapter(source, subfolder, is_trainable, hub_kwargs)
        check_adapter_state(state, adapter_shapes(config, self.trunk), source)
        self.peft.add_adapter(adapter_name, config)
        set_peft_model_state_dict(self.peft, state, adapter_name=adapter_name)

    def set_adapter(self, adapter_name: str) -> None:
        """
        Makes this adapter the one that `forward`, `generate` and `save_pretrained` use.

        Its parameters become trainable, unless it was loaded for inference.
        """
        self._check_known(adapter_name)
        config = self.peft.peft_config[adapter_name]
        self.peft.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self.config.attach_adapter(config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter that is not active."""
        self._check_known(adapter_name)
        if adapter_name == self.stack.active:
            raise ValueError(
                f"adapter_name={adapter_name!r} is the active adapter: activate another one first (set_adapter), or "
                "take back the trunk (unload)."
            )
        self.peft.delete_adapter(adapter_name)

    def active_adapters(self) -> list[str]:
        """Name of the one active adapter, in a list as transformers has it."""
        return [self.stack.active]

    def disable_adapters(self) -> None:
        """Makes the model its trunk until [`enable_adapters`]; [`disable_adapter`] does it within a context."""
        self.peft.base_model.disable_adapter_layers()

    def enable_adapters(self) -> None:
        """Undoes [`disable_adapters`]."""
        self.peft.base_model.enable_adapter_layers()

    def unload(self) -> nn.Module:
        """The trunk, without any adapter and exactly as it was; this model cannot be used afterwards."""
        return self.peft.unload()

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.peft.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}, allowed: one of {sorted(self.peft.peft_config)}.")

    def _check_new(self, adapter_name: str) -> None:
        if adapter_name in self.peft.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is in use; delete_adapter it first or choose another.")


def pinned_revision(repo: str, hub_kwargs: dict[str, Any]) -> str | None:
    """The revision asked for, bound to one commit: all files of a load come from the same state of the repository."""
    known = {
        key: hub_kwargs[key] for key in ("revision", "token", "local_files_only", "cache_dir") if key in hub_kwargs
    }
    return resolve_revision(repo, **known)


def read_adapter(
    source: str, subfolder: str, is_trainable: bool, hub_kwargs: dict[str, Any]
) -> tuple[PDTAdapterConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a saved adapter."""
    config = read_adapter_config(source, subfolder, hub_kwargs)
    config.inference_mode = not is_trainable
    return config, read_adapter_state(source, subfolder, hub_kwargs)
