"""What DeepSpeed has to do otherwise for a small part that learns inside a large frozen trunk."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def keep_gathered(engine: Any, parameters: Iterable[nn.Parameter]) -> None:
    """
    Keeps what learns whole on every process under ZeRO-3; the trunk, its gradients and optimizer states stay sharded.

    PDT's parameters are also used outside their own module's `forward`, where ZeRO-3 does not gather them.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): Other stages than ZeRO-3 are left alone.
        parameters (`Iterable[nn.Parameter]`): The parameters that learn.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    # DeepSpeed's own list: it gathers these after every step and every checkpoint.
    persistent = engine.optimizer.persistent_parameters if sharded else []
    known = {id(parameter) for parameter in persistent}
    for parameter in sharded:
        # Persistent alone is not enough: until DeepSpeed knows the order of modules, each frees all that it holds.
        parameter.ds_persist = parameter.is_external_param = True
        if id(parameter) not in known:
            persistent.append(parameter)
    if persistent:
        persistent[0].all_gather(persistent)


def optimizer_tensors(optimizer: torch.optim.Optimizer, group: int) -> list[torch.Tensor]:
    """
    The tensors under which an optimizer keeps the state of one of its `param_groups`.

    Args:
        optimizer (`torch.optim.Optimizer`): Plain, or wrapped by accelerate; ZeRO-3 keeps slices outside its groups.
        group (`int`): Index of the group.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    owners = getattr(inner, "sub_group_to_group_id", None)
    if owners is None:
        return optimizer.param_groups[group]["params"]
    return [slices for part, slices in enumerate(inner.fp32_partitioned_groups_flat) if owners[part] == group]


@torch.no_grad()
def write_through(module: nn.Module) -> None:
    """
    Makes the optimizer see weights that were set by hand: DeepSpeed steps a copy of its own and would restore it.

    Args:
        module (`nn.Module`): Its parameters are whole, see [`keep_gathered`]. Without DeepSpeed nothing happens.
    """
    for parameter in module.parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, parameter.detach().float())
        if hasattr(parameter, "ds_id"):
            parameter.partition([parameter], has_been_updated=True)
            parameter.all_gather([parameter])
