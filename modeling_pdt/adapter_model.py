"""The PEFT tuner of method ``PDT`` and its registration with PEFT."""

from typing import Any

import torch
from peft import PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from .adapter_files import check_adapter_state
from .adapter_layer import PDTStack, parameter_path_components
from .configuration_adapter import PDTAdapterConfig
from .trunk_split import check_layer_parts, check_trunk


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """
    Refuses adapter names that equal a component of a parameter's path: PEFT would drop tensors when saving them.

    Raises:
        ValueError: Naming the adapter name.
    """
    taken = {part for name, _ in model.named_modules() for part in name.split(".")}
    taken |= {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    taken |= parameter_path_components()
    taken -= set(getattr(model, "peft_config", {})) - {adapter_name}
    if adapter_name in taken or adapter_name.isdigit() or "." in adapter_name or adapter_name.startswith("pdt"):
        raise ValueError(
            f"adapter_name must not be a component of a parameter name, contain '.', or start with 'pdt', "
            f"got {adapter_name!r}."
        )


def check_bare(trunk: nn.Module) -> None:
    """
    Refuses a trunk that carries adapters already: PDT's own belong to another model, and others would be frozen, lost
    on saving, and mistaken for the trunk.

    Raises:
        ValueError: Naming the layers and what to do about them.
    """
    found = sorted({type(module).__name__ for module in trunk.modules() if isinstance(module, BaseTunerLayer)})
    if "PDTStack" in found:
        raise ValueError(
            "this trunk carries PDT adapters already: load or add others on the model that has them (load_adapter, "
            "add_adapter), or take back the trunk with unload()."
        )
    if found:
        raise ValueError(
            f"this trunk carries adapters of another method (layers {found}), which cannot stand beside PDT: merge "
            "them into the trunk (merge_and_unload) or remove them (unload) first."
        )


def fit_to_trunk(config: PDTAdapterConfig, trunk: nn.Module) -> str:
    """
    Fills in what depends on the trunk, or checks it; returns the attribute name of the trunk's stack.

    Raises:
        ValueError: For a trunk that cannot be wrapped, or a configuration made for another one.
    """
    name = check_trunk(trunk)
    trunk_config = trunk.config.get_text_config(decoder=True)
    config.resolve(trunk_config.hidden_size, trunk_config.num_hidden_layers, trunk_config.num_attention_heads)
    if config.snc_placement == "after_attention":
        check_layer_parts(getattr(trunk, name), config.instrumented_layers)
    return name


def adapter_shapes(config: PDTAdapterConfig, trunk: nn.Module) -> dict[str, torch.Size]:
    """
    Names and shapes that an adapter's file must have on this trunk.

    Nothing is allocated and the trunk stays as it is, so a configuration that nobody has checked can be asked.
    """
    name = fit_to_trunk(config, trunk)
    stack = getattr(trunk, name)
    with torch.device("meta"):
        wrapped = PDTStack(getattr(stack, "base_layer", stack), "default", config)
    return {
        f"base_model.model.{name}.{PDTTuner._remove_adapter_name_from_key(key, 'default')}": tensor.shape
        for container in PDTStack.adapter_layer_names
        for key, tensor in getattr(wrapped, container).state_dict(prefix=f"{container}.").items()
    }


class PDTTuner(BaseTuner):
    """Wraps the trunk's stack of decoder layers into a [`PDTStack`] and freezes the trunk."""

    prefix: str = "pdt_"
    tuner_layer_cls = PDTStack
    target_module_mapping: dict[str, list[str]] = {}
    holds_trunk = False
    # transformers' own `load_adapter` refuses tuners whose state is more than one tensor per target.
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Checks trunk, adapter name and configuration before anything changes, then injects."""
        config = self.peft_config[adapter_name]
        try:
            if not self.holds_trunk:
                check_bare(model)
            check_adapter_name(adapter_name, model)
            name = fit_to_trunk(config, model)
        except Exception:
            if len(self.peft_config) > 1:
                self.peft_config.pop(adapter_name, None)
            raise
        config.target_modules = [name]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.holds_trunk = True

    def _prepare_adapter_config(self, peft_config: PDTAdapterConfig, model_config: dict) -> PDTAdapterConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PDTAdapterConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: PDTAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, PDTStack):
            target.update_layer(adapter_name, peft_config)
        else:
            self._replace_module(parent, target_name, PDTStack(target, adapter_name, peft_config), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PDTAdapterConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT would skip what is missing, and load an additional tensor even into the trunk."""
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        check_adapter_state(state_dict, {name: tensor.shape for name, tensor in own.items()}, f"{adapter_name!r}")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in PDTStack.adapter_layer_names:
            key = key.replace(f"{container}.{adapter_name}.", f"{container}.")
        return key


def register_pdt() -> None:
    """
    Enters method ``PDT`` into PEFT's tables, once per process.

    PEFT has no public way to add a member to its enum of methods, so the member is built here. A second copy of this
    file (remote code beside the installed package) finds the method registered and leaves it as it is.
    """
    if "PDT" not in PeftType.__members__:
        member = str.__new__(PeftType, "PDT")
        member._name_ = "PDT"
        member._value_ = "PDT"
        type.__setattr__(PeftType, "PDT", member)
        PeftType._member_names_.append("PDT")
        PeftType._member_map_["PDT"] = member
        PeftType._value2member_map_["PDT"] = member
    if PeftType("PDT") not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="pdt", config_cls=PDTAdapterConfig, model_cls=PDTTuner, prefix=PDTTuner.prefix)


register_pdt()
