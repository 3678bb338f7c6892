"""Keys and values of the first columns of rows, which many passes read and which siblings may share."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def repeat_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """`values` `[G, ...]` with each row repeated, as `[rows, ...]`."""
    return values if len(values) == rows else values.repeat_interleave(rows // len(values), dim=0)


def begin_alike(values_RT: torch.Tensor, siblings: int, columns: int) -> bool:
    """Whether `siblings` adjacent rows each are known to be equal in their first columns; meta tensors are not."""
    first = values_RT[:, :columns]
    return not first.is_meta and torch.equal(first, repeat_rows(first[::siblings], len(first)))


class PrefixLayer(DynamicLayer):
    """
    One layer's keys and values of a prefix: the first update writes them, later ones read them and keep nothing. Each
    row of the prefix serves equally many adjacent rows.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens with these states `[R, H, T, head_dim]` attend to."""
        if not self.is_initialized:
            return super().update(key_states, value_states)
        keys, values = (repeat_rows(part, len(key_states)) for part in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PrefixCache(Cache):
    """
    Keys and values of a prefix. A layer that is recomputed for gradient checkpointing reads them a second time.

    Args:
        num_layers (`int`): Layers of the trunk.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[PrefixLayer() for _ in range(num_layers)])
