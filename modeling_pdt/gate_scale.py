"""The scale of every row's SNC gate: constant, annealed by how its blocks fare, clamped when the row flickers.

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
        flicker (`FlickerGuard`, *optional*): Watches an annealed scale, and which plan item is covered best.
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
        # The newest block is last; places that none has filled yet are NaN, and -1.
        window = flicker.window if flicker else 0
        self.history_RH = torch.full((rows, window), float("nan"), device=device)
        self.items_RH = torch.full((rows, window), -1, device=device)
        self.switches_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.flickers_R = torch.zeros(rows, dtype=torch.bool, device=device)

    def of(self, rows_A: torch.Tensor) -> float | torch.Tensor:
        """The scale to multiply the gates of rows with: one number for all, or `[A]`."""
        clamps = self.flicker is not None and self.flicker.clamp is not None
        if not clamps:
            return self.gate_scale if self.annealing is None else self.scale_R[rows_A]
        return torch.where(self.flickers_R[rows_A], self.flicker.clamp, self.scale_R[rows_A])

    def judged(
        self,
        rows_M: torch.Tensor,
        agreement_M: torch.Tensor | None,
        withdrawn_M: torch.Tensor,
        item_M: torch.Tensor | None = None,
    ) -> None:
        """
        Follows a decision about the blocks of rows; see [`GateAnnealing`] and [`FlickerGuard`].

        Args:
            rows_M (`torch.LongTensor` of shape `[M]`): The rows.
            agreement_M (`torch.Tensor` of shape `[M]`, *optional*), withdrawn_M (`torch.BoolTensor` of shape `[M]`):
                The decision.
            item_M (`torch.LongTensor` of shape `[M]`, *optional*): The plan item that each row covers best.
        """
        if self.annealing is not None:
            self._anneal(rows_M, agreement_M, withdrawn_M)
        if self.flicker is not None:
            self._watch(rows_M, item_M)

    def _anneal(self, rows_M: torch.Tensor, agreement_M: torch.Tensor, withdrawn_M: torch.Tensor) -> None:
        policy = self.annealing
        scale, cooldown = self.scale_R[rows_M], self.cooldown_R[rows_M]
        volatile = withdrawn_M | (agreement_M < self.threshold + policy.stability_margin)
        recovered = torch.where(cooldown > 0, scale, (scale + policy.recovery).clamp(max=self.gate_scale))
        decayed = (scale * policy.decay).clamp(min=policy.min_value)
        self.scale_R[rows_M] = torch.where(volatile, decayed, recovered)
        self.cooldown_R[rows_M] = torch.where(volatile, policy.cooldown, (cooldown - 1).clamp(min=0))

    def _watch(self, rows_M: torch.Tensor, item_M: torch.Tensor | None) -> None:
        self.history_RH[rows_M] = torch.cat([self.history_RH[rows_M, 1:], self.scale_R[rows_M, None]], dim=1)
        # The comparison is false as long as a place is NaN.
        flickers_M = self.history_RH[rows_M].std(dim=1, correction=0) > self.flicker.max_std
        if self.flicker.max_switches is not None:
            items_MH = torch.cat([self.items_RH[rows_M, 1:], item_M[:, None]], dim=1)
            switches_MH = (items_MH[:, 1:] != items_MH[:, :-1]) & (items_MH[:, :-1] >= 0)
            self.items_RH[rows_M], self.switches_R[rows_M] = items_MH, switches_MH.sum(dim=1)
            flickers_M |= (items_MH[:, 0] >= 0) & (self.switches_R[rows_M] > self.flicker.max_switches)
        self.flickers_R[rows_M] = flickers_M

    def record(self, rows_M: torch.Tensor) -> list[dict[str, Any]]:
        """Per row, what its event in the trace says of the gate; nothing for a scale that stays unwatched."""
        told = {}
        if self.annealing is not None:
            told["gate_scale"] = self.scale_R
        if self.flicker is not None:
            told["flickers"] = self.flickers_R
            if self.flicker.max_switches is not None:
                told["switches"] = self.switches_R
        columns = [values_R[rows_M].tolist() for values_R in told.values()]
        return [dict(zip(told, values, strict=True)) for values in zip(*columns, strict=True)] or [{} for _ in rows_M]
