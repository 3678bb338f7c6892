"""What next-token losses average: cross-entropy and divergence of every supervised token.

Logits are given as `shift_and_mask` returns them, one row per supervised token, and are read in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reductions import masked_mean

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


def token_ce(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """
    Cross-entropy of every supervised token. Gradient: the logits.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Predictions.
        targets_M (`LongTensor` of shape `[supervised]`): Tokens that follow.

    Returns:
        `Tensor` of shape `[supervised]` in nats.
    """
    return -_bucketed_log_probs(logits_MV, targets_M[:, None], 1.0)[:, 0]


def token_kl(logits_MV: Tensor, teacher: Tensor | TopKTeacher, temperature: float = 1.0) -> Tensor:
    """
    `temperature ** 2 * KL(teacher || student)` of every supervised token. Gradient: the logits; the teacher gets none.

    Args:
        logits_MV (`Tensor` of shape `[supervised, vocabulary]`): Student predictions.
        teacher (`Tensor` of the same shape or `TopKTeacher`): Teacher at the same tokens.
        temperature (`float`, *optional*, defaults to 1.0): Divides both logits, above 0. A `TopKTeacher` has to have
            been made at the same temperature.

    Returns:
        `Tensor` of shape `[supervised]` in nats.
    """
    _check_temperature(temperature)
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


def block_start_ce(ce_M: Tensor, offsets_M: Tensor, count: int) -> Tensor:
    """
    Cross-entropy of the first `count` tokens of each block, where the window has just changed. Gradient: `ce_M`.

    Args:
        ce_M (`Tensor` of shape `[supervised]`): `token_ce` of the student.
        offsets_M (`LongTensor` of shape `[supervised]`): Place of each token in its block from 0; negative = no block.
        count (`int`): Tokens per block, at least 1.
    """
    if count < 1:
        raise ValueError(f"count={count} is out of range, allowed: at least 1.")
    return masked_mean(ce_M, (offsets_M >= 0) & (offsets_M < count))


class _Buckets(torch.autograd.Function):
    """
    Logits `[M, V]` over a temperature as `[M, k + 1]`: those of k tokens and the log-sum-exp of all others. Beside the
    logits themselves nothing of the vocabulary's size is kept, and the gradient is the only other tensor of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, indices_Mk: Tensor, temperature: float) -> Tensor:
        parts = zip(logits_MV.split(BUCKET_ROWS), indices_Mk.split(BUCKET_ROWS), strict=True)
        rests = [
            (part.float() / temperature).scatter_(1, indices, float("-inf")).logsumexp(dim=-1, keepdim=True)
            for part, indices in parts
        ]
        rest_M1 = torch.cat(rests)
        ctx.save_for_backward(logits_MV, indices_Mk, rest_M1)
        ctx.temperature = temperature
        return torch.cat([logits_MV.gather(1, indices_Mk).float() / temperature, rest_M1], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MC: Tensor) -> tuple[Tensor, None, None]:
        logits_MV, indices_Mk, rest_M1 = ctx.saved_tensors
        gradient_MC = gradient_MC / ctx.temperature
        found_MV = (logits_MV.float() / ctx.temperature).sub_(rest_M1).exp_().mul_(gradient_MC[:, -1:])
        return found_MV.scatter_(1, indices_Mk, gradient_MC[:, :-1]).to(logits_MV.dtype), None, None


def _bucketed_log_probs(logits_MV: Tensor, indices_Mk: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_Buckets.apply(logits_MV, indices_Mk, temperature), dim=-1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is out of range, allowed: above 0.")
