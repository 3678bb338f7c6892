"""Loss of the head that decides whether a block may stand, and its targets."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .reductions import weighted_mean


def agreement_bce(
    agreement_logits_RK: Tensor, targets_RK: Tensor, mask_RK: Tensor, negative_weight: float | None = None
) -> Tensor:
    """
    Binary cross-entropy over supervised blocks, normalised by the sum of the weights. Gradient: the logits.

    Args:
        agreement_logits_RK (`Tensor` of shape `[rows, rounds]`): Above 0 = the block may stand.
        targets_RK (`Tensor` of the same shape): 1 = agrees with the siblings, 0 = contradicts them.
        mask_RK (`BoolTensor` of the same shape): Blocks with a label.
        negative_weight (`float`, *optional*): Weight of contradicting blocks relative to agreeing ones, above 0. When
            missing, both classes get half of the weight of the batch (a class without a block gives the other all).
    """
    if negative_weight is not None and not negative_weight > 0:
        raise ValueError(f"negative_weight={negative_weight} is out of range, allowed: above 0.")
    losses_RK = binary_cross_entropy_with_logits(agreement_logits_RK.float(), targets_RK.float(), reduction="none")
    if negative_weight is None:
        weights_RK = balanced_weights(targets_RK, mask_RK)
    else:
        weights_RK = torch.where(targets_RK > 0.5, 1.0, negative_weight) * mask_RK.float()
    return weighted_mean(losses_RK, weights_RK)


def balanced_weights(targets_RK: Tensor, mask_RK: Tensor) -> Tensor:
    """
    Weights under which the two classes count the same in sum.

    Args:
        targets_RK (`Tensor` of shape `[rows, rounds]`): Labels 0 or 1.
        mask_RK (`BoolTensor` of the same shape): Blocks with a label.

    Returns:
        `Tensor` of shape `[rows, rounds]`: 0 where masked; 1 for all labelled blocks when one class is absent.
    """
    supervised_RK = mask_RK.bool()
    positive_RK = supervised_RK & (targets_RK > 0.5)
    positives, total = positive_RK.sum().float(), supervised_RK.sum().float()
    negatives = total - positives
    balanced_RK = torch.where(positive_RK, total / (2 * positives.clamp(min=1)), total / (2 * negatives.clamp(min=1)))
    both = (positives > 0) & (negatives > 0)
    return torch.where(both, balanced_RK, torch.ones_like(balanced_RK)) * supervised_RK


def readiness_targets(corrupted_RK: Tensor, labelled_RK: Tensor) -> tuple[Tensor, Tensor]:
    """
    Labels of the agreement head from planted contradictions.

    Args:
        corrupted_RK (`BoolTensor` of shape `[rows, rounds]`): Blocks in which a sibling fact was replaced.
        labelled_RK (`BoolTensor` of the same shape): Blocks that can be judged: they hold a reference whose owner
            stated the fact in a visible or in the same round, and the stream had not ended.

    Returns:
        `tuple[Tensor, Tensor]`: targets in float32 (1 = may stand, 0 = planted contradiction) and the mask.
    """
    if corrupted_RK.shape != labelled_RK.shape:
        raise ValueError(
            f"labelled_RK has shape {list(labelled_RK.shape)}, expected that of corrupted_RK = "
            f"{list(corrupted_RK.shape)}."
        )
    return 1.0 - corrupted_RK.float(), labelled_RK.bool()
