"""The interventions of a call as the loop applies them: in order, each to the rows of its own streams.

Letters: M rows of a request, W notes of a window, N note width.
"""

from dataclasses import replace
from typing import Any

import torch

from .interventions import INTERVENTIONS, Intervention, WindowRequest


class InterventionChain:
    """
    The interventions of a call, one after the other, each for its own streams.

    Args:
        interventions (`tuple[Intervention]`): In order.
        num_streams (`int`), num_prompts (`int`): S and B.
    """

    def __init__(self, interventions: tuple[Intervention, ...], num_streams: int, num_prompts: int) -> None:
        self.interventions, self.num_streams, self.num_prompts = interventions, num_streams, num_prompts

    def describe(self) -> list[dict[str, Any]]:
        """What the trace says of them; arguments of the kinds that [`INTERVENTIONS`] names."""
        return [
            one.to_dict() if type(one) is INTERVENTIONS.get(one.name) else {"name": one.name, "streams": one.streams}
            for one in self.interventions
        ]

    def _concerned(self, intervention: Intervention, rows_M: torch.Tensor) -> torch.Tensor | None:
        """Rows `[M]` that an intervention is for; `None`: all."""
        if intervention.streams is None:
            return None
        streams = torch.tensor(intervention.streams, device=rows_M.device)
        return torch.isin(rows_M % self.num_streams, streams)

    def request(self, request: WindowRequest) -> WindowRequest:
        """The request that the bus is to answer."""
        for intervention in self.interventions:
            edited = intervention.request(request, self.num_streams, self.num_prompts)
            mine = self._concerned(intervention, request.rows)
            if mine is not None:
                pairs = {
                    name: (_rowwise(getattr(edited, name), mine), _rowwise(getattr(request, name), mine))
                    for name in ("sources", "read_round", "lag", "own_notes")
                }
                edited = replace(request, **{name: torch.where(mine, *pair) for name, pair in pairs.items()})
            request = edited
        return request

    def window(
        self, rows_M: torch.Tensor, notes: torch.Tensor, mask: torch.Tensor, plan_places: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The window `[M, W, N]` and mask `[M, W]` that the rows read."""
        for intervention in self.interventions:
            edited, mine = intervention.window(notes, mask, plan_places), self._concerned(intervention, rows_M)
            if mine is not None:
                keep = mine[:, None]
                edited = torch.where(keep[..., None], edited[0], notes), torch.where(keep, edited[1], mask)
            notes, mask = edited
        return notes, mask

    def gate_scale(self, rows_M: torch.Tensor, scale: float | torch.Tensor) -> float | torch.Tensor:
        """The gate's scale for the rows: one number, or `[M]`."""
        for intervention in self.interventions:
            edited, mine = intervention.gate_scale(scale), self._concerned(intervention, rows_M)
            scale = edited if mine is None else torch.where(mine, _rowwise(edited, mine), _rowwise(scale, mine))
        return scale

    def agreement(
        self, agreement_M: torch.Tensor, rows_M: torch.Tensor, round_M: torch.Tensor, attempt_M: torch.Tensor
    ) -> torch.Tensor:
        """The agreement `[M]` that decides."""
        for intervention in self.interventions:
            edited = intervention.agreement(agreement_M, rows_M, round_M, attempt_M)
            mine = self._concerned(intervention, rows_M)
            agreement_M = edited if mine is None else torch.where(mine, edited, agreement_M)
        return agreement_M


def _rowwise(value: Any, rows_M: torch.Tensor) -> torch.Tensor:
    """A number or flag for all rows as `[M]`; a tensor as it is."""
    return value if torch.is_tensor(value) else torch.full(rows_M.shape, value, device=rows_M.device)
