"""Next-token logits in parts: several gradients of their size, or even they themselves, never exist all at once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Read = Callable[[Tensor, slice], Tensor]
"""`read(logits_mV, place)`: values `[m]` of the supervised tokens at `place`, whose logits are given."""


@dataclass(frozen=True)
class ChunkedLogits:
    """
    Logits `[supervised, vocabulary]` of a pass that learns.

    Args:
        hidden_MD (`Tensor` of shape `[supervised, width]`): What the head reads.
        head (`nn.Module`): The frozen language-model head.
        rows (`int`): Tokens of one part, at least 1.
        remade (`bool`): A part is made for each use and again for its gradient; else it is made once and kept.
    """

    hidden_MD: Tensor
    head: nn.Module
    rows: int
    remade: bool

    def make(self, hidden_mD: Tensor) -> Tensor:
        """
        The head's own `forward`: ZeRO-3 wants a module called equally often in all processes, which have different
        numbers of tokens, and counts by the hooks of calls. The head is whole there, see `keep_gathered`.
        """
        return self.head.forward(hidden_mD)

    @cached_property
    def kept(self) -> list[Tensor]:
        """The parts, with their graph, whoever asks for them first."""
        with torch.enable_grad():
            return [self.make(hidden_mD) for hidden_mD in self.hidden_MD.split(self.rows)]

    def parts(self) -> Iterator[Tensor]:
        """The parts without gradient."""
        if self.remade:
            return (self.make(hidden_mD) for hidden_mD in self.hidden_MD.detach().split(self.rows))
        return (part_mV.detach() for part_mV in self.kept)

    def whole(self) -> Tensor:
        """All of them without gradient, for what needs them together."""
        return torch.cat(list(self.parts()))

    def read(self, reads: Mapping[str, Read]) -> dict[str, Tensor]:
        """
        Values of every supervised token, `[supervised]` by name. All reads of a part follow each other, so that in the
        backward pass, too, their gradients of the vocabulary's size exist for one part at a time.
        """
        sources = self.hidden_MD.split(self.rows) if self.remade else self.kept

        def read_part(source: Tensor, start: int) -> tuple[Tensor, ...]:
            logits_mV = self.make(source) if self.remade else source
            place = slice(start, start + len(source))
            return tuple(read(logits_mV, place) for read in reads.values())

        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        run = partial(checkpoint, read_part, **again) if self.remade else read_part
        found = [run(source, number * self.rows) for number, source in enumerate(sources)]
        return {name: torch.cat(values) for name, values in zip(reads, zip(*found, strict=True), strict=True)}
