"""What asks a chat model: its options, checked, with the one client that all threads of a process share."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .chat_client import ChatClient, ChatOptions, ChatRequest

Answer = TypeVar("Answer")

RANGES: dict[str, tuple[float, float]] = {
    # The session of huggingface_hub opens 100 connections.
    **{"max_concurrency": (1, 100), "attempts": (1, 100), "timeout_s": (0.001, 86_400), "backoff_s": (0, 60)},
    "max_answer_tokens": (1, 10_000_000),
}
"""Allowed values of [`ChatOptions`]."""

_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ChatCaller(ChatOptions):
    """[`ChatOptions`] that can be asked. May be sent to another process, which makes a client of its own."""

    def check(self, ranges: Mapping[str, tuple[float, float]], models: set[str]) -> None:
        """
        Checks the options; `store` may be text.

        Args:
            ranges (`Mapping[str, tuple[float, float]]`): Allowed values of further fields, or narrower ones.
            models (`set[str]`): Models that are asked.
        """
        object.__setattr__(self, "store", Path(self.store))
        for name, (low, high) in {**RANGES, **ranges}.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {low} to {high}.")
        unpriced = sorted(models - self.prices.keys())
        if self.budget_usd is not None and unpriced:
            raise ValueError(f"prices lacks {unpriced}, must hold every model where budget_usd is {self.budget_usd}.")

    def ask(self, request: ChatRequest, read: Callable[[str], Answer]) -> Answer:
        """The answer to a request, see [`ChatClient.ask`]."""
        return self.client().ask(request, read)

    def client(self) -> ChatClient:
        """The client, made at the first call."""
        with _LOCK:
            if "_client" not in self.__dict__:
                self.__dict__["_client"] = ChatClient(self, self._api_key())
        return self.__dict__["_client"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the client, which belongs to a process."""
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def _api_key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        if not os.environ.get(self.api_key_variable):
            raise ValueError(f"api_key_variable is {self.api_key_variable!r}, must name a set environment variable.")
        return os.environ[self.api_key_variable]
