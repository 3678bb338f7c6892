"""Losses as pure functions on tensors, and their weighted total. Those on next tokens are means of values per token.

| name in a stage | function | trains |
|---|---|---|
| `planner` | `planner_ce` | planner |
| `kd_plan` | `kd_plan` | planner |
| `plan_snapshot` | mean of `token_kl` | planner, snc, stream_adapters, writer |
| `lm_ce` | weighted mean of `token_ce` on the student branch | snc, stream_adapters, writer |
| `kd` | weighted mean of `token_kl` | snc, stream_adapters, writer |
| `keep_close` | mean of `token_kl` over tokens that no sibling decides | snc, stream_adapters, writer |
| `block_start` | `block_start_ce` | snc, stream_adapters, writer |
| `notes` | weighted mean of `token_ce` on the teacher branch | encoder, snc, stream_adapters |
| `spec` | `spec_cosine` | writer |
| `spec_kl` | `spec_kl` | writer |
| `use` | `use_margin` | snc, stream_adapters, writer |
| `stab` | mean of `token_kl` over tokens that no sibling decides | snc, stream_adapters, writer |
| `red` | `redundancy` | writer |
| `cov` | `coverage_bce` | coverage |
| `stream` | `stream_ce` | stream |
| `agree` | `agreement_bce` | agreement |

`nli_violation` (`nli`) is a metric: it has no gradient and takes no weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .agreement import agreement_bce, balanced_weights, readiness_targets
from .chunks import ChunkedLogits, Read
from .language import TopKTeacher, block_start_ce, join_teachers, token_ce, token_kl, top_k_teacher
from .notes import NLIScorer, nli_violation, redundancy, spec_cosine, spec_kl, use_margin
from .plan import coverage_bce, kd_plan, planner_ce, stream_ce
from .reductions import (
    IGNORE_INDEX,
    masked_mean,
    shift_and_mask,
    supervised_positions,
    supervised_values,
    weighted_mean,
)


@dataclass(frozen=True)
class LossReport:
    """
    Result of one step's losses.

    Args:
        total (`Tensor`): Scalar to call `backward` on.
        parts (`dict[str, Tensor]`): Every part without its weight, detached, for logging.
    """

    total: Tensor
    parts: dict[str, Tensor]


def weighted_total(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> LossReport:
    """
    Sum of `weight * part` over the parts whose weight is not 0.

    Args:
        parts (`Mapping[str, Tensor]`): Scalars by loss name. A part without a weight is only logged, so a part that is
            not a number does no harm while its weight is 0.
        weights (`Mapping[str, float]`): Weights by loss name. Every name of non-zero weight needs its part.

    Returns:
        `LossReport`: The total and the detached parts.
    """
    active = {name: weight for name, weight in weights.items() if weight != 0}
    missing = sorted(set(active) - set(parts))
    if missing:
        raise ValueError(f"weights names {missing}, allowed: the parts that were computed = {sorted(parts)}.")
    if not active:
        raise ValueError(f"weights={dict(weights)} leaves nothing to train on, allowed: at least one non-zero weight.")
    total = sum(weight * parts[name] for name, weight in active.items())
    return LossReport(total, {name: part.detach() for name, part in parts.items()})


__all__ = [
    "IGNORE_INDEX",
    "ChunkedLogits",
    "LossReport",
    "NLIScorer",
    "Read",
    "TopKTeacher",
    "agreement_bce",
    "balanced_weights",
    "block_start_ce",
    "coverage_bce",
    "join_teachers",
    "kd_plan",
    "masked_mean",
    "nli_violation",
    "planner_ce",
    "readiness_targets",
    "redundancy",
    "shift_and_mask",
    "spec_cosine",
    "spec_kl",
    "stream_ce",
    "supervised_positions",
    "supervised_values",
    "token_ce",
    "token_kl",
    "top_k_teacher",
    "use_margin",
    "weighted_mean",
    "weighted_total",
]
