"""Weight of distillation beside the cross-entropy, held where the two pull equally hard on what learns."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .arguments import PDTTrainingArguments
from .curriculum import Curriculum, Stage
from .telemetry import read_json, write_json

BALANCE_FILE = "balance.json"
"""File of a checkpoint with the state of the balance, where the run has one."""

LOWEST, HIGHEST = 0.1, 5.0
"""Range of the factor."""


class DistillationBalance:
    """
    A factor on the weight of `kd` that steers the ratio of two gradient norms, those of weighted `kd` and of weighted
    `lm_ce`, to a target: `scale = clamp(scale * (1 - rate * (ratio - target)))`. It acts in stages that have both.

    Args:
        target (`float`): Ratio to reach, above 0.
        rate (`float`): How fast, above 0.
        every (`int`): Optimizer steps from one measurement to the next; each costs two more backward passes.
    """

    def __init__(self, target: float, rate: float, every: int) -> None:
        self.target, self.rate, self.every = target, rate, every
        self.scale = 1.0
        self.ratio: float | None = None
        self._before = (-1, self.scale, self.ratio)

    @classmethod
    def of_run(cls, args: PDTTrainingArguments, curriculum: Curriculum) -> "DistillationBalance | None":
        """
        The balance of a run, `None` for one without.

        Raises:
            ValueError: When it could not act: no stage has both losses, or DeepSpeed owns the backward pass.
        """
        if args.kd_balance_target is None:
            return None
        if not any(cls.acts_in(stage) for stage in curriculum.stages):
            raise ValueError(
                f"kd_balance_target={args.kd_balance_target}, allowed: none, or a stage that weighs both kd and lm_ce."
            )
        if args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            raise ValueError(f"kd_balance_target={args.kd_balance_target}, allowed with DeepSpeed: none.")
        return cls(args.kd_balance_target, args.kd_balance_rate, args.kd_balance_every)

    @staticmethod
    def acts_in(stage: Stage) -> bool:
        """Whether a stage has both losses."""
        return stage.is_active("kd") and stage.is_active("lm_ce")

    def weights(self, stage: Stage) -> dict[str, float]:
        """Weights of a stage's losses with the factor on `kd`."""
        return {**stage.losses, "kd": stage.losses["kd"] * self.scale} if self.acts_in(stage) else stage.losses

    def is_due(self, step: int, micro_step: int) -> bool:
        """Whether this micro-batch is measured: the first one of every `every`-th optimizer step."""
        return micro_step == 0 and step % self.every == 0

    def measure(self, parts: Mapping[str, Tensor], stage: Stage, parameters: Sequence[nn.Parameter]) -> Tensor:
        """
        Gradient norms `[2]` of weighted `kd` and `lm_ce`; the graph stays whole and no `.grad` is written.

        Args:
            parts (`Mapping[str, Tensor]`): Losses without their weights.
            stage (`Stage`): Their weights.
            parameters (`Sequence[nn.Parameter]`): What learns; gradient hooks of frozen groups apply.
        """
        weights = self.weights(stage)
        return torch.stack([weights[name] * gradient_norm(parts[name], parameters) for name in ("kd", "lm_ce")])

    def update(self, norms: Tensor, step: int) -> None:
        """
        Moves the factor.

        Args:
            norms (`Tensor` of shape `[2]`): Of `kd` and `lm_ce`, mean over processes; used if positive and finite.
            step (`int`): Finished optimizer steps.
        """
        self._before = (step, self.scale, self.ratio)
        kd, ce = norms.tolist()
        if 0 < kd < math.inf and 0 < ce < math.inf:
            self.ratio = kd / ce
            change = 1.0 - self.rate * (self.ratio - self.target)
            self.scale = min(HIGHEST, max(LOWEST, self.scale * change))

    def undo(self, step: int) -> None:
        """Takes back what was measured after `step` finished steps, for a step that the guard refuses."""
        if self._before[0] == step:
            _, self.scale, self.ratio = self._before

    def logs(self) -> dict[str, float]:
        """The factor, and the ratio last measured, for the log."""
        ratio = {} if self.ratio is None else {"kd_ce_gradient_ratio": self.ratio}
        return {"kd_scale": self.scale, **ratio}

    def save(self, folder: str) -> None:
        """Writes the state into a checkpoint."""
        write_json(Path(folder, BALANCE_FILE), {"scale": self.scale, "ratio": self.ratio})

    def load(self, folder: str) -> None:
        """Reads the state of a checkpoint; raises `ValueError` for one without it."""
        file = Path(folder, BALANCE_FILE)
        if not file.is_file():
            raise ValueError(f"{folder} lacks {BALANCE_FILE}, allowed: a checkpoint of a run with kd_balance_target.")
        state = read_json(file)
        self.scale, self.ratio = state["scale"], state["ratio"]


def gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """
    Norm of a loss's gradient over all `parameters` together, without touching their `.grad`.

    Args:
        loss (`Tensor`): Scalar; its graph stays whole.
        parameters (`Sequence[nn.Parameter]`): Those that the loss does not reach count 0.
    """
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True)
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm()
