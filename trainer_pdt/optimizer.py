"""The optimizer of a run: any of `transformers` that takes param groups, on the groups that stages turn on and off."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_pdt import PDTForParallelDecoding

from .arguments import PDTTrainingArguments
from .callbacks import is_gate, part_of
from .sharding import write_through

OWN_PARAMETERS = ("params", "model", "optimizer_dict")
"""Options with which some optimizers of `transformers` bring parameters of their own choice."""


def parameter_groups(parameters: Mapping[str, nn.Parameter], args: PDTTrainingArguments) -> list[dict[str, Any]]:
    """
    Param groups by component (`pdt_group`), the part `values` (`pdt_values`) and gates apart with their own rates; no
    decay on vectors and gates.

    Args:
        parameters (`Mapping[str, nn.Parameter]`): PDT parameters by name.
        args ([`PDTTrainingArguments`]): Rates and decay.
    """
    groups: dict[tuple[str, bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = parameter.dim() > 1 and not is_gate(name)
        groups.setdefault((*part_of(name), is_gate(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "pdt_group": group,
            "pdt_values": of_values,
            "lr": args.learning_rate * (args.gate_lr_scale if gates else 1.0),
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for (group, of_values, gates, decays), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def make_optimizer(
    cls: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    args: PDTTrainingArguments,
) -> torch.optim.Optimizer:
    """
    Args:
        cls (`type`), options (`Mapping[str, Any]`): From `Trainer.get_optimizer_cls_and_kwargs`.
        parameters (`Mapping[str, nn.Parameter]`), args ([`PDTTrainingArguments`]): See [`parameter_groups`].

    Raises:
        ValueError: For an optimizer that chooses its parameters itself: stages could not freeze them.
    """
    own = [name for name in OWN_PARAMETERS if name in options]
    if own:
        raise ValueError(f"optim={args.optim.value!r} brings its own {own[0]}, allowed: one that takes param groups.")
    return cls(parameter_groups(parameters, args), **options)


def group_settings(optimizer: torch.optim.Optimizer, options: Iterable[str]) -> list[dict[str, Any]]:
    """
    What a run's arguments say of each param group, without what the optimizer itself keeps there.

    Args:
        optimizer (`torch.optim.Optimizer`): New, before its schedule.
        options (`Iterable[str]`): Names of the options that it was made with.
    """
    names = {"lr", "weight_decay", *options}
    return [deepcopy({name: group[name] for name in names & group.keys()}) for group in optimizer.param_groups]


def restore_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """
    Gives an optimizer and a schedule that were loaded the settings of this run; they come with those of the run that
    saved them.

    Args:
        optimizer (`torch.optim.Optimizer`): With its state; plain or wrapped.
        scheduler (`LambdaLR`): At its step.
        settings (`list[dict]`): From [`group_settings`].
    """
    scheduler.base_lrs = [group["lr"] for group in settings]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, own, rate in zip(optimizer.param_groups, settings, scheduler.get_last_lr(), strict=True):
        group.update({**own, "initial_lr": own["lr"], "lr": rate})


class SpectralNormCallback(TrainerCallback):
    """
    Keeps the adapter's `spectral_norm` after every optimizer step.

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model in training.
    """

    def __init__(self, model: PDTForParallelDecoding) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scales down what the step has made too large."""
        stack = self.model.stack
        stack.limit_spectral_norm(stack.active)
        for part in (stack.snc, stack.pdt_stream_adapters[stack.active], stack.heads.agreement.reader):
            write_through(part)
