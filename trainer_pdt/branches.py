"""The passes of one training step over the same rows: student, teacher, trunk, and variants that single losses need.

All of them share one lower half of the trunk, and none runs unless a loss of the stage has a weight.

Letters: B documents, S streams, R = B * S rows, T tokens, M supervised tokens, V rounds.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modeling_pdt import PDTConfig, PDTOutput, Rollout
from modeling_pdt.trunk_split import TapState

from .arguments import PDTTrainingArguments
from .collator import NO_SOURCE
from .contradictions import contrary_items, disputed_tokens, exchange_texts, student_notes
from .curriculum import Stage
from .losses import ChunkedLogits, TopKTeacher, supervised_positions, supervised_values
from .noise import NoiseDraw, add_gaussian, drop_item_tokens
from .teacher import EmaTeacher, digest_live, learn, predict, true_rollout

STUDENT_READS = {
    "lm_ce": "ce",
    "block_start": "ce",
    "use": "ce",
    "kd": "aim",
    "keep_close": "trunk",
    "stab": "stale",
}
"""Losses that are means over the student's tokens, and of what: cross-entropy, or divergence from another pass."""

TOKEN_LOSSES = (*STUDENT_READS, "plan_snapshot")
"""Losses of the student's next-token predictions; without any of them no logits are made."""

TARGETED_LOSSES = ("spec", "spec_kl", "kd_plan")
"""Losses that aim at what the branch with true notes makes beside logits."""


@dataclass(frozen=True)
class Targets:
    """
    What is supervised, one entry per supervised token in the order of `shift_and_mask`.

    Args:
        tokens_M (`LongTensor`): Tokens that follow.
        offsets_M (`LongTensor`): Place in the block.
        sibling_M (`BoolTensor`): Token of a repeated fact.
        feasible_M (`BoolTensor`): Of a repeated fact that a visible note can have told.
        weights_M (`Tensor`): Weight of feasible repeated facts, or of other tokens.
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
        student (`PDTOutput`): Reads what decoding would put on the bus (and the stage's noise); [`ChunkedLogits`].
        targets ([`Targets`]): What the student's logits are compared with.
        teacher (`PDTOutput`): Reads the true notes with the live weights.
        averaged (`PDTOutput`): Reads the true notes with the averaged weights.
        aim (`Tensor` or [`TopKTeacher`]): Next tokens of the teacher of `kd`; `[M, vocab]`, as all that follow.
        trunk (`Tensor` or [`TopKTeacher`]): Of the trunk alone on the same rows.
        stale (`Tensor` or [`TopKTeacher`]): With a window that is one round older.
        buckets ([`ChunkedLogits`]): With the plan's buckets in place of its texts as snapshot 0; with gradient.
        silent_ce_M (`Tensor`): Cross-entropy with an empty bus.
        informed_ce_M (`Tensor`): Cross-entropy with true notes.
        fresh_gain_M (`Tensor`): Cross-entropy with the student's notes at decoding's lag minus that at lag 0.
        disputed_RT (`BoolTensor` of shape `[R, T]`): Tokens of repeated facts of which a note of a visible or of the
            same round tells another value.
        contrary_BP (`BoolTensor` of shape `[B, P]`): Plan items in whose place the student has another document's.
    """

    student: PDTOutput
    targets: Targets
    teacher: PDTOutput | None = None
    averaged: PDTOutput | None = None
    aim: Tensor | TopKTeacher | None = None
    trunk: Tensor | TopKTeacher | None = None
    stale: Tensor | TopKTeacher | None = None
    buckets: ChunkedLogits | None = None
    silent_ce_M: Tensor | None = None
    informed_ce_M: Tensor | None = None
    fresh_gain_M: Tensor | None = None
    disputed_RT: Tensor | None = None
    contrary_BP: Tensor | None = None

    @property
    def target(self) -> PDTOutput | None:
        """What distillation of notes, plans and logits aims at: the averaged weights where they run."""
        return self.teacher if self.averaged is None else self.averaged


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
        plan_on_bus=config.plan_on_bus,
    )


def build_targets(
    inputs: Mapping[str, Tensor],
    rollout: Rollout,
    sibling_weight: float,
    other_weight: float = 1.0,
    swapped_R: Tensor | None = None,
    disputed_RT: Tensor | None = None,
) -> Targets:
    """
    Targets of a batch under the lags of a rollout.

    Args:
        inputs (`Mapping[str, Tensor]`): From the collator.
        rollout (`Rollout`): Its lags decide what is feasible.
        sibling_weight (`float`), other_weight (`float`, *optional*, defaults to 1.0): Weights of feasible repeated
            facts and of all other tokens.
        swapped_R (`BoolTensor` of shape `[R]`, *optional*): Rows that read another document's notes; what they repeat
            cannot be known and gets weight 0.
        disputed_RT (`BoolTensor` of shape `[R, T]`, *optional*): Tokens that notes of the bus contradict; where those
            notes are visible, they get weight 0.
    """
    labels = inputs["labels"]
    source = inputs["source_round"]
    sibling = source != NO_SOURCE
    newest = inputs["write_round"] - rollout.lag_R1
    feasible = sibling & (source <= newest) & (source > newest - rollout.capacity)
    weights = torch.where(feasible, sibling_weight, other_weight)
    if swapped_R is not None:
        weights = weights.masked_fill(sibling & swapped_R[:, None], 0.0)
    if disputed_RT is not None:
        weights = weights.masked_fill(feasible & disputed_RT, 0.0)
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
    if stage.item_contradict > 0:
        items = exchange_texts(
            (rollout.item_ids_BPL, rollout.item_mask_BPL),
            (inputs["contrary_item_ids"], inputs["contrary_item_mask"]),
            contrary_items(inputs, noise),
        )
        rollout = replace(rollout, item_ids_BPL=items[0], item_mask_BPL=items[1])
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
        ids, mask = student_notes(inputs, stage, noise)
        changes["teacher_RV"] = noise.teacher_RK.to(device) & mask.any(dim=2)
        changes["note_ids_RVL"], changes["note_mask_RVL"] = ids, mask
    return replace(rollout, **changes)


def run_branches(
    model: nn.Module,
    inputs: Mapping[str, Any],
    stage: Stage,
    noise: NoiseDraw,
    arguments: PDTTrainingArguments,
    config: PDTConfig,
    generator: torch.Generator,
    ema: EmaTeacher | None = None,
) -> BranchOutputs:
    """
    Runs the passes that the stage's losses need.

    Args:
        model (`nn.Module`): `PDTForParallelDecoding`, possibly wrapped for distributed training.
        inputs (`Mapping[str, Any]`): A view of the batch from the collator; `tap` ([`TapState`]) where its lower half
            is known.
        stage (`Stage`), noise (`NoiseDraw`): What to train, and the step's draws.
        arguments (`PDTTrainingArguments`): Weights and the kind of teacher.
        config (`PDTConfig`): The model's configuration.
        generator (`torch.Generator`): Source of randomness for noise on notes.
        ema ([`EmaTeacher`], *optional*): The averaged weights, with `teacher_kind="ema"`.
    """
    rollout = student_rollout(inputs, stage, noise, config, generator)
    positions = supervised_positions(inputs["labels"])
    predicts = any(stage.is_active(loss) for loss in TOKEN_LOSSES)
    swapped = noise.swapped_R.to(positions.device) if stage.note_swap > 0 else None
    disputed = disputed_tokens(inputs, noise, rollout) if stage.note_contradict > 0 else None
    weights = arguments.sibling_weight, arguments.other_weight
    targets = build_targets(inputs, rollout, *weights, swapped, disputed)
    plans = stage.is_active("planner") or stage.is_active("kd_plan")
    reading = {
        "tap": inputs.get("tap"),
        **{name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids", "stream_ids")},
        "rollout": rollout,
        "planner_mask": inputs["planner_mask"] if plans else None,
    }
    chunk = arguments.logits_chunk
    student = learn(model, positions, chunk, **reading) if predicts else model(**reading, heads_only=True)
    tap = student.tap.detach()
    extra = _teachers(model, inputs, stage, arguments, rollout, tap, targets, ema)
    if stage.item_contradict > 0:
        extra["contrary_BP"] = contrary_items(inputs, noise)
    if stage.agreement_labels == "auto":
        extra["fresh_gain_M"] = _fresh_gain(model, inputs, rollout, tap, targets, config.bus_lag)
    return BranchOutputs(student, targets, disputed_RT=disputed, **extra)


def _fresh_gain(
    model: nn.Module, inputs: Mapping[str, Tensor], rollout: Rollout, tap: TapState, targets: Targets, lag: int
) -> Tensor:
    """By how many nats `[M]` notes of the same round help, beyond those that decoding reads with its lag."""
    quiet = replace(rollout, wants_coverage=False, wants_agreement=False)
    positions = supervised_positions(inputs["labels"])
    same = {"tap": tap, "stream_ids": inputs["stream_ids"]}
    usual, fresh = (
        predict(model, positions, 0, (), targets.tokens_M, **same, rollout=replace(quiet, lag_R1=lag_R1))[1]
        for lag_R1 in (torch.full_like(quiet.lag_R1, lag), torch.zeros_like(quiet.lag_R1))
    )
    return usual.ce_M - fresh.ce_M


def _teachers(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stage: Stage,
    arguments: PDTTrainingArguments,
    rollout: Rollout,
    tap: TapState,
    targets: Targets,
    ema: EmaTeacher | None,
) -> dict[str, Any]:
    """The passes that the student is compared with; with gradient only where a loss trains through one."""
    positions, top_k, temperature = (
        supervised_positions(inputs["labels"]),
        arguments.kd_top_k,
        arguments.kd_temperature,
    )
    kind, distils = arguments.teacher_kind, stage.is_active("kd")
    quiet = replace(rollout, wants_coverage=False, wants_agreement=False)
    same = {"tap": tap, "stream_ids": inputs["stream_ids"]}
    passes = _true_notes(model, inputs, stage, arguments, quiet, same, targets, ema)
    closes, from_trunk = stage.is_active("keep_close"), distils and kind == "trunk"
    if closes or from_trunk:
        temperatures = (1.0,) * closes + (temperature,) * from_trunk
        kept = predict(model, positions, top_k, temperatures, tap=tap)[1].distributions
        passes |= {"trunk": kept[0]} if closes else {}
        passes |= {"aim": kept[-1]} if from_trunk else {}
    if distils and kind == "text":
        text = {"input_ids": inputs["text_input_ids"], "attention_mask": inputs["text_attention_mask"]}
        place = supervised_positions(inputs["text_labels"])
        passes["aim"] = predict(model, place, top_k, (temperature,), **text)[1].distributions[0]
    if stage.is_active("use"):
        passes["silent_ce_M"] = predict(model, positions, top_k, (), targets.tokens_M, **same, rollout=silence(quiet))[
            1
        ].ce_M
    if stage.is_active("stab"):
        older = replace(quiet, lag_R1=quiet.lag_R1 + 1)
        passes["stale"] = predict(model, positions, top_k, (temperature,), **same, rollout=older)[1].distributions[0]
    if stage.is_active("plan_snapshot"):
        passes["buckets"] = learn(
            model, positions, arguments.logits_chunk, **same, rollout=_with_buckets(inputs, quiet)
        ).logits
    return passes


def _true_notes(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stage: Stage,
    arguments: PDTTrainingArguments,
    rollout: Rollout,
    same: Mapping[str, Any],
    targets: Targets,
    ema: EmaTeacher | None,
) -> dict[str, Any]:
    """The branch that reads true notes, with the live weights where it learns and with those that teach."""
    averages, plans = arguments.teacher_kind == "ema", stage.is_active("kd_plan")
    learns = plans or stage.is_active("notes")
    distils = stage.is_active("kd") and arguments.teacher_kind in ("notes", "ema")
    informs = stage.is_active("use") and arguments.usage_sensitivity is not None
    aimed_at = distils or informs or any(stage.is_active(loss) for loss in TARGETED_LOSSES)
    positions = supervised_positions(inputs["labels"])
    temperatures, tokens_M = (arguments.kd_temperature,) * distils, targets.tokens_M if informs else None
    truth = true_rollout(inputs, rollout)
    if stage.item_contradict > 0:
        truth = replace(truth, item_ids_BPL=inputs["item_ids"], item_mask_BPL=inputs["item_mask"])
    reading = {
        **same,
        "rollout": truth,
        "planner_mask": inputs["prompt_mask"] if plans else None,
    }
    passes: dict[str, Any] = {}
    if learns:
        passes["teacher"] = learn(model, positions, arguments.logits_chunk, **reading)
    if not aimed_at:
        return passes
    if learns and not averages:
        seen = digest_live(passes["teacher"].logits, arguments.kd_top_k, temperatures, tokens_M)
    else:
        with ema.weights() if averages else nullcontext():
            output, seen = predict(model, positions, arguments.kd_top_k, temperatures, tokens_M, **reading)
        passes["averaged" if averages else "teacher"] = output
    return passes | {"aim": seen.distributions[0] if distils else None, "informed_ce_M": seen.ce_M}


def _with_buckets(inputs: Mapping[str, Tensor], rollout: Rollout) -> Rollout:
    """The same bus with the plan's buckets as snapshot 0."""
    slots = inputs["plan_slots"]
    return replace(rollout, item_ids_BPL=None, item_mask_BPL=None, plan_slots_BP=slots, plan_mask_BP=slots != 0)


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
