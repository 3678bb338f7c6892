"""Stalling: rows whose block disagrees stand still until their siblings have written more.

Letters: R rows, M rows at a block boundary, B prompts, S streams, V rounds.
"""

import torch

from .bus import NotesBus
from .streams import StreamBatch


class Stalling:
    """
    Which blocks may wait, and which of those that wait are judged again.

    Args:
        streams (`StreamBatch`): The rows; `waiting_R` says which of them wait.
        bus (`NotesBus`): What they read from.
    """

    def __init__(self, streams: StreamBatch, bus: NotesBus) -> None:
        self.streams, self.bus = streams, bus
        own = torch.eye(bus.num_streams, dtype=torch.bool, device=streams.device)
        self.sources_SS = ~own if bus.reads_SS is None else bus.reads_SS & ~own
        # Notes of its sources that each row had been judged by when it began to wait.
        self.heard_R = torch.zeros_like(streams.fed_R)

    def _from_sources(self, values_R: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """Sum `[M]` of `values_R` over the siblings that each row reads."""
        values_BS = values_R.view(-1, self.bus.num_streams).long()
        return (values_BS[self.streams.prompt_R[rows_M]] * self.sources_SS[self.streams.stream_R[rows_M]]).sum(dim=1)

    def _published_R(self) -> torch.Tensor:
        return self.bus.published_BSV.sum(dim=2).flatten()

    def ready(self, rows_M: torch.Tensor) -> torch.Tensor:
        """
        Of the rows at a boundary those to judge: who completes a block, and who has waited for one that it reads, or
        reads nobody any more who is writing.
        """
        streams = self.streams
        waits_M = streams.waiting_R[rows_M]
        writing_R = streams.live_R & ~streams.waiting_R
        completing_R = torch.zeros_like(writing_R)
        completing_R[rows_M] = ~waits_M
        heard = self._from_sources(self._published_R(), rows_M) > self.heard_R[rows_M]
        heard |= self._from_sources(completing_R, rows_M) > 0
        return rows_M[~waits_M | heard | (self._from_sources(writing_R, rows_M) == 0)]

    def lag(self, rows_M: torch.Tensor) -> torch.Tensor:
        """Lag `[M]` of the notes that blocks are judged by: a block that has waited knows what came since."""
        streams = self.streams
        sources_MS = self.sources_SS[streams.stream_R[rows_M]]
        published_MSV = self.bus.published_BSV[streams.prompt_R[rows_M]] & sources_MS[..., None]
        rounds = torch.arange(published_MSV.shape[2], device=rows_M.device)
        newest_M = torch.where(published_MSV, rounds, -1).flatten(1).amax(dim=1)
        ahead = newest_M - streams.round_R[rows_M]
        return torch.where(streams.waiting_R[rows_M], -ahead.clamp(min=0), 0)

    def may_wait(self, rows_M: torch.Tensor, ending_M: torch.Tensor, withdrawn_M: torch.Tensor) -> torch.Tensor:
        """
        Rows `[M]` that read somebody who goes on writing.

        Args:
            rows_M (`torch.LongTensor` of shape `[M]`): All rows that are judged now.
            ending_M (`torch.BoolTensor` of shape `[M]`): Rows that end with this block.
            withdrawn_M (`torch.BoolTensor` of shape `[M]`): Rows that are already to wait.
        """
        writing_R = self.streams.live_R & ~self.streams.waiting_R
        writing_R[rows_M] = ~ending_M & ~withdrawn_M
        return self._from_sources(writing_R, rows_M) > 0

    def hold(self, rows_M: torch.Tensor) -> None:
        """Lets rows wait."""
        self.streams.wait(rows_M)
        self.heard_R[rows_M] = self._from_sources(self._published_R(), rows_M)
