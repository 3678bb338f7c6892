"""
Parallel decoding for somebody who has a plain trunk.

`trunk.generate(..., custom_generate=repo, trust_remote_code=True, num_streams=3)` runs this file: it is saved as
`custom_generate/generate.py`, too, where transformers looks for it, and therefore imports nothing from beside it.
"""

import sys
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MODEL_CLASS = "modeling_pdt.PDTForParallelDecoding"
HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def generate(model: PreTrainedModel, adapter: str | None = None, **arguments: Any) -> Any:
    """
    Lends the trunk to the adapters of a repository for one call, and leaves it as it was.

    The adapters stay in memory for the next call; the trunk's weights, modules, gradients and modes do not change.

    Args:
        model (`PreTrainedModel`): The trunk that the adapters were trained on.
        adapter (`str`, *optional*): Folder or repository of the adapters; default: the one given as `custom_generate`.
        arguments: Of `PDTForParallelDecoding.generate`, and Hub arguments (`revision`, `token`, ...).

    Returns:
        As `PDTForParallelDecoding.generate`.

    Raises:
        ValueError: For adapters that do not fit this trunk, or an argument that parallel decoding does not have.
    """
    # transformers does not tell this function where it was loaded from; its caller's argument does.
    source = adapter or sys._getframe(1).f_locals.get("custom_generate")
    if not isinstance(source, str):
        raise ValueError(f"adapter={adapter!r}, allowed: the folder or repository that holds the adapters.")
    hub_kwargs = {key: arguments.pop(key) for key in HUB_KEYS if arguments.get(key) is not None}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if "inputs" in arguments:
        arguments["input_ids"] = arguments.pop("inputs")
    name = model.base_model_prefix
    bare, modes = getattr(model, name), [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        key, pdt, stack = vars(model).get("_pdt_lent", (None, None, None))
        if key == (source, hub_kwargs.get("revision")):
            stack._move_adapter_to_device_of_base_layer(stack.active)
            setattr(model, name, stack)
        else:
            pdt_class = get_class_from_dynamic_module(MODEL_CLASS, source, **hub_kwargs)
            pdt = pdt_class.from_pretrained(source, trunk=model, **hub_kwargs)
            vars(model)["_pdt_lent"] = ((source, hub_kwargs.get("revision")), pdt, getattr(model, name))
        model.eval()
        with torch.no_grad():
            return pdt.generate(**arguments)
    finally:
        setattr(model, name, bare)
        vars(model).pop("peft_config", None)
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in modes:
            module.training = True
