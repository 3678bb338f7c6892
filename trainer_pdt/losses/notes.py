"""Losses that make notes true, readable, used and different, and the metric about notes that gives no gradient."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .reductions import masked_mean, weighted_mean


class NLIScorer(Protocol):
    """Judges pairs of texts; `trainer_pdt.nli` has two, and any callable of this form will do."""

    def __call__(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Tensor:
        """Probabilities `[pairs, 2]` of contradiction and of neutral."""
        ...


def spec_cosine(written_RKnN: Tensor, encoded_RKnN: Tensor, mask_RK: Tensor) -> Tensor:
    """
    Distance of the writer's notes from the encoder's, `1 - cosine`. Gradient: the written notes, never the encoder's.

    Args:
        written_RKnN (`Tensor` of shape `[rows, rounds, notes, width]`): Notes of the writer on its own blocks.
        encoded_RKnN (`Tensor` of the same shape): Notes of the encoder on the true text of the same blocks.
        mask_RK (`BoolTensor` of shape `[rows, rounds]`): Blocks that exist.
    """
    cosine_RK = cosine_similarity(written_RKnN.float(), encoded_RKnN.detach().float(), dim=-1).mean(dim=-1)
    return masked_mean(1.0 - cosine_RK, mask_RK)


def spec_kl(written_RKnN: Tensor, encoded_RKnN: Tensor, coverage_RK: Tensor, temperature: float = 1.0) -> Tensor:
    """
    Symmetric KL, `(KL(p || q) + KL(q || p)) / 2`, of written and encoded notes as softmax distributions over the note
    width, weighted by how much of the plan the block covers. Gradient: the written notes.

    Args:
        written_RKnN (`Tensor` of shape `[rows, rounds, notes, width]`): Notes of the writer.
        encoded_RKnN (`Tensor` of the same shape): Notes of the encoder on the same blocks.
        coverage_RK (`Tensor` of shape `[rows, rounds]`): Weight of each block in 0..1; 0 leaves it out.
        temperature (`float`, *optional*, defaults to 1.0): Divides the notes, above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is out of range, allowed: above 0.")
    written = torch.log_softmax(written_RKnN.float() / temperature, dim=-1)
    encoded = torch.log_softmax(encoded_RKnN.detach().float() / temperature, dim=-1)
    divergence_RKn = 0.5 * ((written.exp() - encoded.exp()) * (written - encoded)).sum(dim=-1)
    return weighted_mean(divergence_RKn.mean(dim=-1), coverage_RK)


def use_margin(ce_M: Tensor, ce_without_notes_M: Tensor, weights_M: Tensor, margin: float) -> Tensor:
    """
    `relu(margin - (CE without notes - CE))` of the weighted means: notes have to help by at least `margin` nats. The
    branch without notes is a constant, so the loss cannot be lowered by making that branch worse. Gradient: `ce_M`.

    Args:
        ce_M (`Tensor` of shape `[supervised]`): `token_ce` with notes.
        ce_without_notes_M (`Tensor` of shape `[supervised]`): `token_ce` of the same tokens with the bus empty.
        weights_M (`Tensor` of shape `[supervised]`): Weight per token; only tokens that need a note should count.
        margin (`float`): Nats, at least 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin={margin} is out of range, allowed: at least 0.")
    gain = weighted_mean(ce_without_notes_M.detach(), weights_M) - weighted_mean(ce_M, weights_M)
    return torch.relu(margin - gain) * (weights_M.sum() > 0)


def redundancy(notes_XSN: Tensor, mask_XS: Tensor, threshold: float = 0.7) -> Tensor:
    """
    Mean `relu(cosine - threshold)` over pairs of siblings that both wrote a note: siblings that write the same at the
    same time tell nobody anything new. Gradient: the notes of pairs above the threshold.

    Args:
        notes_XSN (`Tensor` of shape `[..., streams, width]`): One note per stream, any leading dimensions.
        mask_XS (`BoolTensor` of shape `[..., streams]`): Notes that exist.
        threshold (`float`, *optional*, defaults to 0.7): Cosine above which two notes say the same.
    """
    cosine_XSS = cosine_similarity(notes_XSN.float().unsqueeze(-2), notes_XSN.float().unsqueeze(-3), dim=-1)
    pairs_XSS = (mask_XS.unsqueeze(-1) & mask_XS.unsqueeze(-2)).triu(diagonal=1)
    return masked_mean(torch.relu(cosine_XSS - threshold), pairs_XSS)


@torch.no_grad()
def nli_violation(
    scorer: NLIScorer, premises: Sequence[str], hypotheses: Sequence[str], margin: float = 0.1
) -> Tensor:
    """
    Metric `nli`: `relu(contradiction - neutral - margin)` of every pair of texts, `[pairs]`. Text has no gradient, so
    this never trains the model; it judges what was written.

    Args:
        scorer (`NLIScorer`): Maps premises and hypotheses to probabilities `[pairs, 2]`: contradiction and neutral.
        premises (`Sequence[str]`): For example sections of an answer.
        hypotheses (`Sequence[str]`): For example its other sections; as many as premises.
        margin (`float`, *optional*, defaults to 0.1): Contradiction allowed above neutral, in 0..1.
    """
    if len(premises) != len(hypotheses):
        raise ValueError(f"hypotheses has {len(hypotheses)} texts, expected one per premise = {len(premises)}.")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin={margin} is out of range, allowed: 0 to 1.")
    if not premises:
        return torch.zeros(0)
    scores = scorer(premises, hypotheses)
    if scores.shape != (len(premises), 2):
        raise ValueError(f"scorer returned shape {list(scores.shape)}, expected [{len(premises)}, 2].")
    return torch.relu(scores[:, 0].float() - scores[:, 1].float() - margin)
