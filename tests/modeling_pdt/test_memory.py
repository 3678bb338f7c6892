"""Keys and values per stream: the formula against the buffers of a cache that was filled."""

from types import SimpleNamespace

import pytest
import torch

from modeling_pdt.cache import RollbackCache
from modeling_pdt.memory import cache_memory


@pytest.mark.parametrize("kinds", [["full_attention"], ["sliding_attention", "full_attention", "sliding_attention"]])
@pytest.mark.parametrize("horizon", [4, 12])
@pytest.mark.parametrize(("prompt", "window"), [(5, 8), (90, 8), (30, 100)])
def test_the_formula_is_what_the_buffers_take(kinds, horizon, prompt, window):
    config = SimpleNamespace(layer_types=kinds, sliding_window=window, num_key_value_heads=2, head_dim=3)
    config.get_text_config = lambda decoder: config
    cache = RollbackCache(config, horizon + 1)

    def feed(tokens, rows):
        states = torch.zeros(rows, 2, tokens, 3)
        for index in range(len(kinds)):
            cache.update(states, states, index)

    feed(prompt - 1, 1)
    cache.batch_repeat_interleave(3)
    for fed in range(1, 300):
        feed(1, 3)
        held = sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer._keys, layer._values))
        assert held == 3 * cache_memory(config, prompt, fed, horizon), fed


def test_half_the_bytes_per_number_are_half_the_memory():
    config = SimpleNamespace(layer_types=["full_attention"], num_key_value_heads=2, head_dim=None)
    config.hidden_size, config.num_attention_heads, config.get_text_config = 32, 4, lambda decoder: config
    assert cache_memory(config, 10, 20, 4) == 2 * 2 * 8 * (9 + 64) * 4 == 2 * cache_memory(config, 10, 20, 4, 2)
