"""A file that says, loss by loss, how hard each pulls on what learns."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .callbacks import parameter_group
from .telemetry import to_jsonable

NAME = "gradient_norms_from_{step}.jsonl"
"""A run, or its continuation, writes one file, named by the first step that it measured."""


def norm_files(folder: Path) -> dict[int, Path]:
    """The files of a run's folder by the first step that they hold, in order."""
    files = {int(path.stem.rpartition("_")[2]): path for path in folder.glob(NAME.format(step="*"))}
    return dict(sorted(files.items()))


class GradientNormLog:
    """
    Writes one line per measured step: `step`, `stage`, under `losses` for every loss its `weight` and norms of the
    gradient of the *weighted* loss (`all` over everything that learns, then by parameter group), and under `total`
    the same of their sum.

    The norms are those of one micro-batch (the first of a step), on the main process, before clipping, before
    accumulation and before the mean over processes; gradient masks of frozen groups apply, so a frozen group has 0.
    Each loss costs one more backward pass in a measured step. No `.grad` is written and no random number drawn, so
    that training takes the same course with it and without it.

    Args:
        folder (`str` or `Path`): Of the run.
        every (`int`): Optimizer steps from one measurement to the next, at least 1.
    """

    def __init__(self, folder: str | Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}, allowed: at least 1.")
        self.folder, self.every = Path(folder), every
        self.path: Path | None = None

    def is_due(self, step: int, micro_step: int) -> bool:
        """Whether this micro-batch is measured: the first one of every `every`-th optimizer step."""
        return micro_step == 0 and step % self.every == 0

    def write(
        self,
        step: int,
        stage: str,
        weights: Mapping[str, float],
        parts: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """
        Measures and writes a line.

        Args:
            step (`int`): Finished optimizer steps.
            stage (`str`): Name of the stage.
            weights (`Mapping[str, float]`): By loss; 0 is left out.
            parts (`Mapping[str, Tensor]`): Losses without their weights; their graphs stay whole.
            parameters (`Mapping[str, nn.Parameter]`): PDT parameters by name.
        """
        groups = [parameter_group(name) for name in parameters]
        tensors, sums, losses = list(parameters.values()), [0.0] * len(parameters), {}
        for name, weight in weights.items():
            if weight == 0 or not parts[name].requires_grad:
                continue
            found = torch.autograd.grad(weight * parts[name], tensors, retain_graph=True, allow_unused=True)
            sums = [total if g is None else total + g for total, g in zip(sums, found, strict=True)]
            losses[name] = {"weight": weight, **norms_by_group(found, groups)}
        total = norms_by_group([g if isinstance(g, Tensor) else None for g in sums], groups)
        line = {"step": step, "stage": stage, "losses": losses, "total": total}
        if self.path is None:
            self.path = self.folder / NAME.format(step=step)
            self.folder.mkdir(parents=True, exist_ok=True)
            # What was measured from here on belongs to another course of the run.
            for first, path in norm_files(self.folder).items():
                if first > step:
                    path.unlink()
            self.path.write_text("", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(to_jsonable(line), allow_nan=False) + "\n")


def norms_by_group(gradients: list[Tensor | None] | tuple[Tensor | None, ...], groups: list[str]) -> dict[str, float]:
    """
    Norm over all gradients as `all`, then per group; groups that a loss does not reach are left out.

    Args:
        gradients (`list[Tensor]`): One per parameter, `None` where the loss does not reach it.
        groups (`list[str]`): Group of each.
    """
    squares: dict[str, Tensor] = {}
    for gradient, group in zip(gradients, groups, strict=True):
        if gradient is not None:
            square = gradient.detach().double().square().sum()
            squares[group] = squares.get(group, torch.zeros_like(square)) + square
    whole = sum(float(square) for square in squares.values())
    return {"all": whole**0.5, **{group: float(square) ** 0.5 for group, square in sorted(squares.items())}}
