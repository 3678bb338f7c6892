"""The board: what a decoding call has written so far, as plain values that a page can show.

`BoardRecorder` is a callback of `generate`; it runs in the thread that decodes, `snapshot` in the one that shows.
"""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_pdt import ParallelDecodingCallback


class Stopped(Exception):
    """The reader of the board has gone."""


@dataclass
class Block:
    """
    A block that was judged.

    Args:
        text (`str`): What it says.
        round (`int`), attempt (`int`): Its number in the stream, and how often it had been withdrawn before.
        agreement (`float`, *optional*): What it was judged by; `None` without a trained head.
        stands (`bool`): Committed; otherwise withdrawn, or `waiting`.
        forced (`bool`): It stands because no retry was left.
        reading (`dict`, *optional*): What it read; a record of `trace.readings`.
        at (`float`): Seconds of `time.monotonic` when it was judged.
        waits (`int`): How often it has begun to wait for notes.
        waiting (`bool`): It keeps its text and is judged again when there are more notes.
    """

    text: str
    round: int
    attempt: int
    agreement: float | None
    stands: bool
    forced: bool
    reading: dict[str, Any] | None
    at: float
    waits: int = 0
    waiting: bool = False


@dataclass
class Column:
    """
    A stream: title, plan items `[text, coverage]`, blocks as they were judged, the text that nobody has judged yet.

    `live`: it is still being written; `finished`: it ended by itself, not by the length limit.
    """

    title: str
    items: list[tuple[str, float | None]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    draft: str = ""
    live: bool = True
    finished: bool = False

    @property
    def standing(self) -> list[Block]:
        """Blocks that were committed."""
        return [block for block in self.blocks if block.stands]

    @property
    def withdrawn(self) -> int:
        """How many blocks were withdrawn."""
        return sum(not block.stands and not block.waiting for block in self.blocks)

    @property
    def waited(self) -> int:
        """How many blocks waited, or wait."""
        return sum(block.waits > 0 for block in self.blocks)

    @property
    def waiting(self) -> bool:
        """The stream stands still."""
        return bool(self.blocks) and self.blocks[-1].waiting

    @property
    def text(self) -> str:
        """The committed text."""
        return "".join(block.text for block in self.standing)


@dataclass
class Board:
    """
    One answer: its columns, trunk calls and tokens so far.

    Args:
        label (`str`): What the run is called on the page.
        columns (`list[Column]`): One per stream; empty before the plan is known.
        calls (`int`), tokens (`int`): Trunk calls after the prefill, and committed tokens of all streams.
        done (`bool`): The last block is committed.
        coverage_threshold (`float`): From where on an item counts as covered.
    """

    label: str
    columns: list[Column] = field(default_factory=list)
    calls: int = 0
    tokens: int = 0
    done: bool = False
    coverage_threshold: float = 0.5


class BoardRecorder(ParallelDecodingCallback):
    """
    Callback that keeps a [`Board`] of the first prompt.

    Stands behind a `ReadingRecorder` among the callbacks, whose records it takes over.

    Args:
        decode (`Callable[[list[int]], str]`): Text of token ids.
        label (`str`): Of the board.
        calls_per_second (`float`, *optional*): Waits after trunk calls so that nobody misses anything; `None`: never.
    """

    def __init__(self, decode: Callable[[list[int]], str], label: str, calls_per_second: float | None = None) -> None:
        self.decode, self.pause = decode, 1 / calls_per_second if calls_per_second else 0.0
        self.board = Board(label)
        self.tokens: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.lock, self.changed, self.stopped = threading.Lock(), threading.Event(), threading.Event()

    def snapshot(self) -> Board:
        """The board as it stands, to be kept."""
        self.changed.clear()
        with self.lock:
            return copy.deepcopy(self.board)

    def on_plan(self, decoder: Any) -> None:
        """Lays out the columns."""
        plan, streams = decoder.trace.of_kind("plan")[0], decoder.settings.num_streams
        titles = [self.decode(tokens).strip().lstrip("#").strip() for tokens in plan["headers"]]
        columns = [Column(title or f"Stream {stream + 1}") for stream, title in enumerate(titles)]
        for item in plan["items"]:
            for stream in range(streams) if item["stream"] is None else (item["stream"],):
                columns[stream].items.append((item["text"], None))
        self.owners = [item["stream"] for item in plan["items"]]
        self.tokens, self.drafts = [[] for _ in columns], [[] for _ in columns]
        with self.lock:
            self.board.columns = columns
            self.board.coverage_threshold = decoder.settings.coverage_threshold
        self.changed.set()

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Shows the tokens that nobody has judged yet; ends the call when nobody looks any more."""
        if self.stopped.is_set():
            raise Stopped
        with self.lock:
            for stream, token in zip(rows_M.tolist(), tokens_M.tolist(), strict=True):
                self.drafts[stream].append(token)
                self.board.columns[stream].draft = self._after(stream, self.drafts[stream])
            self.board.calls = decoder.trace.calls
        self.changed.set()
        if self.pause:
            time.sleep(self.pause)

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Moves the draft into the section."""
        stream = event["stream"]
        with self.lock:
            self._judge(decoder, event, stands=True)
            self.tokens[stream] += event["tokens"]
            column, section = self.board.columns[stream], decoder.streams.sections[stream]
            column.live, column.finished = stream in decoder.streams.live_rows, section.finished
            owned = [number for number, owner in enumerate(self.owners) if owner in (None, stream)]
            column.items = [
                (text, event["coverage"].get(number)) for number, (text, _) in zip(owned, column.items, strict=True)
            ]
            self.board.calls = decoder.trace.calls
            self.board.tokens += len(event["tokens"])
        self.changed.set()

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Takes the draft back."""
        with self.lock:
            self._judge(decoder, event, stands=False)
        self.changed.set()

    def on_stall(self, decoder: Any, event: dict[str, Any]) -> None:
        """Leaves the draft where it is, as a block that waits."""
        with self.lock:
            self._judge(decoder, event, stands=False, waiting=True)
        self.changed.set()

    def on_end(self, decoder: Any) -> None:
        """The answer is complete."""
        with self.lock:
            self.board.done = True
        self.changed.set()

    def _judge(self, decoder: Any, event: dict[str, Any], stands: bool, waiting: bool = False) -> None:
        stream, place = event["stream"], ("stream", "round", "attempt")
        reading = next(
            (one for one in reversed(decoder.trace.readings) if all(one[name] == event[name] for name in place)), None
        )
        text, self.drafts[stream] = self._after(stream, event["tokens"]), []
        column = self.board.columns[stream]
        column.draft = ""
        # A block that has waited is judged again: it is still the same one.
        before = column.blocks.pop().waits if column.waiting else 0
        column.blocks.append(
            Block(
                text=text,
                round=event["round"],
                attempt=event["attempt"] - before,
                agreement=event["agreement"],
                stands=stands,
                forced=event.get("forced", False),
                reading=reading,
                at=time.monotonic(),
                waits=before + waiting,
                waiting=waiting,
            )
        )

    def _after(self, stream: int, tokens: list[int]) -> str:
        """Text of tokens behind the committed ones; some tokenizers write a token by what stands before it."""
        before = self.tokens[stream]
        return self.decode(before + tokens)[len(self.decode(before)) :]
