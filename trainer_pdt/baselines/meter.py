"""What a way of decoding asks of the trunk: calls, tokens computed, and the time of reading what was given."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel


class CallMeter:
    """
    Counts the calls of a trunk while it is entered, those of parallel decoding's own loop too.

    Args:
        trunk (`PreTrainedModel`): What is counted; left as it was on exit.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        self.trunk = trunk
        self.calls = self.tokens = self.readings = 0
        self.reading_s = 0.0
        self._since: float | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "CallMeter":
        embedding, stack = self.trunk.get_input_embeddings(), self.trunk.base_model
        self._hooks = [embedding.register_forward_hook(self._embedded), stack.register_forward_hook(self._called)]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _embedded(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.calls += 1
        self.tokens += inputs[0].numel()

    def _called(self, *unused: Any) -> None:
        if self._since is not None:
            self.readings += 1
            self.reading_s += time.perf_counter() - self._since
            self._since = None

    def reading(self) -> None:
        """The next call of the trunk reads given tokens: prompt, headers, other sections' text."""
        self._since = time.perf_counter()

    @property
    def steps(self) -> int:
        """Calls that wrote: one after the other, the critical path."""
        return self.calls - self.readings
