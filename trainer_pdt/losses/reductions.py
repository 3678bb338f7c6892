"""Masked means and the one place where labels are shifted.

Tensor letters of this package: B documents, S streams, R = B * S rows, T tokens, M supervised tokens, V vocabulary,
K rounds (blocks of a row), n notes per block, N note width, P plan slots, I plan items.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """
    Mean of `values` where `mask` says so. With nothing to average it is exactly 0 and still part of the graph.

    Args:
        values (`Tensor` of any shape): What is averaged. Values at masked positions are not read.
        mask (`Tensor` of the same shape): Boolean, or weights in 0..1. The denominator is its sum, at least 1.

    Returns:
        `Tensor`: Scalar in float32.
    """
    weights = _same_shape("mask", mask, values)
    return _weighted_sum(values, weights) / weights.sum().clamp(min=1.0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """
    Sum of `values * weights` divided by the sum of the weights; exactly 0 with a graph when all weights are 0.

    Args:
        values (`Tensor` of any shape): What is averaged. Values of weight 0 are not read.
        weights (`Tensor` of the same shape): Weights, none negative.

    Returns:
        `Tensor`: Scalar in float32.
    """
    weights = _same_shape("weights", weights, values)
    total = weights.sum()
    return _weighted_sum(values, weights) / torch.where(total > 0, total, torch.ones_like(total))


def supervised_positions(labels_RT: Tensor) -> Tensor:
    """
    Positions whose next token is supervised.

    Args:
        labels_RT (`LongTensor` of shape `[rows, tokens]`): Equal to the input ids, not shifted, -100 where masked.

    Returns:
        `BoolTensor` of shape `[rows, tokens]`: True at `t` when the token at `t + 1` has a label; the last is False.
    """
    positions_RT = torch.zeros_like(labels_RT, dtype=torch.bool)
    positions_RT[:, :-1] = labels_RT[:, 1:] != IGNORE_INDEX
    return positions_RT


def supervised_values(values_RT: Tensor, labels_RT: Tensor) -> Tensor:
    """
    Values that belong to label tokens (block offset, sibling-fact flag, weight), in the order of `shift_and_mask`.

    Args:
        values_RT (`Tensor` of shape `[rows, tokens, ...]`): `values_RT[r, t]` describes the token `labels_RT[r, t]`.
        labels_RT (`LongTensor` of shape `[rows, tokens]`): Unshifted labels.

    Returns:
        `Tensor` of shape `[supervised, ...]`.
    """
    _same_rows("values_RT", values_RT, labels_RT)
    return values_RT[:, 1:][labels_RT[:, 1:] != IGNORE_INDEX]


def shift_and_mask(
    logits_RTV: Tensor, labels_RT: Tensor, weights_RT: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Pair each supervised token with the prediction made one position before it, and drop everything else.

    Works on hidden states as well, so that the output matrix is only applied where there is something to learn:
    `shift_and_mask(hidden_RTD, labels_RT)` gives `[supervised, width]`.

    Args:
        logits_RTV (`Tensor` of shape `[rows, tokens, vocabulary]`): Predictions of every position.
        labels_RT (`LongTensor` of shape `[rows, tokens]`): Equal to the input ids, not shifted, -100 where masked.
        weights_RT (`Tensor` of shape `[rows, tokens]`, *optional*): Weight of each label token; 1 when missing.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: logits `[M, vocabulary]`, targets `[M]` and weights `[M]` in float32.
    """
    _same_rows("logits_RTV", logits_RTV, labels_RT)
    logits_MV = logits_RTV[supervised_positions(labels_RT)]
    targets_M = supervised_values(labels_RT, labels_RT)
    if weights_RT is None:
        return logits_MV, targets_M, torch.ones_like(targets_M, dtype=torch.float32)
    return logits_MV, targets_M, supervised_values(weights_RT, labels_RT).float()


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    return (torch.where(weights > 0, values.float(), 0.0) * weights).sum()


def _same_shape(name: str, mask: Tensor, values: Tensor) -> Tensor:
    if mask.shape != values.shape:
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected that of the values, {list(values.shape)}.")
    return mask.detach().float()


def _same_rows(name: str, values: Tensor, labels_RT: Tensor) -> None:
    if values.shape[:2] != labels_RT.shape:
        raise ValueError(f"{name} has shape {list(values.shape)}, expected [rows, tokens] = {list(labels_RT.shape)}.")
