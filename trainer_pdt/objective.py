"""The losses of a stage from the passes of a step: which pass each one compares with which, on which tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .arguments import PDTTrainingArguments
from .branches import BranchOutputs, Targets
from .curriculum import Stage
from .losses import (
    IGNORE_INDEX,
    agreement_bce,
    block_start_ce,
    coverage_bce,
    kd_lm,
    kd_plan,
    keep_close,
    lm_ce,
    notes_ce,
    plan_snapshot_kl,
    planner_ce,
    readiness_targets,
    redundancy,
    spec_cosine,
    spec_kl,
    stability_kl,
    stream_ce,
    token_ce,
    use_margin,
)

OTHER_BLOCK_WEIGHT = 0.25
"""Weight in `agree` of blocks that nobody can contradict; decoding judges them too, so the head has to pass them."""


def loss_parts(
    branches: BranchOutputs, inputs: Mapping[str, Tensor], stage: Stage, arguments: PDTTrainingArguments
) -> dict[str, Tensor]:
    """
    Every loss of the stage, unweighted, by name.

    Args:
        branches ([`BranchOutputs`]): From [`run_branches`].
        inputs (`Mapping[str, Tensor]`): The same view of the batch.
        stage (`Stage`): Which losses to compute.
        arguments (`PDTTrainingArguments`): Temperatures, margins and weights.
    """
    parts = {**_token_parts(branches, stage, arguments), **_head_parts(branches, inputs, stage, arguments)}
    return {name: parts[name]() for name in stage.active_losses}


def _token_parts(branches: BranchOutputs, stage: Stage, arguments: PDTTrainingArguments) -> dict[str, Any]:
    targets, student_MV = branches.targets, branches.student.logits
    elsewhere_M = ~targets.sibling_M
    return {
        "lm_ce": lambda: lm_ce(student_MV, targets.tokens_M, targets.weights_M),
        "block_start": lambda: block_start_ce(
            student_MV, targets.tokens_M, targets.offsets_M, arguments.block_start_tokens
        ),
        "keep_close": lambda: keep_close(student_MV, branches.trunk, elsewhere_M),
        "kd": lambda: kd_lm(
            student_MV,
            branches.aim,
            _kd_weights(targets, arguments),
            arguments.kd_temperature,
        ),
        "notes": lambda: notes_ce(branches.teacher.logits, targets.tokens_M, targets.weights_M),
        "use": lambda: use_margin(
            token_ce(student_MV, targets.tokens_M),
            branches.silent_ce_M,
            _needs_notes(branches, arguments),
            arguments.usage_margin,
        ),
        "stab": lambda: stability_kl(student_MV, branches.stale, elsewhere_M, arguments.kd_temperature),
        "plan_snapshot": lambda: plan_snapshot_kl(branches.buckets_MV, student_MV),
    }


def _kd_weights(targets: Targets, arguments: PDTTrainingArguments) -> Tensor:
    """
    A teacher that knows more than any visible note could have told teaches nothing, nor does one that has read nothing
    of the siblings: such tokens do not count.
    """
    known = targets.feasible_M if arguments.teacher_kind != "trunk" else torch.zeros_like(targets.feasible_M)
    return targets.weights_M.masked_fill(targets.sibling_M & ~known, 0.0)


def _needs_notes(branches: BranchOutputs, arguments: PDTTrainingArguments) -> Tensor:
    """Weights `[M]` of `use`: repeated facts that a visible note can have told, or what true notes help to predict."""
    if arguments.usage_sensitivity is None:
        return branches.targets.feasible_M.float()
    helped_M = branches.silent_ce_M - branches.informed_ce_M > arguments.usage_sensitivity
    return (helped_M & (branches.targets.weights_M > 0)).float()


def _head_parts(
    branches: BranchOutputs, inputs: Mapping[str, Tensor], stage: Stage, arguments: PDTTrainingArguments
) -> dict[str, Any]:
    student, teacher, target = branches.student, branches.teacher, branches.target
    streams = inputs["input_ids"].shape[0] // inputs["item_ids"].shape[0]

    def planner() -> Tensor:
        loss = planner_ce(student.planner_logits[::streams], inputs["plan_slots"])
        if stage.is_active("kd_plan"):
            loss = (loss + planner_ce(teacher.planner_logits[::streams], inputs["plan_slots"])) / 2
        return loss

    return {
        "planner": planner,
        "kd_plan": lambda: kd_plan(
            student.planner_logits[::streams],
            target.planner_logits[::streams],
            torch.ones_like(inputs["plan_slots"]),
            arguments.kd_plan_temperature,
        ),
        "spec": lambda: spec_cosine(student.speculation, target.notes, inputs["note_mask"].any(dim=2)),
        "spec_kl": lambda: spec_kl(
            student.speculation,
            target.notes,
            inputs["note_mask"].any(dim=2).float(),
            arguments.spec_kl_temperature,
        ),
        "red": lambda: redundancy(
            _by_round(student.speculation.mean(dim=2), streams),
            _by_round(inputs["block_exists"], streams),
            arguments.redundancy_threshold,
        ),
        "cov": lambda: coverage_bce(
            student.coverage_logits,
            inputs["coverage_targets"],
            inputs["coverage_mask"],
            arguments.coverage_pos_weight,
        ),
        "stream": lambda: stream_ce(student.stream_logits, inputs["stream_ids"].amax(dim=1)),
        "agree": lambda: agreement_loss(student.agreement_logits, student.agreement_token_logits, inputs),
    }


def _by_round(values_RV: Tensor, streams: int) -> Tensor:
    """Values of rows as `[documents, rounds, streams, ...]`: siblings side by side."""
    return values_RV.unflatten(0, (-1, streams)).transpose(1, 2)


def agreement_loss(logits_RV: Tensor, token_logits_RT: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """
    Judgeable blocks with both classes balanced, all other blocks as agreeing ones with a low weight, and the tokens
    of judgeable repeated facts: a planted contradiction tells which tokens disagree.
    """
    targets, labelled = readiness_targets(inputs["contradicts"], inputs["judgeable"])
    others = inputs["block_exists"] & ~inputs["judgeable"]
    loss = agreement_bce(logits_RV, targets, labelled)
    loss = loss + OTHER_BLOCK_WEIGHT * agreement_bce(logits_RV, torch.ones_like(targets), others)
    round_RT = inputs["write_round"].clamp(min=0)
    judged_RT = (inputs["reference"] >= 0) & inputs["judgeable"].gather(1, round_RT)
    planted_RT = judged_RT & (inputs["labels"] == IGNORE_INDEX)
    return loss + agreement_bce(token_logits_RT, ~planted_RT, judged_RT)
