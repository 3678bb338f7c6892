"""The scale of every row's SNC gate: constant, annealed by how its blocks fare, clamped when it flickers.

Letters: R rows, A rows in the trunk's batch, M rows at a block boundary.
"""

from typing import Any

import torch

from .policies import FlickerGuard, GateAnnealing


class GateScale:
    """
    Gate scales of all rows.

    Args:
        gate_scale (`float`): Where every row starts, and the most it recovers to.
        rows (`int`): R.
        device (`torch.device`): Of the scales.
        annealing (`GateAnnealing`, *optional*): `None`: the scale stays.
        flicker (`FlickerGuard`, *optional*): Watches an annealed scale.
        threshold (`float`, *optional*): Least agreement that stands; needed for annealing.
    """

    def __init__(
        self,
        gate_scale: float,
        rows: int,
        device: torch.device,
        annealing: GateAnnealing | None = None,
        flicker: FlickerGuard | None = None,
        threshold: float | None = None,
    ) -> None:
        self.gate_scale, self.annealing, self.flicker, self.threshold = gate_scale, annealing, flicker, threshold
        self.scale_R = torch.full((rows,), float(gate_scale), device=device)
        self.cooldown_R = torch.zeros(rows, dtype=torch.long, device=device)
        # The newest scale is last; places that no block has filled yet are NaN.
        window = flicker.window if flicker else 0
        self.history_RH = torch.full((rows, window), float("nan"), device=device)
        self.flickers_R = torch.zeros(rows, dtype=torch.bool, device=device)

    def of(self, rows_A: torch.Tensor) -> float | torch.Tensor:
        """The scale to multiply the gates of rows with: one number for all, or `[A]`."""
        if self.annealing is None:
            return self.gate_scale
        if self.flicker is None or self.flicker.clamp is None:
            return self.scale_R[rows_A]
        return torch.where(self.flickers_R[rows_A], self.flicker.clamp, self.scale_R[rows_A])

    def judged(self, rows_M: torch.Tensor, agreement_M: torch.Tensor | None, withdrawn_M: torch.Tensor) -> None:
        """Follows a decision about the blocks of rows; see [`GateAnnealing`]."""
        policy = self.annealing
        if policy is None:
            return
        scale, cooldown = self.scale_R[rows_M], self.cooldown_R[rows_M]
        volatile = withdrawn_M | (agreement_M < self.threshold + policy.stability_margin)
        recovered = torch.where(cooldown > 0, scale, (scale + policy.recovery).clamp(max=self.gate_scale))
        decayed = (scale * policy.decay).clamp(min=policy.min_value)
        self.scale_R[rows_M] = torch.where(volatile, decayed, recovered)
        self.cooldown_R[rows_M] = torch.where(volatile, policy.cooldown, (cooldown - 1).clamp(min=0))
        if self.flicker is not None:
            self.history_RH[rows_M] = torch.cat([self.history_RH[rows_M, 1:], self.scale_R[rows_M, None]], dim=1)
            # The comparison is false as long as a place is NaN.
            self.flickers_R[rows_M] = self.history_RH[rows_M].std(dim=1, correction=0) > self.flicker.max_std

    def record(self, rows_M: torch.Tensor) -> list[dict[str, Any]]:
        """Per row, what its event in the trace says of the gate; nothing for a scale that stays."""
        if self.annealing is None:
            return [{} for _ in rows_M]
        scales, flickers = self.scale_R[rows_M].tolist(), self.flickers_R[rows_M].tolist()
        guarded = self.flicker is not None
        return [
            {"gate_scale": scale, **({"flickers": flag} if guarded else {})}
            for scale, flag in zip(scales, flickers, strict=True)
        ]
