"""Cadence: after which token a row ends its block.

Letters: R rows, M rows at a block boundary.
"""

import math
from typing import Any

import torch

from .policies import CadencePolicy
from .sampling import fold_keys, keyed_uniform

# Keeps the draws of the cadence apart from those of the tokens, which share a row's key.
CADENCE_KEY = 0x5CAD


def interval_tokens(value: int | float | None, policy: CadencePolicy, block_size: int) -> int:
    """M in tokens: as given, from a share rho, or `block_size`; see [`CadencePolicy`]."""
    if value is None:
        return block_size
    if isinstance(value, float):
        tokens = math.exp(value * math.log(policy.interval_min) + (1 - value) * math.log(policy.interval_max))
        # What rounding adds to a whole number is not another token.
        return math.ceil(round(tokens, 9))
    return value


class Cadence:
    """
    Decides, for all rows at once, which of them end their block with the token just consumed.

    Args:
        policy (`CadencePolicy`): How.
        block_size (`int`), commit_horizon (`int`): The usual and the longest block.
        stream_R (`torch.LongTensor` of shape `[R]`): Stream of every row.
        key_R (`torch.LongTensor` of shape `[R]`): Key of every row's draws.

    Raises:
        ValueError: When a block would be longer than `commit_horizon`, or `interval` has not one value per stream.
    """

    def __init__(
        self, policy: CadencePolicy, block_size: int, commit_horizon: int, stream_R: torch.Tensor, key_R: torch.Tensor
    ) -> None:
        self.policy, streams = policy, int(stream_R.max()) + 1
        given = policy.interval if isinstance(policy.interval, (list, tuple)) else [policy.interval] * streams
        if len(given) != streams:
            raise ValueError(f"cadence.interval must hold one value per stream ({streams}), got {policy.interval!r}.")
        self.intervals = [interval_tokens(value, policy, block_size) for value in given]
        deterministic = policy.mode == "deterministic"
        self.longest = policy.max_interval or commit_horizon
        if deterministic:
            self.longest = min(max(self.intervals), policy.max_interval or max(self.intervals))
        if self.longest > commit_horizon:
            raise ValueError(
                f"cadence: a block must be at most commit_horizon={commit_horizon} tokens long, got {self.longest}."
            )
        self.interval_R = torch.tensor(self.intervals, device=stream_R.device)[stream_R]
        self.key_R = fold_keys(torch.full_like(key_R, CADENCE_KEY), state=key_R)
        # What a stream agrees with before it was judged for the first time.
        self.agreement_R = torch.ones(stream_R.shape, device=stream_R.device)
        self.probability_R = self.uniform_R = None

    def complete(
        self,
        written_R: torch.Tensor,
        fed_R: torch.Tensor,
        attempt_R: torch.Tensor,
        waiting_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Rows `[R]` whose block ends.

        Args:
            written_R, fed_R, attempt_R (`torch.LongTensor` of shape `[R]`): Tokens of the block, tokens of the
                section, and withdrawals of the block so far.
            waiting_R (`torch.BoolTensor` of shape `[R]`, *optional*): Rows whose block has ended already.
        """
        policy, forced = self.policy, written_R >= self.longest
        if policy.mode == "deterministic":
            return forced | (written_R >= self.interval_R)
        probability = (1 / self.interval_R).clamp(policy.min_probability, 1)
        if policy.mode == "adaptive":
            probability = (probability * self._multiplier(written_R)).clamp(policy.min_probability, 1)
        uniform = keyed_uniform(fed_R, attempt_R, state=self.key_R)
        if waiting_R is not None and self.probability_R is not None:
            probability = torch.where(waiting_R, self.probability_R, probability)
            uniform = torch.where(waiting_R, self.uniform_R, uniform)
        self.probability_R, self.uniform_R = probability, uniform
        return forced | (uniform < probability)

    def _multiplier(self, written_R: torch.Tensor) -> torch.Tensor:
        policy = self.policy
        share = (self.agreement_R - policy.agreement_low) / (policy.agreement_high - policy.agreement_low)
        low, high = policy.multiplier_min, policy.multiplier_max
        multiplier = high + (low - high) * share.clamp(0, 1)
        age = 1 + policy.age_boost * (written_R / self.interval_R - 1).clamp(min=0)
        return (multiplier * age).clamp(low, high)

    def judged(self, rows_M: torch.Tensor, agreement_M: torch.Tensor | None) -> None:
        """Takes note of the latest agreement of rows."""
        if agreement_M is not None:
            self.agreement_R[rows_M] = agreement_M.to(self.agreement_R)

    def record(self, rows_M: torch.Tensor) -> list[dict[str, Any]]:
        """Per row, what its event in the trace says of the cadence; nothing where every block has its M tokens."""
        if self.probability_R is None:
            return [{} for _ in rows_M]
        drawn = zip(self.probability_R[rows_M].tolist(), self.uniform_R[rows_M].tolist(), strict=True)
        return [{"cadence": {"probability": p, "sample": u, "drawn": u < p}} for p, u in drawn]
