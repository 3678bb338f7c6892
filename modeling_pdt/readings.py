"""What the rows of a call read: how much attention SNC gave to each note, to the plan and to the sink, and its gate.

Letters: R rows, A rows in the trunk's batch, M of them, S streams, X places of a stream in a window, V rounds, W notes
of a window, H heads, T tokens.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bus import NotesBus
from .callbacks import ParallelDecodingCallback
from .interventions import WindowRequest
from .note_states import NoteStates


@dataclass(frozen=True)
class Reading:
    """
    What the rows of the batch read in one trunk call, each at its last token; means over the sites of SNC and its
    heads.

    Args:
        rows (`list[int]`): The rows.
        prompt_A (`torch.LongTensor` of shape `[A]`): The prompt whose notes each of them reads.
        gate_A (`torch.Tensor` of shape `[A]`): The gate with its scale.
        sink_A, plan_A (`torch.Tensor` of shape `[A]`): Attention to the sink and to the plan.
        notes_ASX (`torch.Tensor` of shape `[A, S, X]`): Attention to the places of every stream; all of it adds up
            to 1.
        round_ASX (`torch.LongTensor` of shape `[A, S, X]`): The round in each place, -1 where the row sees none.
    """

    rows: list[int]
    prompt_A: torch.Tensor
    gate_A: torch.Tensor
    sink_A: torch.Tensor
    plan_A: torch.Tensor
    notes_ASX: torch.Tensor
    round_ASX: torch.Tensor


class ReadingMeter(nn.Module):
    """
    Makes a [`Reading`] of what the sites of SNC collect in [`NoteStates`]. A module, so that its attention can be
    stored and given back in a replay.

    Args:
        bus (`NotesBus`): What is read.
    """

    def __init__(self, bus: NotesBus) -> None:
        super().__init__()
        self.bus = bus

    def open(self, request: WindowRequest) -> None:
        """Takes note of what the windows hold that answer a request."""
        self.places = {row: place for place, row in enumerate(request.rows.tolist())}
        self.prompt_M = request.sources // self.bus.num_streams
        self.round_MSX = self.bus.window_rounds(request.sources, request.read_round, request.lag)

    def forward(self, weights: list[torch.Tensor], last_A: torch.Tensor) -> torch.Tensor:
        """Attention `[A, W + 1]` at the tokens `last_A` from that of every site, `[A, H, T, W + 1]`."""
        rows_A = torch.arange(len(last_A), device=last_A.device)
        return torch.stack([site[rows_A, :, last_A].mean(dim=1) for site in weights]).mean(dim=0).float()

    def read(self, rows: list[int], states: NoteStates, stream_ids: torch.Tensor) -> Reading:
        """
        What a pass of the upper half has collected.

        Args:
            rows (`list[int]`): Rows of the batch.
            states (`NoteStates`): What they read; what it has collected is forgotten.
            stream_ids (`torch.LongTensor` of shape `[A, T]`): Stream of each token; a header's tokens follow one
                without.
        """
        gates, weights = zip(*states.collected, strict=True)
        states.collected.clear()
        rows_A = torch.arange(len(rows), device=stream_ids.device)
        tokens = stream_ids.shape[1]
        last_A = (stream_ids >= 0).sum(dim=1).clamp(max=tokens - 1)
        gates = [gate.expand(len(rows), tokens, -1)[rows_A, last_A].mean(dim=1) for gate in gates]
        weights_AW = self(list(weights), last_A)
        plan, per_block = self.bus.plan_BPN.shape[1], self.bus.notes_BSVKN.shape[3]
        index = torch.tensor([self.places[row] for row in rows], device=stream_ids.device)
        shape = (*self.round_MSX.shape[1:], per_block)
        mask_AW = states.mask if states.mask.dim() == 2 else states.mask[rows_A, last_A]
        seen_ASX = mask_AW[:, plan:].unflatten(1, shape).any(dim=-1)
        return Reading(
            rows=list(rows),
            prompt_A=self.prompt_M[index],
            gate_A=torch.stack(gates).mean(dim=0).float(),
            sink_A=weights_AW[:, -1],
            plan_A=weights_AW[:, :plan].sum(dim=1),
            notes_ASX=weights_AW[:, plan:-1].unflatten(1, shape).sum(dim=-1),
            round_ASX=torch.where(seen_ASX, self.round_MSX[index], -1),
        )


class ReceivedAttention:
    """
    The score of every round on a bus: the attention it got, a mean over readers whose newest blocks count most.

    A block counts when it stands. For each round that it saw, its value is the mean share of attention over the tokens
    that saw it; blocks that are committed at the same time count as one, with the mean of their values. The first
    value is a round's score, and every further one moves it by a tenth of the difference.

    Args:
        bus (`NotesBus`): Keeps the scores.
        rows (`int`): R.
    """

    MOMENTUM = 0.9

    def __init__(self, bus: NotesBus, rows: int) -> None:
        self.bus = bus
        empty = bus.score_BSV.new_zeros(rows, bus.num_streams, 0)
        self.shares_RSV, self.tokens_RSV = empty, empty.clone()
        self.prompt_R = torch.arange(rows, device=empty.device) // bus.num_streams

    def add(self, reading: Reading, rows_M: torch.Tensor) -> None:
        """Counts what rows read for the token that they have just chosen."""
        missing = self.bus.score_BSV.shape[2] - self.shares_RSV.shape[2]
        if missing:
            self.shares_RSV, self.tokens_RSV = (
                torch.nn.functional.pad(values, (0, missing)) for values in (self.shares_RSV, self.tokens_RSV)
            )
        place = {row: index for index, row in enumerate(reading.rows)}
        index_M = torch.tensor([place[row] for row in rows_M.tolist()], device=rows_M.device)
        self.prompt_R[rows_M] = reading.prompt_A[index_M]
        round_MSX, notes_MSX = reading.round_ASX[index_M], reading.notes_ASX[index_M]
        own_place = round_MSX >= 0
        own_place[..., : self.bus.merged] = False
        index_MSX = round_MSX.clamp(min=0)
        for values, increment in ((self.shares_RSV, notes_MSX), (self.tokens_RSV, torch.ones_like(notes_MSX))):
            values[rows_M] = values[rows_M].scatter_add(2, index_MSX, increment * own_place)

    def commit(self, rows_M: torch.Tensor) -> None:
        """Lets the blocks of rows count."""
        seen_MSV, prompt_M = self.tokens_RSV[rows_M] > 0, self.prompt_R[rows_M]
        values_MSV = self.shares_RSV[rows_M] / self.tokens_RSV[rows_M].clamp(min=1)
        score, rounds = self.bus.score_BSV, seen_MSV.shape[2]
        zeros_BSV = torch.zeros_like(score[..., :rounds])
        readers_BSV = zeros_BSV.index_add(0, prompt_M, seen_MSV.to(zeros_BSV))
        value_BSV = zeros_BSV.index_add(0, prompt_M, values_MSV) / readers_BSV.clamp(min=1)
        before = score[..., :rounds]
        moved = torch.where(before > 0, self.MOMENTUM * before + (1 - self.MOMENTUM) * value_BSV, value_BSV)
        score[..., :rounds] = torch.where(readers_BSV > 0, moved, before)
        self.forget(rows_M)

    def forget(self, rows_M: torch.Tensor) -> None:
        """What the rows have read for the blocks that they are writing does not count."""
        self.shares_RSV[rows_M] = self.tokens_RSV[rows_M] = 0.0


class Readings:
    """
    Knows what the rows of a call read, where the bus or a callback wants to.

    Args:
        bus (`NotesBus`): What is read; its `retention_score` may be the attention that its notes get.
        rows (`int`): R.
        wanted (`bool`): Whether a callback wants to know.
    """

    def __init__(self, bus: NotesBus, rows: int, wanted: bool) -> None:
        self.received = ReceivedAttention(bus, rows) if bus.retention_score == "attention" else None
        self.meter = ReadingMeter(bus) if wanted or self.received else None
        self.last: Reading | None = None

    def open(self, request: WindowRequest) -> list | None:
        """Where the sites of SNC are to put what they read in the windows that answer a request."""
        if self.meter is None:
            return None
        self.meter.open(request)
        return []

    def read(self, rows: list[int], states: NoteStates, stream_ids: torch.Tensor) -> None:
        """Takes what a pass of the upper half has collected; see [`ReadingMeter.read`]."""
        if states.collected:
            self.last = self.meter.read(rows, states, stream_ids)

    def choose(self, rows_M: torch.Tensor) -> None:
        """Rows have chosen a token from what was read last."""
        if self.received and self.last:
            self.received.add(self.last, rows_M)

    def commit(self, rows_M: torch.Tensor) -> None:
        """Blocks of rows stand."""
        if self.received:
            self.received.commit(rows_M)

    def forget(self, rows_M: torch.Tensor) -> None:
        """Blocks of rows are withdrawn."""
        if self.received:
            self.received.forget(rows_M)


class ReadingRecorder(ParallelDecodingCallback):
    """
    Adds a record of every block, withdrawn ones included, to `trace.readings`: who read which note.

    A record holds `prompt`, `stream`, `round` and `attempt` of the reader; `gate`, the mean of the SNC gate with its
    scale; and shares of attention that add up to 1: `sink`, `plan` and, in `notes`, one `{prompt, stream, round,
    weight}` per round of a writer that the reader saw. All are means over the block's tokens, the sites of SNC and
    its heads. With a `retention` that merges rounds, `round` is the newest of them. A block that ran without SNC
    (`logit_blend=0`, a disabled adapter) leaves no record. It costs a transfer per trunk call.

    Example:

    ```python
    >>> output = model.generate(**inputs, callbacks=[ReadingRecorder()], return_dict_in_generate=True)
    >>> output.trace.readings[-1]["notes"]
    ```
    """

    wants_readings = True

    def on_plan(self, decoder: Any) -> None:
        """Begins anew."""
        self.sums: dict[int, dict[str, Any]] = {}

    def on_round_begin(self, decoder: Any, rows_M: torch.Tensor) -> None:
        """Begins the records of blocks."""
        for row in rows_M.tolist():
            self.sums[row] = {"tokens": 0, "gate": 0.0, "sink": 0.0, "plan": 0.0, "notes": defaultdict(float)}

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Adds what the rows read in this trunk call."""
        reading = decoder.readings.last
        if reading is None:
            return
        ends = torch.stack([reading.gate_A, reading.sink_A, reading.plan_A], dim=1).tolist()
        parts = (reading.prompt_A, reading.round_ASX, reading.notes_ASX)
        prompts, rounds, shares = (part.tolist() for part in parts)
        for row in rows_M.tolist():
            sums, index = self.sums[row], reading.rows.index(row)
            sums["tokens"] += 1
            for name, value in zip(("gate", "sink", "plan"), ends[index], strict=True):
                sums[name] += value
            for stream, places in enumerate(zip(rounds[index], shares[index], strict=True)):
                for round_number, weight in zip(*places, strict=True):
                    if round_number >= 0:
                        sums["notes"][prompts[index], stream, round_number] += weight

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Records the block."""
        self._record(decoder, event)

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Records the block."""
        self._record(decoder, event)

    def _record(self, decoder: Any, event: dict[str, Any]) -> None:
        sums = self.sums[event["prompt"] * decoder.settings.num_streams + event["stream"]]
        tokens = sums["tokens"]
        if tokens:
            place = {name: event[name] for name in ("prompt", "stream", "round", "attempt")}
            notes = [
                {"prompt": prompt, "stream": stream, "round": round_number, "weight": weight / tokens}
                for (prompt, stream, round_number), weight in sorted(sums["notes"].items())
            ]
            shares = {name: sums[name] / tokens for name in ("gate", "sink", "plan")}
            decoder.trace.readings.append({**place, **shares, "notes": notes})
