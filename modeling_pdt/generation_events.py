"""What a decoding call tells the outside: events of the trace and calls of the callbacks, in order.

Letters: M rows at a block boundary.
"""

import time
from typing import Any

import torch

from .callbacks import CallbackList
from .safeguards import SensitivityMeter
from .streams import StreamBatch
from .trace import plan_items


class DecodingEvents:
    """
    Writes the trace and calls the callbacks.

    Args:
        decoder (`ParallelDecoder`): The running call; its trace receives every event.
        callbacks (`CallbackList`): Receive the same events, and tokens and notes besides.
    """

    def __init__(self, decoder: Any, callbacks: CallbackList) -> None:
        self.decoder, self.callbacks = decoder, callbacks
        self.trace, self.num_streams = decoder.trace, decoder.settings.num_streams
        self.started = time.perf_counter()
        self.standing: list[dict[str, Any]] = []

    def elapsed(self) -> float:
        """Seconds since the start of the call."""
        return time.perf_counter() - self.started

    def tell(self, event: str, *values: Any) -> None:
        """Calls one method of every callback."""
        self.callbacks.fire(event, self.decoder, *values)

    def plan(self) -> None:
        """The plan items of every prompt and the headers of every row, before the first token."""
        inputs = self.decoder.inputs
        for prompt, entries in enumerate(inputs.entries):
            headers = inputs.headers[prompt * self.num_streams : (prompt + 1) * self.num_streams]
            items = plan_items(entries, self.decoder.model.config)
            self.trace.add("plan", prompt=prompt, items=items, headers=headers)
        self.tell("on_plan")

    def judged(
        self,
        streams: StreamBatch,
        rows_M: torch.Tensor,
        agreement_M: torch.Tensor | None,
        withdrawn: list[bool],
        coverage: list[dict[int, float]],
        threshold: float | None,
        details: list[dict[str, Any]],
    ) -> None:
        """
        The decision about every block just completed, with further fields per block; the streams still hold all of
        these blocks.
        """
        self.standing = []
        scores = [None] * len(rows_M) if agreement_M is None else agreement_M.tolist()
        state = (streams.block_start_R, streams.fed_R, streams.round_R, streams.attempt_R)
        places = torch.stack([rows_M, *(values[rows_M] for values in state)], dim=1).tolist()
        written = streams.tokens_RL[rows_M].tolist()
        decisions = zip(places, written, scores, withdrawn, coverage, details, strict=True)
        for (row, start, end, round_number, attempt), tokens, score, gone, covered, more in decisions:
            event = {
                "prompt": row // self.num_streams,
                "stream": row % self.num_streams,
                "round": round_number,
                "attempt": attempt,
                "start": start,
                "end": end,
                "agreement": score,
                "coverage": covered,
                "tokens": tokens[start:end],
                "call": self.trace.calls,
                "time_s": self.elapsed(),
                **more,
            }
            if gone:
                kind = "stall" if self.decoder.settings.commit_policy == "stall" else "rollback"
                self.tell(f"on_{kind}", self.trace.add(kind, **event))
            else:
                event["forced"] = threshold is not None and score < threshold
                self.standing.append(self.trace.add("commit", **event))

    def committed(self) -> None:
        """The blocks judged last that stand are final now."""
        for event in self.standing:
            self.tell("on_commit", event)

    def sensitivity(
        self,
        streams: StreamBatch,
        reads_A: torch.Tensor,
        meter: SensitivityMeter,
        logits_AV: torch.Tensor,
        disturbed_AV: torch.Tensor,
    ) -> None:
        """What disturbed notes did to the logits of the rows that read any."""
        measured = zip(
            streams.batch_rows, reads_A.tolist(), meter.ratios(logits_AV, disturbed_AV).tolist(), strict=True
        )
        rows = [
            {"prompt": row // self.num_streams, "stream": row % self.num_streams, "ratio": ratio}
            for row, read, ratio in measured
            if read
        ]
        if rows:
            largest = max(row["ratio"] for row in rows)
            excessive = largest > meter.probe.max_ratio
            self.trace.add("sensitivity", call=self.trace.calls, rows=rows, largest=largest, excessive=excessive)
