"""What DeepSpeed and FSDP2 have to do otherwise for a small part that learns inside a large frozen trunk."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from modeling_pdt import PDTForParallelDecoding


def keep_gathered(engine: Any, parameters: Iterable[nn.Parameter]) -> None:
    """
    Keeps parameters whole on every process under ZeRO-3; the other ones, gradients and optimizer states stay sharded.

    PDT's parameters are also used outside their own module's `forward`, where ZeRO-3 does not gather them; the
    language-model head runs as often as a process has chunks of logits, and gathering needs all processes each time.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): Other stages than ZeRO-3 are left alone.
        parameters (`Iterable[nn.Parameter]`): What learns, and the head.
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
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_set_local_fp32_param

            # Its own setter of whole values leaves out the padding of what the processes do not share evenly.
            size, rank = parameter.ds_tensor.numel(), distributed.get_rank()
            values = parameter.detach().float().flatten()
            values = nn.functional.pad(values, (0, size * distributed.get_world_size() - values.numel()))
            safe_set_local_fp32_param(parameter, values[rank * size :][:size])
            parameter.partition([parameter], has_been_updated=True)
            parameter.all_gather([parameter])
        elif hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, parameter.detach().float())


def is_trunk_sharded(accelerator: Accelerator) -> bool:
    """Whether a backward pass needs all processes, as it does under ZeRO-3 and FSDP2."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.is_fsdp2 or (deepspeed is not None and deepspeed.zero_stage == 3)


def shard_trunk(model: PDTForParallelDecoding, accelerator: Accelerator) -> None:
    """
    FSDP2 for the trunk's decoder layers; what learns, embeddings and head stay whole on every process.

    Whole parameters are ordinary ones: gradient masks, averaged weights, optimizer and checkpoints are those of data
    parallel training. Their gradients are the caller's business, see [`average_gradients`].

    Args:
        model (`PDTForParallelDecoding`): On any device; comes to the accelerator's.
        accelerator (`Accelerator`): With an FSDP plugin.

    Raises:
        ValueError: For an option of the plugin that would shard, move or wrap more than that.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    choices = (
        ("fsdp_version", plugin.fsdp_version, 2),
        ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),
        ("activation_checkpointing", plugin.activation_checkpointing, False),
    )
    for name, value, allowed in choices:
        if value != allowed:
            raise ValueError(f"{name}={value}, allowed: {allowed}; a field of the launch configuration's fsdp_config.")
    mesh = distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = model.stack.base_layer.layers
    sharded = {id(parameter) for parameter in layers.parameters()}
    whole = {parameter for parameter in model.parameters() if id(parameter) not in sharded}
    for parameter in whole:
        parameter.data = parameter.data.to(accelerator.device)
    for parameter in model.pdt_parameters().values():
        distributed.broadcast(parameter.data, src=0)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    # Without parameters of its own, the root lets layers fetch theirs ahead of time.
    fully_shard(model, mesh=mesh, ignored_params=whole)
    # Autocast and nothing else: accelerate leaves it out where it prepares a model for FSDP2.
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Replaces gradients by their mean over all processes.

    Args:
        parameters (`Iterable[nn.Parameter]`): Whole ones with a gradient, in the same order on every process.
    """
    world = distributed.get_world_size()
    for parameter in parameters:
        distributed.all_reduce(parameter.grad)
        parameter.grad /= world
