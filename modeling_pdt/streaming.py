"""Streaming of committed blocks."""

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .callbacks import ParallelDecodingCallback


class ParallelStreamer:
    """
    Receives committed tokens of every stream; subclass it and override what is of interest.

    `wants_drafts`: whether `draft` is to be called, which costs a transfer per trunk call.
    """

    wants_drafts = False

    def draft(self, prompt: int, stream: int, token_id: int) -> None:
        """Called with every token as it is chosen; `put` or `rollback` decides later about its block."""

    def put(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """
        Called when a block of a stream is committed.

        Args:
            prompt (`int`), stream (`int`): Whose block.
            token_ids (`list[int]`): The block's tokens, EOS included.
        """

    def rollback(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Called when a block of a stream is withdrawn; its tokens were never put."""

    def stall(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Called when a block of a stream begins to wait, or goes on waiting; `put` follows with the same tokens."""

    def end(self) -> None:
        """Called once, after the last commit."""


class SingleRowStreamer(ParallelStreamer):
    """
    Hands the only row's tokens to a streamer of transformers, its prompt first, as `generate` does.

    Args:
        streamer (`BaseStreamer`): To call.
        start (`list[int]`): Prompt and header.
    """

    def __init__(self, streamer: BaseStreamer, start: list[int]) -> None:
        self.streamer = streamer
        self.streamer.put(torch.tensor([start]))

    def put(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Passes the tokens on one by one."""
        for token in token_ids:
            self.streamer.put(torch.tensor([token]))

    def end(self) -> None:
        """Ends the wrapped streamer."""
        self.streamer.end()


def parallel_streamer(streamer: object | None, rows: int, start: list[int]) -> ParallelStreamer:
    """
    The streamer to call: none given is a silent one, a plain one serves a single row.

    Args:
        streamer (*optional*): As the caller gave it.
        rows (`int`): Rows of the call.
        start (`list[int]`): Prompt and header of the first row.

    Raises:
        ValueError: For a plain streamer with more than one row, or an object that is no streamer.
    """
    if streamer is None:
        return ParallelStreamer()
    if isinstance(streamer, BaseStreamer):
        if rows != 1:
            raise ValueError(
                f"streamer: {type(streamer).__name__} serves one row, this call has {rows}; use a ParallelStreamer."
            )
        return SingleRowStreamer(streamer, start)
    methods = ("put", "rollback", "end")
    if not all(callable(getattr(streamer, name, None)) for name in methods):
        raise ValueError(f"streamer must be a ParallelStreamer or have its methods {methods}, got {streamer!r}.")
    return streamer


class StreamerCallback(ParallelDecodingCallback):
    """
    Hands committed and withdrawn blocks to a streamer.

    Args:
        streamer (`ParallelStreamer`): To call.
    """

    def __init__(self, streamer: ParallelStreamer) -> None:
        self.streamer = streamer

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """Shows the tokens as they are chosen to a streamer that wants to see them."""
        if getattr(self.streamer, "wants_drafts", False):
            for row, token in zip(rows_M.tolist(), tokens_M.tolist(), strict=True):
                self.streamer.draft(*divmod(row, decoder.settings.num_streams), token)

    def on_commit(self, decoder: Any, event: dict[str, Any]) -> None:
        """Puts the block's tokens."""
        self.streamer.put(event["prompt"], event["stream"], event["tokens"])

    def on_rollback(self, decoder: Any, event: dict[str, Any]) -> None:
        """Passes the withdrawn tokens on."""
        self.streamer.rollback(event["prompt"], event["stream"], event["tokens"])

    def on_stall(self, decoder: Any, event: dict[str, Any]) -> None:
        """Tells a streamer that wants to know which block waits."""
        if hasattr(self.streamer, "stall"):
            self.streamer.stall(event["prompt"], event["stream"], event["tokens"])

    def on_end(self, decoder: Any) -> None:
        """Ends the streamer."""
        self.streamer.end()
