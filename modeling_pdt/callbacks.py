"""Callbacks of a decoding call, in the manner of `TrainerCallback`, and those that record every token.

Letters: M rows that something happens to at once, K notes per block, N note width, V vocabulary.
"""

import json
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

EVENTS = ("on_plan", "on_round_begin", "on_token", "on_note", "on_commit", "on_rollback", "on_stall", "on_end")


class ParallelDecodingCallback:
    """
    Called by `generate(callbacks=[...])` as it goes; subclass it and override what is of interest.

    Every method gets the running decoder, to be read and not changed: `decoder.settings`, `decoder.inputs`,
    `decoder.streams`, `decoder.bus` and `decoder.trace`. Rows are numbered `prompt * num_streams + stream`.
    `wants_readings`: whether `on_token` finds a [`~readings.Reading`] of its trunk call in
    `decoder.readings.last`.
    """

    wants_readings = False

    def on_plan(self, decoder: Any) -> None:
        """Called once, before the prefill: prompts, plan and settings are known."""

    def on_round_begin(self, decoder: Any, rows_M: torch.Tensor) -> None:
        """Called when rows `[M]` begin to write a block, or to write a withdrawn one again."""

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Called after every trunk call: the tokens `[M]` chosen for rows `[M]`, from scores after all processors."""

    def on_note(self, decoder: Any, rows_M: torch.Tensor, rounds_M: torch.Tensor, notes_MKN: torch.Tensor) -> None:
        """Called when rows `[M]` have written the notes `[M, K, N]` of rounds `[M]`, before they are judged."""

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Called when a block stands; `event` is what the trace holds about it."""

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Called when a block is withdrawn; `event` is what the trace holds about it."""

    def on_stall(self, decoder: Any, event: dict[str, Any]) -> None:
        """Called when a block begins to wait, or goes on waiting; `event` is what the trace holds about it."""

    def on_end(self, decoder: Any) -> None:
        """Called once, after the last commit; not when the call is interrupted."""


class CallbackList:
    """
    Passes every event on to all callbacks, in order.

    Args:
        callbacks (`list`, *optional*): [`ParallelDecodingCallback`] objects.

    Raises:
        ValueError: For an object that is no callback.
    """

    def __init__(self, callbacks: list[ParallelDecodingCallback] | None = None) -> None:
        self.callbacks = list(callbacks or ())
        for callback in self.callbacks:
            if isinstance(callback, type) or not all(callable(getattr(callback, name, None)) for name in EVENTS):
                raise ValueError(f"callbacks must hold ParallelDecodingCallback objects, got {callback!r}.")

    @property
    def want_readings(self) -> bool:
        """Whether one of them wants to know what every trunk call reads."""
        return any(getattr(callback, "wants_readings", False) for callback in self.callbacks)

    def fire(self, event: str, *values: Any) -> None:
        """Calls one method of all callbacks with the decoder and what has happened."""
        for callback in self.callbacks:
            getattr(callback, event)(*values)


def top2_margin(scores_MV: torch.Tensor) -> list[float | None]:
    """Difference of the two largest scores of every row; `None` where one token is all that is left."""
    if scores_MV.shape[-1] < 2:
        return [None] * scores_MV.shape[0]
    best = scores_MV.float().topk(2, dim=-1).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    return [None if margin == float("inf") else margin for margin in margins]


class TokenRecorder(ParallelDecodingCallback):
    """
    Adds a record of every token chosen, withdrawn ones included, to `trace.tokens`.

    A record holds `call` (trunk call, 0 for the prefill), `prompt`, `stream`, `round`, `attempt`, `index` (place in
    the section), `token_id`, `margin` (difference of the two largest scores after all processors) and `time_s`
    (seconds since the start of the call). Reading them costs a transfer per trunk call.
    """

    def on_plan(self, decoder: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Makes the records of one trunk call."""
        streams = decoder.streams
        state = (streams.round_R, streams.attempt_R, streams.fed_R)
        places = torch.stack([rows_M, *(values[rows_M] for values in state), tokens_M], dim=1).tolist()
        elapsed = time.perf_counter() - self.started
        for place, margin in zip(places, top2_margin(scores_MV), strict=True):
            row, round_number, attempt, index, token = place
            prompt, stream = divmod(row, decoder.settings.num_streams)
            record = {"call": decoder.trace.calls, "prompt": prompt, "stream": stream, "round": round_number}
            record |= {"attempt": attempt, "index": index, "token_id": token, "margin": margin, "time_s": elapsed}
            self.record(decoder, record)

    def record(self, decoder: Any, record: dict[str, Any]) -> None:
        """Keeps one record."""
        decoder.trace.tokens.append(record)


class JsonLinesWriter(TokenRecorder):
    """
    Writes a line of JSON per plan, token, note, commit, rollback, stall and end as they happen; `event` names it.

    Args:
        file (`TextIO`): Open text file; flushed after every line, so that others can follow it.
        decode (`Callable[[list[int]], str]`, *optional*): Adds the text of token ids, for instance `tokenizer.decode`.
    """

    def __init__(self, file: TextIO, decode: Callable[[list[int]], str] | None = None) -> None:
        self.file, self.decode = file, decode

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Writes one line."""
        tokens = values.get("tokens", [values["token_id"]] if "token_id" in values else None)
        if self.decode is not None and tokens is not None:
            values = {**values, "text": self.decode(tokens)}
        self.file.write(json.dumps({"event": event, **values}, ensure_ascii=False, allow_nan=False) + "\n")
        self.file.flush()

    def on_plan(self, decoder: Any) -> None:
        """Writes the plan of every prompt."""
        super().on_plan(decoder)
        for event in decoder.trace.of_kind("plan"):
            self.write("plan", _without_kind(event))

    def record(self, decoder: Any, record: dict[str, Any]) -> None:
        """Writes a token."""
        self.write("token", record)

    def on_note(self, decoder: Any, rows_M: torch.Tensor, rounds_M: torch.Tensor, notes_MKN: torch.Tensor) -> None:
        """Writes who has written notes for which round, and the root mean square of each note."""
        sizes = notes_MKN.float().square().mean(dim=-1).sqrt().tolist()
        for row, round_number, rms in zip(rows_M.tolist(), rounds_M.tolist(), sizes, strict=True):
            prompt, stream = divmod(row, decoder.settings.num_streams)
            values = {"call": decoder.trace.calls, "prompt": prompt, "stream": stream, "round": round_number}
            self.write("note", {**values, "rms": rms})

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Writes a commit."""
        self.write("commit", _without_kind(event))

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Writes a rollback."""
        self.write("rollback", _without_kind(event))

    def on_stall(self, decoder: Any, event: dict[str, Any]) -> None:
        """Writes that a block waits."""
        self.write("stall", _without_kind(event))

    def on_end(self, decoder: Any) -> None:
        """Writes the totals."""
        self.write("end", {"calls": decoder.trace.calls, "timings": decoder.trace.timings})


def _without_kind(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "kind"}


class MemoryRecorder(ParallelDecodingCallback):
    """
    Writes into `trace.memory` the most bytes that the call held at a block boundary.

    `cache_bytes`: keys and values, spare places of their buffers included; `tap_bytes`: states kept of all sections;
    `notes_bytes`: the bus with snapshot 0; `peak_device_bytes`: the most that PyTorch held on a CUDA device since the
    call began, weights included, `None` elsewhere.
    """

    def on_plan(self, decoder: Any) -> None:
        """Starts from nothing."""
        decoder.trace.memory = {"cache_bytes": 0, "tap_bytes": 0, "notes_bytes": 0, "peak_device_bytes": None}
        if decoder.streams.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(decoder.streams.device)

    def on_note(self, decoder: Any, rows_M: torch.Tensor, rounds_M: torch.Tensor, notes_MKN: torch.Tensor) -> None:
        """Measures."""
        streams, bus, memory = decoder.streams, decoder.bus, decoder.trace.memory
        held = {
            "cache_bytes": [part for layer in streams.cache.layers for part in (layer._keys, layer._values)],
            "tap_bytes": streams.kept_states,
            "notes_bytes": [bus.notes_BSVKN, bus.plan_BPN],
        }
        for name, tensors in held.items():
            memory[name] = max(memory[name], sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        if streams.device.type == "cuda":
            memory["peak_device_bytes"] = torch.cuda.max_memory_allocated(streams.device)
