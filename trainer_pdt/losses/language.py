"""Losses on next-token predictions: cross-entropy, distillation, staying close to the trunk, starts of blocks.

All of them take what `shift_and_mask` returns: one row of logits per supervised token, or [`ChunkedLogits`] of them.
Logits are read in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import ChunkedLogits, by_chunk
from .reductions import masked_mean, weighted_mean

BUCKET_ROWS = 64
"""Positions of which a copy of the logits exists at the same time."""


@dataclass(frozen=True)
class TopKTeacher:
    """
    A teacher's distribution in small form: its best tokens and everything else as one bucket.

    Args:
        log_probs_MC (`Tensor` of shape `[supervised, k + 1]`): Log-probabilities of the k tokens; the rest is last.
        indices_Mk (`LongTensor` of shape `[supervised, k]`): Ids of the k tokens.
        temperature (`float`): Temperature that the log-probabilities were taken at.
    """

    log_probs_MC: Tensor
    indices_Mk: Tensor
    temperature: float

    def __getitem__(self, place: slice) -> "TopKTeacher":
        """The same of some of the tokens."""
        return TopKTeacher(self.log_probs_MC[place], self.indices_Mk[place], self.temperature)


def top_k_teacher(logits_MV: Tensor, k: int, temperature: float = 1.0) -> TopKTeacher:
    """
    Keep the `k` best tokens of a teacher, without gradient, so that its `[M, V]` tensor can be freed.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Teacher logits.
        k (`int`): Tokens kept, 1 to vocabulary - 1.
        temperature (`float`, *optional*, defaults to 1.0): Temperature of the distillation, above 0.
    """
    _check_temperature(temperature)
    if not 1 <= k < logits_MV.shape[-1]:
        raise ValueError(f"k={k} is out of range, allowed: 1 to vocabulary - 1 = {logits_MV.shape[-1] - 1}.")
    logits_MV = logits_MV.detach()
    indices_Mk = logits_MV.topk(k, dim=-1).indices
    return TopKTeacher(_bucketed_log_probs(logits_MV, indices_Mk, temperature), indices_Mk, temperature)


def join_teachers(parts: Sequence[TopKTeacher]) -> TopKTeacher:
    """One teacher of the supervised tokens of all `parts`, in their order; they have one temperature."""
    log_probs_MC = torch.cat([part.log_probs_MC for part in parts])
    return TopKTeacher(log_probs_MC, torch.cat([part.indices_Mk for part in parts]), parts[0].temperature)


def token_ce(logits_MV: Tensor | ChunkedLogits, targets_M: Tensor) -> Tensor:
    """
    Cross-entropy of every supervised token.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Predictions.
        targets_M (`LongTensor` of shape `[supervised]`): Tokens that follow.

    Returns:
        `Tensor` of shape `[supervised]` in nats.
    """
    return by_chunk(_ce, logits_MV, targets_M)


def lm_ce(logits_MV: Tensor | ChunkedLogits, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """
    Cross-entropy with a weight per token, divided by the sum of the weights. Gradient: the logits.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Student predictions.
        targets_M (`LongTensor` of shape `[supervised]`): Tokens that follow.
        weights_M (`Tensor` of shape `[supervised]`): For example 5 on sibling-fact tokens and 1 elsewhere.
    """
    return weighted_mean(token_ce(logits_MV, targets_M), weights_M)


def token_kl(logits_MV: Tensor | ChunkedLogits, teacher: Tensor | TopKTeacher, temperature: float = 1.0) -> Tensor:
    """
    `temperature ** 2 * KL(teacher || student)` of every supervised token; the teacher gets no gradient.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Student predictions.
        teacher (`Tensor` of the same shape or `TopKTeacher`): Teacher at the same tokens.
        temperature (`float`, *optional*, defaults to 1.0): Divides both logits, above 0. A `TopKTeacher` has to have
            been made at the same temperature.

    Returns:
        `Tensor` of shape `[supervised]` in nats.
    """
    _check_temperature(temperature)
    return by_chunk(_kl, logits_MV, teacher, temperature=temperature)


def _ce(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    return -_bucketed_log_probs(logits_MV, targets_M[:, None], 1.0)[:, 0]


def _kl(logits_MV: Tensor, teacher: Tensor | TopKTeacher, temperature: float) -> Tensor:
    if isinstance(teacher, TopKTeacher):
        if teacher.temperature != temperature:
            raise ValueError(f"temperature={temperature} differs from the teacher's, allowed: {teacher.temperature}.")
        target = teacher.log_probs_MC.detach()
        student = _bucketed_log_probs(logits_MV, teacher.indices_Mk, temperature)
    else:
        target = torch.log_softmax(teacher.detach().float() / temperature, dim=-1)
        student = torch.log_softmax(logits_MV.float() / temperature, dim=-1)
    if target.shape != student.shape:
        raise ValueError(f"teacher has shape {list(target.shape)}, expected the student's {list(student.shape)}.")
    return temperature**2 * (target.exp() * (target - student)).sum(dim=-1)


def kd_lm(
    logits_MV: Tensor | ChunkedLogits, teacher: Tensor | TopKTeacher, weights_M: Tensor, temperature: float = 1.0
) -> Tensor:
    """
    Distillation of next-token predictions, `T ** 2 * KL(teacher || student)`. Gradient: the student's logits.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Student predictions.
        teacher (`Tensor` of the same shape or `TopKTeacher`): Branch with true notes, or the trunk that reads the
            siblings' text; at the same supervised tokens.
        weights_M (`Tensor` of shape `[supervised]`): Weight per token.
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
    """
    return weighted_mean(token_kl(logits_MV, teacher, temperature), weights_M)


def keep_close(logits_MV: Tensor | ChunkedLogits, trunk: Tensor | TopKTeacher, mask_M: Tensor) -> Tensor:
    """
    `KL(trunk || model)` on tokens that no sibling decides, so that notes change only what they have to. Gradient: the
    model's logits.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Model with notes.
        trunk (`Tensor` of the same shape or `TopKTeacher`): Trunk alone on the same row.
        mask_M (`BoolTensor` of shape `[supervised]`): True on tokens that are not part of a sibling fact.
    """
    return masked_mean(token_kl(logits_MV, trunk), mask_M)


def block_start_ce(logits_MV: Tensor | ChunkedLogits, targets_M: Tensor, offsets_M: Tensor, count: int) -> Tensor:
    """
    Cross-entropy of the first `count` tokens of each block, where the window has just changed. Gradient: the logits.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Student predictions.
        targets_M (`LongTensor` of shape `[supervised]`): Tokens that follow.
        offsets_M (`LongTensor` of shape `[supervised]`): Place of each token in its block from 0; negative = no block.
        count (`int`): Tokens per block, at least 1.
    """
    if count < 1:
        raise ValueError(f"count={count} is out of range, allowed: at least 1.")
    return masked_mean(token_ce(logits_MV, targets_M), (offsets_M >= 0) & (offsets_M < count))


class _Buckets(torch.autograd.Function):
    """
    Logits `[M, V]` as `[M, k + 1]`: those of k tokens and the log-sum-exp of all others. Beside the logits themselves
    nothing of the vocabulary's size is kept, and the gradient is the only other tensor of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, indices_Mk: Tensor) -> Tensor:
        parts = zip(logits_MV.split(BUCKET_ROWS), indices_Mk.split(BUCKET_ROWS), strict=True)
        rests = [part.scatter(1, indices, float("-inf")).logsumexp(dim=-1, keepdim=True) for part, indices in parts]
        rest_M1 = torch.cat(rests)
        ctx.save_for_backward(logits_MV, indices_Mk, rest_M1)
        return torch.cat([logits_MV.gather(1, indices_Mk), rest_M1], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MC: Tensor) -> tuple[Tensor, None]:
        logits_MV, indices_Mk, rest_M1 = ctx.saved_tensors
        found_MV = (logits_MV - rest_M1).exp_().mul_(gradient_MC[:, -1:])
        return found_MV.scatter_(1, indices_Mk, gradient_MC[:, :-1]), None


def _bucketed_log_probs(logits_MV: Tensor, indices_Mk: Tensor, temperature: float) -> Tensor:
    logits_MV = logits_MV.float()
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    return torch.log_softmax(_Buckets.apply(logits_MV, indices_Mk), dim=-1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is out of range, allowed: above 0.")
