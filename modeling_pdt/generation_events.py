"""What a decoding call tells the outside: events of the trace and calls of the streamer, in order.

Letters: M rows at a block boundary.
"""

import torch

from .outputs import DecodingTrace
from .plan import PlanEntry
from .streaming import ParallelStreamer
from .streams import StreamBatch


class DecodingEvents:
    """
    Writes the trace and calls the streamer.

    Args:
        trace (`DecodingTrace`): Receives every event.
        streamer (`ParallelStreamer`): Receives committed and withdrawn blocks.
        num_streams (`int`): S.
    """

    def __init__(self, trace: DecodingTrace, streamer: ParallelStreamer, num_streams: int) -> None:
        self.trace, self.streamer, self.num_streams = trace, streamer, num_streams

    def plan(self, entries: list[list[PlanEntry]], headers: list[list[int]]) -> None:
        """The plan items of every prompt and the headers of every row, before the first token."""
        for prompt, items in enumerate(entries):
            items = [{"text": entry.text, "stream": entry.stream} for entry in items]
            first = prompt * self.num_streams
            self.trace.add("plan", prompt=prompt, items=items, headers=headers[first : first + self.num_streams])

    def judged(
        self,
        streams: StreamBatch,
        rows_M: torch.Tensor,
        agreement_M: torch.Tensor | None,
        withdrawn_M: torch.Tensor,
        coverage: list[dict[int, float]],
        threshold: float | None,
    ) -> None:
        """The decision about every block just completed; the streams still hold all of these blocks."""
        scores = [None] * len(rows_M) if agreement_M is None else agreement_M.tolist()
        state = (streams.block_start_R, streams.fed_R, streams.round_R, streams.attempt_R)
        places = torch.stack([rows_M, *(values[rows_M] for values in state)], dim=1).tolist()
        decisions = zip(places, scores, withdrawn_M.tolist(), coverage, strict=True)
        for (row, start, end, round_number, attempt), score, withdrawn, covered in decisions:
            event = {
                "prompt": row // self.num_streams,
                "stream": row % self.num_streams,
                "round": round_number,
                "attempt": attempt,
                "start": start,
                "end": end,
                "agreement": score,
                "coverage": covered,
                "call": self.trace.calls,
            }
            if withdrawn:
                tokens = streams.tokens_RL[row, start:end].tolist()
                self.trace.add("rollback", **event, tokens=tokens)
                self.streamer.rollback(event["prompt"], event["stream"], tokens)
            else:
                self.trace.add("commit", **event, forced=threshold is not None and score < threshold)

    def committed(self, streams: StreamBatch, rows_M: torch.Tensor) -> None:
        """The blocks that have just become final."""
        for row in rows_M.tolist():
            section = streams.sections[row]
            start, end = section.blocks[-1]
            self.streamer.put(*divmod(row, self.num_streams), section.tokens[start:end])

    def end(self) -> None:
        """No row is live."""
        self.streamer.end()
