"""The passes of one training step over the same rows: student, teacher, trunk, and variants that single losses need.

All of them share one lower half of the trunk, and none runs unless a loss of the stage has a weight.

Letters: B documents, S streams, R = B * S rows, T tokens, M supervised tokens, V rounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modeling_pdt import PDTConfig, PDTOutput, Rollout
from modeling_pdt.trunk_split import TapState

from .arguments import PDTTrainingArguments
from .collator import NO_SOURCE
from .curriculum import Stage
from .losses import (
    IGNORE_INDEX,
    TopKTeacher,
    agreement_bce,
    block_start_ce,
    coverage_bce,
    kd_lm,
    kd_plan,
    keep_close,
    lm_ce,
    notes_ce,
    planner_ce,
    readiness_targets,
    spec_cosine,
    spec_kl,
    stability_kl,
    stream_ce,
    supervised_positions,
    supervised_values,
    token_ce,
    top_k_teacher,
    use_margin,
)
from .noise import NoiseDraw, add_gaussian, drop_item_tokens

OTHER_BLOCK_WEIGHT = 0.25
"""Weight in `agree` of blocks that nobody can contradict; decoding judges them too, so the head has to pass them."""

TOKEN_LOSSES = ("lm_ce", "kd", "keep_close", "block_start", "use", "stab")
"""Losses of the student's next-token predictions; without any of them no logits are made."""

TEACHER_LOSSES = ("notes", "spec", "spec_kl", "kd_plan")


@dataclass(frozen=True)
class Targets:
    """
    What is supervised, one entry per supervised token in the order of `shift_and_mask`.

    Args:
        tokens_M (`LongTensor`): Tokens that follow.
        offsets_M (`LongTensor`): Place in the block.
        sibling_M (`BoolTensor`): Token of a repeated fact.
        feasible_M (`BoolTensor`): Of a repeated fact that a visible note can have told.
        weights_M (`Tensor`): 1, or the weight of feasible repeated facts.
    """

    tokens_M: Tensor
    offsets_M: Tensor
    sibling_M: Tensor
    feasible_M: Tensor
    weights_M: Tensor


@dataclass(frozen=True)
class BranchOutputs:
    """
    Results of the passes; a field is `None` where no loss asked for it.

    Args:
        student (`PDTOutput`): Reads what decoding would put on the bus (and the stage's noise); logits `[M, vocab]`.
        targets ([`Targets`]): What the student's logits are compared with.
        teacher (`PDTOutput`): Reads the true notes.
        trunk_MV (`Tensor`): Logits of the trunk alone on the same rows.
        text_MV (`Tensor`): Logits of the trunk that has the siblings' sections in its context.
        silent_MV (`Tensor`): Logits with an empty bus.
        stale_MV (`Tensor`): Logits with a window that is one round older.
    """

    student: PDTOutput
    targets: Targets
    teacher: PDTOutput | None = None
    trunk_MV: Tensor | None = None
    text_MV: Tensor | None = None
    silent_MV: Tensor | None = None
    stale_MV: Tensor | None = None


def build_rollout(inputs: Mapping[str, Tensor], config: PDTConfig, lag_R1: Tensor | None = None) -> Rollout:
    """The rollout of decoding: every row writes its own notes and reads its siblings' with the model's lag."""
    rows = inputs["input_ids"].shape[0]
    if lag_R1 is None:
        lag_R1 = torch.full((rows, 1), config.bus_lag, device=inputs["input_ids"].device)
    return Rollout(
        num_streams=rows // inputs["item_ids"].shape[0],
        block_size=config.block_size,
        capacity=config.bus_capacity,
        write_round_RT=inputs["write_round"],
        read_round_RT=inputs["read_round"],
        lag_R1=lag_R1,
        item_ids_BPL=inputs["item_ids"],
        item_mask_BPL=inputs["item_mask"],
    )


def build_targets(
    inputs: Mapping[str, Tensor], rollout: Rollout, sibling_weight: float, swapped_R: Tensor | None = None
) -> Targets:
    """
    Targets of a batch under the lags of a rollout.

    Args:
        inputs (`Mapping[str, Tensor]`): From the collator.
        rollout (`Rollout`): Its lags decide what is feasible.
        sibling_weight (`float`): Weight of feasible repeated facts.
        swapped_R (`BoolTensor` of shape `[R]`, *optional*): Rows that read another document's notes; what they repeat
            cannot be known and gets weight 0.
    """
    labels = inputs["labels"]
    source = inputs["source_round"]
    sibling = source != NO_SOURCE
    newest = inputs["write_round"] - rollout.lag_R1
    feasible = sibling & (source <= newest) & (source > newest - rollout.capacity)
    weights = torch.where(feasible, sibling_weight, 1.0)
    if swapped_R is not None:
        weights = weights.masked_fill(sibling & swapped_R[:, None], 0.0)
    return Targets(
        *(supervised_values(values, labels) for values in (labels, inputs["block_offset"], sibling, feasible, weights))
    )


def student_rollout(
    inputs: Mapping[str, Tensor],
    stage: Stage,
    noise: NoiseDraw,
    config: PDTConfig,
    generator: torch.Generator,
) -> Rollout:
    """The bus that a stage gives its student: who wrote each note, what is lost, swapped, blurred, and the lags."""
    device = inputs["input_ids"].device
    rows, rounds = inputs["block_exists"].shape
    rollout = build_rollout(inputs, config, noise.lag_R.to(device)[:, None])
    if stage.item_drop > 0:
        rollout = replace(rollout, item_mask_BPL=drop_item_tokens(rollout.item_mask_BPL, stage.item_drop, generator))
    changes: dict[str, Any] = {
        "wants_coverage": stage.is_active("cov"),
        "wants_agreement": stage.is_active("agree"),
    }
    if stage.note_drop > 0 or stage.stream_dropout > 0:
        changes["keep_RV"] = (noise.keep_RK & noise.producer_R[:, None]).to(device)
    if stage.note_swap > 0:
        changes["donor_R"] = noise.source_R.to(device)
    if stage.note_noise > 0:
        blank = torch.zeros(rows, rounds, config.notes_per_block, config.notes_dim)
        changes["perturbation_RVKN"] = add_gaussian(blank, stage.note_noise, generator).to(device)
    if stage.bus_mix > 0:
        told = inputs["noisy_note_mask"].any(dim=2)
        changes["teacher_RV"] = noise.teacher_RK.to(device) & told
        changes["note_ids_RVL"], changes["note_mask_RVL"] = inputs["noisy_note_ids"], inputs["noisy_note_mask"]
    return replace(rollout, **changes)


def run_branches(
    model: nn.Module,
    inputs: Mapping[str, Any],
    stage: Stage,
    noise: NoiseDraw,
    arguments: PDTTrainingArguments,
    config: PDTConfig,
    generator: torch.Generator,
) -> BranchOutputs:
    """
    Runs the passes that the stage's losses need.

    Args:
        model (`nn.Module`): `PDTForParallelDecoding`, possibly wrapped for distributed training.
        inputs (`Mapping[str, Any]`): A view of the batch from the collator.
        stage (`Stage`), noise (`NoiseDraw`): What to train, and the step's draws.
        arguments (`PDTTrainingArguments`): Weights and the kind of teacher.
        config (`PDTConfig`): The model's configuration.
        generator (`torch.Generator`): Source of randomness for noise on notes.
    """
    rollout = student_rollout(inputs, stage, noise, config, generator)
    positions = supervised_positions(inputs["labels"])
    predicts = any(stage.is_active(loss) for loss in TOKEN_LOSSES)
    swapped = noise.swapped_R.to(positions.device) if stage.note_swap > 0 else None
    targets = build_targets(inputs, rollout, arguments.sibling_weight, swapped)
    plans = stage.is_active("planner") or stage.is_active("kd_plan")
    student = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        stream_ids=inputs["stream_ids"],
        rollout=rollout,
        logits_mask=positions if predicts else torch.zeros_like(positions),
        planner_mask=inputs["planner_mask"] if plans else None,
    )
    shared = {"tap": student.tap.detach(), "logits_mask": positions}
    extra: dict[str, Any] = {}
    text_teacher = arguments.teacher_kind == "text"
    if any(stage.is_active(loss) for loss in TEACHER_LOSSES) or (stage.is_active("kd") and not text_teacher):
        extra["teacher"] = _teacher(model, inputs, stage, rollout, shared)
    with torch.no_grad():
        if stage.is_active("keep_close"):
            extra["trunk_MV"] = model(**shared).logits
        if stage.is_active("kd") and text_teacher:
            extra["text_MV"] = _text_teacher(model, inputs)
        if stage.is_active("use"):
            extra["silent_MV"] = reread(model, inputs, student.tap, silence(rollout))
        if stage.is_active("stab"):
            extra["stale_MV"] = reread(model, inputs, student.tap, replace(rollout, lag_R1=rollout.lag_R1 + 1))
    return BranchOutputs(student, targets, **extra)


def silence(rollout: Rollout) -> Rollout:
    """The same rollout with nothing but the plan on the bus."""
    keep = torch.zeros(rollout.write_round_RT.shape[0], rollout.rounds, dtype=torch.bool)
    return replace(rollout, keep_RV=keep.to(rollout.write_round_RT.device), teacher_RV=None)


@torch.no_grad()
def reread(model: nn.Module, inputs: Mapping[str, Tensor], tap: TapState, rollout: Rollout) -> Tensor:
    """Logits `[M, vocab]` of the same rows with another bus, without gradient and without further heads."""
    rollout = replace(rollout, wants_coverage=False, wants_agreement=False)
    positions = supervised_positions(inputs["labels"])
    return model(tap=tap, stream_ids=inputs["stream_ids"], rollout=rollout, logits_mask=positions).logits


def _teacher(
    model: nn.Module, inputs: Mapping[str, Tensor], stage: Stage, rollout: Rollout, shared: dict[str, Any]
) -> PDTOutput:
    """All blocks that have true notes publish them; with gradient only where a loss trains through this branch."""
    told = inputs["note_mask"].any(dim=2)
    rollout = Rollout(
        num_streams=rollout.num_streams,
        block_size=rollout.block_size,
        capacity=rollout.capacity,
        write_round_RT=rollout.write_round_RT,
        read_round_RT=rollout.read_round_RT,
        lag_R1=rollout.lag_R1,
        item_ids_BPL=rollout.item_ids_BPL,
        item_mask_BPL=rollout.item_mask_BPL,
        note_ids_RVL=inputs["note_ids"],
        note_mask_RVL=inputs["note_mask"],
        teacher_RV=told,
        keep_RV=told,
    )
    planner_mask = inputs["prompt_mask"] if stage.is_active("kd_plan") else None
    with torch.set_grad_enabled(stage.is_active("notes") or stage.is_active("kd_plan")):
        return model(stream_ids=inputs["stream_ids"], rollout=rollout, planner_mask=planner_mask, **shared)


def _text_teacher(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(
        input_ids=inputs["text_input_ids"],
        attention_mask=inputs["text_attention_mask"],
        logits_mask=supervised_positions(inputs["text_labels"]),
    ).logits


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
        "keep_close": lambda: keep_close(student_MV, branches.trunk_MV, elsewhere_M),
        "kd": lambda: kd_lm(
            student_MV, _distillation_target(branches, arguments), _kd_weights(targets), arguments.kd_temperature
        ),
        "notes": lambda: notes_ce(branches.teacher.logits, targets.tokens_M, targets.weights_M),
        "use": lambda: use_margin(
            token_ce(student_MV, targets.tokens_M),
            token_ce(branches.silent_MV, targets.tokens_M),
            targets.feasible_M.float(),
            arguments.usage_margin,
        ),
        "stab": lambda: stability_kl(student_MV, branches.stale_MV, elsewhere_M, arguments.kd_temperature),
    }


def _kd_weights(targets: Targets) -> Tensor:
    """A teacher that knows more than any visible note could have told teaches nothing: such tokens do not count."""
    return targets.weights_M.masked_fill(targets.sibling_M & ~targets.feasible_M, 0.0)


def _distillation_target(branches: BranchOutputs, arguments: PDTTrainingArguments) -> Tensor | TopKTeacher:
    target = branches.text_MV if branches.text_MV is not None else branches.teacher.logits.detach()
    return top_k_teacher(target, arguments.kd_top_k, arguments.kd_temperature) if arguments.kd_top_k else target


def _head_parts(
    branches: BranchOutputs, inputs: Mapping[str, Tensor], stage: Stage, arguments: PDTTrainingArguments
) -> dict[str, Any]:
    student, teacher = branches.student, branches.teacher
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
            teacher.planner_logits[::streams],
            torch.ones_like(inputs["plan_slots"]),
            arguments.kd_plan_temperature,
        ),
        "spec": lambda: spec_cosine(student.speculation, teacher.notes, inputs["note_mask"].any(dim=2)),
        "spec_kl": lambda: spec_kl(
            student.speculation,
            teacher.notes,
            inputs["note_mask"].any(dim=2).float(),
            arguments.spec_kl_temperature,
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
