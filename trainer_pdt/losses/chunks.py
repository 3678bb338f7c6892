"""Next-token logits that never exist all at once: made some positions at a time, and made again for the gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ChunkedLogits:
    """
    Stands in for logits `[supervised, vocabulary]` in every loss on next-token predictions.

    Args:
        hidden_MD (`Tensor` of shape `[supervised, width]`): What the head reads.
        head (`nn.Module`): The frozen language-model head.
        rows (`int`): Positions whose logits exist at the same time, at least 1.
    """

    hidden_MD: Tensor
    head: nn.Module
    rows: int

    def detach(self) -> "ChunkedLogits":
        """The same logits without gradient."""
        return ChunkedLogits(self.hidden_MD.detach(), self.head, self.rows)

    def logits(self, hidden_mD: Tensor) -> Tensor:
        """
        The head's own `forward`: ZeRO-3 wants a module called equally often in all processes, which have different
        numbers of tokens, and counts by the hooks of calls. The head is whole there, see `keep_gathered`.
        """
        return self.head.forward(hidden_mD)

    def chunks(self) -> Iterator[Tensor]:
        """The logits in parts; with gradient each stays in memory as long as its graph."""
        return (self.logits(part) for part in self.hidden_MD.split(self.rows))

    def whole(self) -> Tensor:
        """All of them, for what needs them together."""
        return self.logits(self.hidden_MD)


def by_chunk(loss: Callable[..., Tensor], logits_MV: Tensor | ChunkedLogits, *others: Any, **settings: Any) -> Tensor:
    """
    A loss per supervised token, computed in chunks where the logits are.

    Args:
        loss (`Callable`): `loss(logits, *others, **settings)`, of shape `[supervised]`; a token's is its own affair.
        logits_MV (`Tensor` or [`ChunkedLogits`]): Predictions.
        others (`Any`): One entry per supervised token each, sliced along with the logits.
        settings (`Any`): The same for all tokens.
    """
    if isinstance(logits_MV, Tensor):
        return loss(logits_MV, *others, **settings)
    hidden_MD, rows = logits_MV.hidden_MD, logits_MV.rows

    def piece_loss(hidden_mD: Tensor, start: int) -> Tensor:
        place = slice(start, start + rows)
        return loss(logits_MV.logits(hidden_mD), *(other[place] for other in others), **settings)

    starts = range(0, max(1, len(hidden_MD)), rows)
    again = partial(checkpoint, piece_loss, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(hidden_MD[start : start + rows], start) for start in starts])
