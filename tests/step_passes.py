"""What tests of a step's passes share: a model that reads its notes, its batch, stages of any losses, the passes."""

from pathlib import Path
from typing import Any

import torch

from modeling_pdt import PDTForParallelDecoding
from tests.tiny_training import make_arguments, make_collator, make_features, make_model
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.branches import BranchOutputs, run_branches
from trainer_pdt.curriculum import PARAMETER_GROUPS, Stage
from trainer_pdt.noise import draw_noise
from trainer_pdt.teacher import EmaTeacher

FEATURES = [make_features(4)[index] for index in range(4)]
# Groups that losses of reading move, once zero-initialised projections have moved away from zero.
READING = {"snc", "stream_adapters", "writer", "encoder"}


def stage(losses: list[str], **changes: Any) -> Stage:
    """A stage of these losses, which trains every group but the optional heads."""
    heads = ("coverage", "agreement", "stream")
    groups = tuple(group for group in PARAMETER_GROUPS if group not in heads)
    return Stage("test", 10, groups, dict.fromkeys(losses, 1.0), **changes)


def moved_model() -> PDTForParallelDecoding:
    """A model whose PDT parameters have left their zeros."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def full_batch(model: PDTForParallelDecoding) -> dict[str, Any]:
    """Four documents with their corrupted view and the text teacher's."""
    return make_collator(model, with_corrupted=True, with_text_teacher=True)(FEATURES)


def drifted_teacher(model: PDTForParallelDecoding) -> EmaTeacher:
    """Averaged weights that are not the live ones."""
    ema = EmaTeacher(model, 0.5)
    ema.start()
    torch.manual_seed(5)
    ema.average = {name: value + 0.1 * torch.randn_like(value) for name, value in ema.average.items()}
    return ema


def branches_of(
    model: Any,
    batch: dict[str, Any],
    stage: Stage,
    folder: Path,
    ema: EmaTeacher | None = None,
    config: Any = None,
    **arguments: Any,
) -> tuple[BranchOutputs, PDTTrainingArguments]:
    """The passes of a step, always with the same draws, and the arguments that its losses need."""
    arguments = make_arguments(folder, **arguments)
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise(stage, 4, 3, batch["block_exists"].shape[1], 1, generator)
    return run_branches(model, batch, stage, noise, arguments, config or model.config, generator, ema), arguments
