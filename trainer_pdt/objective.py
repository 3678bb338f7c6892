"""The losses of a stage from the passes of a step: which pass each one compares with which, on which tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .agreement_labels import AgreementLabels, automatic_labels, planted_labels, readiness_labels
from .arguments import PDTTrainingArguments
from .branches import STUDENT_READS, BranchOutputs, Targets
from .curriculum import Stage
from .losses import (
    Read,
    agreement_bce,
    block_start_ce,
    coverage_bce,
    kd_plan,
    masked_mean,
    planner_ce,
    readiness_targets,
    redundancy,
    spec_cosine,
    spec_kl,
    stream_ce,
    token_ce,
    token_kl,
    use_margin,
    weighted_mean,
)

OTHER_BLOCK_WEIGHT = 1.0
"""Weight in `agree` of blocks that nobody can contradict; decoding judges them too, and most blocks are such."""


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
    targets, temperature = branches.targets, arguments.kd_temperature
    elsewhere_M = ~targets.sibling_M

    def ce(logits_mV: Tensor, place: slice) -> Tensor:
        return token_ce(logits_mV, targets.tokens_M[place])

    reads: dict[str, Read] = {
        "ce": ce,
        "aim": lambda logits_mV, place: token_kl(logits_mV, branches.aim[place], temperature),
        "trunk": lambda logits_mV, place: token_kl(logits_mV, branches.trunk[place]),
        "stale": lambda logits_mV, place: token_kl(logits_mV, branches.stale[place], temperature),
    }
    asked = {STUDENT_READS[loss] for loss in stage.active_losses if loss in STUDENT_READS}
    student = branches.student.logits.read({name: reads[name] for name in reads if name in asked}) if asked else {}
    return {
        "lm_ce": lambda: weighted_mean(student["ce"], targets.weights_M),
        "block_start": lambda: block_start_ce(
            student["ce"],
            targets.offsets_M.masked_fill(targets.sibling_M & (targets.weights_M == 0), -1),
            arguments.block_start_tokens,
        ),
        "keep_close": lambda: masked_mean(student["trunk"], elsewhere_M),
        "kd": lambda: weighted_mean(student["aim"], _kd_weights(targets, arguments)),
        "notes": lambda: weighted_mean(branches.teacher.logits.read({"ce": ce})["ce"], targets.weights_M),
        "use": lambda: use_margin(
            student["ce"], branches.silent_ce_M, _needs_notes(branches, arguments), arguments.usage_margin
        ),
        "stab": lambda: masked_mean(student["stale"], elsewhere_M),
        "plan_snapshot": lambda: _plan_snapshot(branches),
    }


def _plan_snapshot(branches: BranchOutputs) -> Tensor:
    """A plan embedded from its buckets learns to say to the readers what the texts of its items say."""
    texts_MV = branches.student.logits.whole()
    reads = {"texts": lambda logits_mV, place: token_kl(logits_mV, texts_MV[place])}
    divergence_M = branches.buckets.read(reads)["texts"]
    return masked_mean(divergence_M, torch.ones_like(divergence_M))


def _kd_weights(targets: Targets, arguments: PDTTrainingArguments) -> Tensor:
    """
    A teacher that knows more than any visible note could have told teaches nothing, nor does one that has read nothing
    of the siblings: such tokens do not count.
    """
    known = targets.feasible_M if arguments.teacher_kind != "trunk" else torch.zeros_like(targets.feasible_M)
    return torch.where(targets.sibling_M, targets.weights_M * known, 1.0)


def _needs_notes(branches: BranchOutputs, arguments: PDTTrainingArguments) -> Tensor:
    """Weights `[M]` of `use`: repeated facts that a visible note can have told, or what true notes help to predict."""
    helped_M = branches.targets.feasible_M
    if arguments.usage_sensitivity is not None:
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
            _coverage_targets(branches, inputs),
            inputs["coverage_mask"],
            arguments.coverage_pos_weight,
        ),
        "stream": lambda: stream_ce(student.stream_logits, inputs["stream_ids"].amax(dim=1)),
        "agree": lambda: agreement_loss(
            student.agreement_logits,
            student.agreement_token_logits,
            inputs,
            _agreement_labels(branches, inputs, stage, arguments),
        ),
    }


def _by_round(values_RV: Tensor, streams: int) -> Tensor:
    """Values of rows as `[documents, rounds, streams, ...]`: siblings side by side."""
    return values_RV.unflatten(0, (-1, streams)).transpose(1, 2)


def _coverage_targets(branches: BranchOutputs, inputs: Mapping[str, Tensor]) -> Tensor:
    """No section states another document's items."""
    targets_RVP = inputs["coverage_targets"]
    if branches.contrary_BP is None:
        return targets_RVP
    streams = len(targets_RVP) // len(branches.contrary_BP)
    return targets_RVP & ~branches.contrary_BP.repeat_interleave(streams, dim=0)[:, None]


def _agreement_labels(
    branches: BranchOutputs, inputs: Mapping[str, Tensor], stage: Stage, arguments: PDTTrainingArguments
) -> AgreementLabels:
    planted = planted_labels(inputs, branches.disputed_RT)
    if stage.agreement_labels == "readiness":
        return readiness_labels(inputs, planted)
    if stage.agreement_labels == "auto":
        return automatic_labels(inputs, planted, branches.fresh_gain_M, arguments.agreement_margin)
    return planted


def agreement_loss(
    logits_RV: Tensor, token_logits_RT: Tensor, inputs: Mapping[str, Tensor], labels: AgreementLabels
) -> Tensor:
    """
    Judged blocks with both classes balanced, all other blocks as agreeing ones, and the judged tokens: a contradiction
    tells which tokens disagree.
    """
    targets, labelled = readiness_targets(labels.refused_RV, labels.judged_RV)
    others = inputs["block_exists"] & ~labels.judged_RV
    loss = agreement_bce(logits_RV, targets, labelled)
    loss = loss + OTHER_BLOCK_WEIGHT * agreement_bce(logits_RV, torch.ones_like(targets), others)
    return loss + agreement_bce(token_logits_RT, ~labels.refused_RT, labels.judged_RT)
