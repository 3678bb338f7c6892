"""Key-value cache whose rows can be rolled back one by one, sliding-window layers included.

Masks live in slot space and rotary positions in position space. So a row goes back by n tokens when its keys and
values move n slots to the right and the n slots that become free on the left are masked: other rows stay as they are,
and all rows keep one common end. A sliding layer keeps `margin` tokens more than its window for that.

Letters: R rows, H key-value heads, T tokens.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .trunk_split import layer_types

# Slots added whenever a buffer is full: one copy of the layer every so many tokens.
GROWTH = 64


class RollbackLayer(DynamicLayer):
    """
    One layer's keys and values in a growing buffer.

    Args:
        window (`int`, *optional*): Sliding window of the layer; `None` keeps everything.
        margin (`int`, *optional*, defaults to 0): Tokens kept beyond the window: the deepest rollback.
    """

    def __init__(self, window: int | None = None, margin: int = 0) -> None:
        super().__init__()
        self.window, self.margin = window, margin
        self.is_sliding = window is not None
        self.cumulative_length = 0
        self.start = self.end = self.last_slide = 0
        self.unusable_R: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes dtype, device and shapes from the first states `[R, H, T, head_dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self._values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.unusable_R = torch.zeros(key_states.shape[0], dtype=torch.long, device="cpu")
        self.is_initialized = True

    def _reserve(self, tokens: int) -> None:
        if self.end + tokens <= self._keys.shape[2]:
            return
        stored = self.end - self.start
        self._keys = self._relocated(self._keys, stored + tokens + GROWTH)
        self._values = self._relocated(self._values, stored + tokens + GROWTH)
        self.start, self.end = 0, stored

    def _relocated(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        larger = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[-1])
        larger[:, :, : self.end - self.start] = buffer[:, :, self.start : self.end]
        return larger

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends T tokens and returns everything that the attention of these tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        self._reserve(tokens)
        self._keys[:, :, self.end : self.end + tokens] = key_states
        self._values[:, :, self.end : self.end + tokens] = value_states
        self.end += tokens
        self.cumulative_length += tokens
        self.keys = self._keys[:, :, self.start : self.end]
        self.values = self._values[:, :, self.start : self.end]
        if self.window is not None:
            start = max(self.start, self.end - (self.window - 1 + self.margin))
            self.start, self.last_slide = start, start - self.start
        return self.keys, self.values

    def undo_update(self, tokens: int) -> None:
        """Forgets the last update, of so many tokens: the layer is as it was, and nothing is copied."""
        self.start, self.last_slide = self.start - self.last_slide, 0
        self.end -= tokens
        self.cumulative_length -= tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first slot of the keys that the next `query_length` tokens will see."""
        stored = self.end - self.start
        return stored + query_length, self.cumulative_length - stored

    def get_seq_length(self) -> int:
        """Slots written so far."""
        return self.cumulative_length

    def rollback(self, counts_R: torch.Tensor) -> None:
        """
        Takes back the newest `counts_R[r]` tokens of every row r.

        Args:
            counts_R (`torch.LongTensor` of shape `[R]`, on the CPU): Tokens to take back, 0 for none.

        Raises:
            RuntimeError: When a sliding layer no longer holds the tokens that the row needs (margin too small).
        """
        if not self.is_initialized:
            return
        stored = self.end - self.start
        dropped = self.cumulative_length - stored
        rows = counts_R.nonzero().squeeze(1)
        if dropped > 0 and self.window is not None:
            unusable = self.unusable_R[rows].clamp(min=dropped) + counts_R[rows]
            if bool((unusable > self.cumulative_length - (self.window - 1)).any()):
                raise RuntimeError(
                    f"rollback of {int(counts_R.max())} tokens is deeper than the cache margin {self.margin}."
                )
            self.unusable_R[rows] = unusable
        index = torch.arange(stored, device="cpu")[None, :] - counts_R[rows, None]
        index = index.clamp(min=0).to(self.device)[:, None, :, None]
        rows = rows.to(self.device)
        for buffer in (self._keys, self._values):
            view = buffer[rows, :, self.start : self.end]
            buffer[rows, :, self.start : self.end] = view.gather(2, index.expand_as(view))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if self.is_initialized:
            self._keys = self._keys.repeat_interleave(repeats, dim=0)
            self._values = self._values.repeat_interleave(repeats, dim=0)
            self.unusable_R = self.unusable_R.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, no more than there are; a row that keeps its place is not copied."""
        if self.is_initialized:
            indices = indices.cpu()
            self.unusable_R = self.unusable_R[indices]
            places = (indices != torch.arange(len(indices), device="cpu")).nonzero().squeeze(1)
            sources, places = indices[places].to(self.device), places.to(self.device)
            self._keys[places], self._values[places] = self._keys[sources], self._values[sources]
            self._keys, self._values = self._keys[: len(indices)], self._values[: len(indices)]

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = self.unusable_R = None
        self.is_initialized = False
        self.start = self.end = self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back `-tokens_to_remove` tokens of every row by dropping the newest slots."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be <= 0, got {tokens_to_remove}.")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        dropped = self.cumulative_length - (self.end - self.start)
        if self.window is not None and dropped > 0:
            unusable = int(self.unusable_R.max().clamp(min=dropped))
            if unusable > self.cumulative_length + tokens_to_remove - (self.window - 1):
                raise RuntimeError(
                    f"crop of {-tokens_to_remove} tokens is deeper than the cache margin {self.margin}."
                )
        self.end += tokens_to_remove
        self.cumulative_length += tokens_to_remove


class RollbackCache(Cache):
    """
    Cache of a trunk's layers with `rollback`.

    Args:
        config (`PreTrainedConfig`): The trunk's configuration; its `layer_types` decide which layers slide.
        margin (`int`): Deepest rollback in tokens.
    """

    def __init__(self, config: Any, margin: int) -> None:
        config = config.get_text_config(decoder=True)
        super().__init__(
            layers=[
                RollbackLayer(config.sliding_window if kind == "sliding_attention" else None, margin)
                for kind in layer_types(config)
            ]
        )

    def rollback(self, counts_R: torch.Tensor) -> None:
        """Takes back the newest `counts_R[r]` tokens of every row r in all layers; see [`RollbackLayer.rollback`]."""
        counts_R = counts_R.to("cpu", torch.long)
        if bool((counts_R > 0).any()):
            for layer in self.layers:
                layer.rollback(counts_R)

    def undo_update(self, tokens: int, first_layer: int) -> None:
        """Forgets the last update of the layers from `first_layer` on; see [`RollbackLayer.undo_update`]."""
        for layer in self.layers[first_layer:]:
            layer.undo_update(tokens)


class TwinCache(RollbackCache):
    """
    A cache with a second one for rows that nothing conditions: the same tokens, other states in the upper layers.

    Args:
        config (`PreTrainedConfig`), margin (`int`): See [`RollbackCache`].
    """

    def __init__(self, config: Any, margin: int) -> None:
        super().__init__(config, margin)
        self.bare = RollbackCache(config, margin)

    def rollback(self, counts_R: torch.Tensor) -> None:
        """Takes tokens back in both."""
        super().rollback(counts_R)
        self.bare.rollback(counts_R)

    def undo_update(self, tokens: int, first_layer: int) -> None:
        """Forgets the last update of both."""
        super().undo_update(tokens, first_layer)
        self.bare.undo_update(tokens, first_layer)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row in both."""
        super().batch_repeat_interleave(repeats)
        self.bare.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps rows in both."""
        super().batch_select_indices(indices)
        self.bare.batch_select_indices(indices)
