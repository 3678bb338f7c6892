"""Losses of the heads that plan, follow the plan and tell streams apart."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .language import token_kl
from .reductions import IGNORE_INDEX, masked_mean


def planner_ce(planner_logits_BPV: Tensor, plan_slots_BP: Tensor) -> Tensor:
    """
    Cross-entropy of the plan entry in each slot; slots labelled -100 are left out. Gradient: the logits.

    Args:
        planner_logits_BPV (`Tensor` of shape `[documents, slots, plan vocabulary]`): Prediction per slot.
        plan_slots_BP (`LongTensor` of shape `[documents, slots]`): Entry per slot, -100 where the slot is empty.
    """
    return _masked_ce(planner_logits_BPV, plan_slots_BP, plan_slots_BP != IGNORE_INDEX)


def kd_plan(
    planner_logits_BPV: Tensor, teacher_logits_BPV: Tensor, mask_BP: Tensor, temperature: float = 1.0
) -> Tensor:
    """
    Distillation of the plan, `T ** 2 * KL(teacher || student)` per slot. Gradient: the student's logits.

    Args:
        planner_logits_BPV (`Tensor` of shape `[documents, slots, plan vocabulary]`): Student.
        teacher_logits_BPV (`Tensor` of the same shape): Teacher; detached here.
        mask_BP (`BoolTensor` of shape `[documents, slots]`): Slots in use.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
    """
    return masked_mean(token_kl(planner_logits_BPV, teacher_logits_BPV, temperature), mask_BP)


def coverage_bce(
    coverage_logits_RKI: Tensor, targets_RKI: Tensor, mask_RKI: Tensor, pos_weight: float | None = None
) -> Tensor:
    """
    Binary cross-entropy over supervised (row, round, item). Gradient: the logits.

    Args:
        coverage_logits_RKI (`Tensor` of shape `[rows, rounds, items]`): Above 0 = the row's text up to the end of the
            round states the item.
        targets_RKI (`Tensor` of the same shape): 1 = stated, 0 = not.
        mask_RKI (`BoolTensor` of the same shape): Items the row owns, in rounds that exist.
        pos_weight (`float`, *optional*): Weight of stated items relative to the others, above 0.
    """
    if pos_weight is not None and not pos_weight > 0:
        raise ValueError(f"pos_weight={pos_weight} is out of range, allowed: above 0.")
    weight = None if pos_weight is None else torch.full((), pos_weight, device=coverage_logits_RKI.device)
    losses_RKI = binary_cross_entropy_with_logits(
        coverage_logits_RKI.float(), targets_RKI.float(), pos_weight=weight, reduction="none"
    )
    return masked_mean(losses_RKI, mask_RKI)


def stream_ce(stream_logits_XS: Tensor, stream_ids_X: Tensor) -> Tensor:
    """
    Cross-entropy of the classifier that tells which stream wrote a state. Gradient: the logits.

    Args:
        stream_logits_XS (`Tensor` of shape `[..., streams]`): Prediction per row, or per row and round.
        stream_ids_X (`LongTensor` of shape `[...]`): Stream, negative = no stream (left out).
    """
    return _masked_ce(stream_logits_XS, stream_ids_X, stream_ids_X >= 0)


def _masked_ce(logits_XC: Tensor, targets_X: Tensor, mask_X: Tensor) -> Tensor:
    targets_X = targets_X.masked_fill(~mask_X, 0)
    losses = cross_entropy(logits_XC.flatten(0, -2).float(), targets_X.flatten(), reduction="none")
    return masked_mean(losses, mask_X.flatten())
