"""Carries the curriculum out: who learns at which step, what a stage begins with, and what a run writes down."""

import time
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from modeling_pdt import PDTForParallelDecoding

from .curriculum import PARAMETER_GROUPS, Curriculum, Stage
from .guard import LossGuard
from .sharding import optimizer_tensors, write_through
from .telemetry import write_report, write_stage_history

logger = logging.get_logger(__name__)

_GROUP_OF_PART = {
    "pdt_snc": "snc",
    "note_norm": "snc",
    "pdt_stream_adapters": "stream_adapters",
    "writer": "writer",
    "encoder": "encoder",
    "item_encoder": "encoder",
    "planner": "planner",
    "coverage": "coverage",
    "agreement": "agreement",
    "stream": "stream",
}


def parameter_group(name: str) -> str:
    """
    The group of `PARAMETER_GROUPS` that a PDT parameter belongs to.

    Args:
        name (`str`): Full name, for example ``"...pdt_heads.default.writer.key.weight"``.
    """
    parts = name.split(".")
    container = next((part for part in parts if part.startswith("pdt_")), None)
    if container == "pdt_heads":
        container = parts[parts.index(container) + 2]
    if container not in _GROUP_OF_PART:
        raise ValueError(f"{name} belongs to no parameter group, allowed: parts of {sorted(_GROUP_OF_PART)}.")
    return _GROUP_OF_PART[container]


def is_gate(name: str) -> bool:
    """Whether a parameter is the gate logit of an SNC site."""
    return name.endswith(".gate.logit")


def carries_values(name: str) -> bool:
    """Whether a PDT parameter is of the part `values`: the writer's output, SNC's values and outputs."""
    is_projection = name.endswith(("v_proj.weight", "o_proj.weight"))
    return name.endswith(".writer.out.weight") or (is_projection and parameter_group(name) == "snc")


def part_of(name: str) -> tuple[str, bool]:
    """What a stage may give a PDT parameter a learning rate by: its group, and whether it is of the part `values`."""
    return parameter_group(name), carries_values(name)


def learns(name: str, stage: Stage) -> bool:
    """Whether a stage trains a PDT parameter."""
    return stage.multiplier(*part_of(name)) > 0


class _GradientMask:
    """Gradient hook of one parameter: passes the gradient while its part learns, else zeros it."""

    def __init__(self, multipliers: dict[tuple[str, bool], float], part: tuple[str, bool]) -> None:
        self.multipliers, self.part = multipliers, part

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient if self.multipliers[self.part] > 0 else torch.zeros_like(gradient)


def settle_gradients(parameters: Mapping[str, nn.Parameter], stage: Stage) -> None:
    """
    After a backward pass: a gradient for every parameter that learns, zero where no loss has reached it, as processes
    that wait for each other have it; none for the others, for which an optimizer then keeps no moments.

    Args:
        parameters (`Mapping[str, nn.Parameter]`): PDT parameters by name.
        stage ([`Stage`]): Says which of them learn.
    """
    for name, parameter in parameters.items():
        if not learns(name, stage):
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class StageCallback(TrainerCallback):
    """
    Freezes and frees parameter groups by stage, without ever toggling `requires_grad`.

    A frozen group has a learning rate of 0 and a masked gradient, so that it counts neither in clipping nor in the
    optimizer's moments; it keeps no moments. Where a group becomes free, its optimizer state starts anew, and the
    agreement head starts from the trained SNC. All of it is a function of the step, so a resumed run does the same as
    an uninterrupted one.

    Args:
        curriculum ([`Curriculum`]): The stages.
        model (`PDTForParallelDecoding`): The model in training.
    """

    def __init__(self, curriculum: Curriculum, model: PDTForParallelDecoding) -> None:
        self.curriculum, self.model = curriculum, model
        self.multipliers = dict.fromkeys(product(PARAMETER_GROUPS, (False, True)), 1.0)
        self.handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Registers the gradient masks."""
        self._remove_hooks()
        for name, parameter in self.model.pdt_parameters().items():
            self.handles.append(parameter.register_hook(_GradientMask(self.multipliers, part_of(name))))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets this step's learning rates and masks."""
        step, optimizer = state.global_step, kwargs["optimizer"]
        stage = self.curriculum.stage_at(step)
        if step in self.curriculum.starts:
            self._begin_stage(step, optimizer)
        self.multipliers.update({part: stage.multiplier(*part) for part in self.multipliers})
        for group, rate in zip(optimizer.param_groups, kwargs["lr_scheduler"].get_last_lr(), strict=True):
            group["lr"] = rate * self.multipliers[group["pdt_group"], group["pdt_values"]]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the gradient masks."""
        self._remove_hooks()

    def _begin_stage(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        stage = self.curriculum.stage_at(step)
        earlier = self.curriculum.stages[: self.curriculum.index_at(step)]
        for index, group in enumerate(optimizer.param_groups):
            part = group["pdt_group"], group["pdt_values"]
            goes_on = bool(earlier) and stage.multiplier(*part) > 0 and earlier[-1].multiplier(*part) > 0
            if not goes_on:
                for tensor in optimizer_tensors(optimizer, index):
                    optimizer.state.pop(tensor, None)
        if "agreement" in stage.train and not any("agreement" in before.train for before in earlier):
            agreement = self.model.stack.heads.agreement
            agreement.start_from(self.model.stack.snc[0])
            write_through(agreement.reader)

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


class ExpectedTimeCallback(TrainerCallback):
    """Says after `steps` steps of each stage, warm-up excluded, how long the rest of the stage will take."""

    def __init__(self, curriculum: Curriculum, steps: int = 5) -> None:
        self.curriculum, self.steps = curriculum, steps
        self.marks: dict[int, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the times."""
        step, now = state.global_step, time.monotonic()
        index = self.curriculum.index_at(step - 1)
        done = step - self.curriculum.starts[index]
        if done == 2:
            self.marks[index] = now
        elif done == 2 + self.steps and index in self.marks and state.is_world_process_zero:
            stage = self.curriculum.stages[index]
            seconds = (now - self.marks[index]) / self.steps * (stage.until - step)
            logger.warning(f"Stage {stage.name}: about {seconds / 60:.1f} min for {stage.until - step} more steps.")


def gate_values(model: nn.Module) -> list[float]:
    """Mean gate of every SNC site from the lowest up."""
    return [float(torch.sigmoid(site.gate.logit.detach()).mean()) for site in model.stack.snc]


class ReportCallback(TrainerCallback):
    """
    Writes `stage_history.json` and `training_report.json` beside the checkpoints, at every log and at the end.

    Args:
        curriculum ([`Curriculum`]): The stages.
        model (`PDTForParallelDecoding`): The model in training.
        guard ([`LossGuard`]): Knows the steps that were skipped.
    """

    def __init__(self, curriculum: Curriculum, model: PDTForParallelDecoding, guard: LossGuard) -> None:
        self.curriculum, self.model, self.guard = curriculum, model, guard
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the files anew."""
        self.write(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the files for the last time."""
        self.write(args, state)

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Writes both files; main process only."""
        if not state.is_world_process_zero:
            return
        step = state.global_step
        records = []
        for record in self.curriculum.history():
            if record["start"] <= step:
                losses = [
                    entry
                    for entry in state.log_history
                    if "loss" in entry and record["start"] < entry["step"] <= record["until"]
                ]
                last = losses[-1] if losses else {}
                records.append(
                    {
                        **record,
                        "first_step": record["start"],
                        "last_step": min(step, record["until"]),
                        "last_log": last,
                    }
                )
        seconds = time.monotonic() - self.started
        report = {
            "step": step,
            "max_steps": self.curriculum.max_steps,
            "seconds": round(seconds, 1),
            "seconds_per_step": round(seconds / max(1, step - self.first_step), 4),
            "gates": gate_values(self.model),
            "skipped": self.guard.skipped,
            "logs": state.log_history,
        }
        write_stage_history(args.output_dir, records)
        write_report(args.output_dir, report)
