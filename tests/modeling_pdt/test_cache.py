"""RollbackCache: any rows back by any number of tokens, beyond the sliding window, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modeling_pdt.cache import RollbackCache, RollbackLayer

TRUNKS = ("gpt_oss", "llama", "qwen3")


class Rows:
    """Rows of random tokens fed to a trunk through one cache, and what each row holds."""

    def __init__(self, trunk, rows, prompt, margin):
        self.trunk, self.cache = trunk, RollbackCache(trunk.config, margin)
        self.held = [[] for _ in range(rows)]
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.feed(prompt)

    def feed(self, tokens=1):
        ids = torch.randint(2, 97, (len(self.held), tokens))
        start = torch.tensor([[len(held)] for held in self.held])
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        with torch.no_grad():
            output = self.trunk(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=start + torch.arange(tokens),
                past_key_values=self.cache,
                use_cache=True,
            )
        for held, new in zip(self.held, ids.tolist(), strict=True):
            held += new
        return output.logits[:, -1]

    def rollback(self, counts):
        self.cache.rollback(torch.tensor(counts))
        for row, count in enumerate(counts):
            if count:
                del self.held[row][-count:]
                self.mask[row] = torch.cat([torch.zeros(count, dtype=torch.long), self.mask[row, :-count]])

    def difference(self, logits):
        with torch.no_grad():
            fresh = [self.trunk(torch.tensor([held])).logits[0, -1] for held in self.held]
        return float((torch.stack(fresh) - logits).abs().max())


def test_without_rollback_it_is_the_dynamic_cache(trunk):
    ids = torch.randint(2, 97, (2, 70))
    ours, theirs = RollbackCache(trunk.config, 3), DynamicCache(config=trunk.config)
    with torch.no_grad():
        for chunk in ids.split([1, 5, 30, 1, 33], dim=1):
            left = trunk(input_ids=chunk, past_key_values=ours, use_cache=True).logits
            right = trunk(input_ids=chunk, past_key_values=theirs, use_cache=True).logits
            assert torch.allclose(left, right, atol=1e-6)
    assert ours.get_seq_length() == 70


@pytest.mark.parametrize("name", TRUNKS)
@settings(max_examples=6)
@given(
    prompt=st.integers(1, 30),
    events=st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 5), min_size=3, max_size=3)), max_size=4),
)
def test_rows_go_back_exactly(name, prompt, events):
    rows = Rows(_trunk(name), 3, prompt, margin=5)
    logits = None
    for extra, counts in events:
        # Every row goes back by no more than it was fed since the last time.
        logits = rows.feed(5)
        for _ in range(extra):
            logits = rows.feed()
        rows.rollback(counts)
        logits = rows.feed()
    if logits is not None:
        assert rows.difference(logits) < 1e-5


_TRUNKS = {}


def _trunk(name):
    from transformers import GptOssForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

    if name not in _TRUNKS:
        kind = {"gpt_oss": GptOssForCausalLM, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[name]
        values = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.1,
            "max_position_embeddings": 256,
        }
        sliding = {"sliding_window": 8}
        if name == "gpt_oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            sliding |= {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
        if name == "qwen3":
            sliding |= {"use_sliding_window": True, "max_window_layers": 1}
        config = kind.config_class(**values, **({} if name == "llama" else sliding))
        _TRUNKS[name] = kind(config).eval()
    return _TRUNKS[name]


def test_the_same_row_goes_back_again_and_again(trunk):
    rows = Rows(trunk, 2, 21, margin=6)
    for _ in range(12):
        rows.feed(6)
        rows.rollback([6, 0])
    assert [len(held) for held in rows.held] == [21, 93]
    assert rows.difference(rows.feed()) < 1e-5


def test_rows_not_named_keep_their_bytes(make_trunk):
    rows = Rows(make_trunk(), 3, 25, margin=6)
    before = [layer._keys[1, :, layer.start : layer.end].clone() for layer in rows.cache.layers]
    rows.rollback([3, 0, 6])
    after = [layer._keys[1, :, layer.start : layer.end] for layer in rows.cache.layers]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_sliding_layer_keeps_window_and_margin_only():
    layer = RollbackLayer(window=8, margin=5)
    for _ in range(300):
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
    assert layer.end - layer.start == 12
    assert layer._keys.shape[2] < 100
    assert layer.get_seq_length() == 300
    assert layer.get_mask_sizes(1) == (13, 288)


def test_deeper_than_the_margin_is_an_error():
    layer = RollbackLayer(window=8, margin=5)
    layer.update(torch.randn(2, 1, 40, 2), torch.randn(2, 1, 40, 2))
    layer.rollback(torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match="rollback of 1 tokens is deeper than the cache margin 5"):
        layer.rollback(torch.tensor([1, 0]))
    layer.rollback(torch.tensor([0, 5]))


def test_a_short_history_goes_back_whole():
    layer = RollbackLayer(window=8, margin=1)
    layer.update(torch.randn(2, 1, 6, 2), torch.randn(2, 1, 6, 2))
    layer.rollback(torch.tensor([6, 2]))


def test_crop_takes_the_newest_slots_of_all_rows(trunk):
    rows = Rows(trunk, 2, 20, margin=5)
    rows.feed(5)
    rows.cache.crop(-5)
    rows.mask = rows.mask[:, :-5]
    rows.held = [held[:-5] for held in rows.held]
    assert rows.difference(rows.feed()) < 1e-5


@pytest.mark.parametrize("updates", [[40], [40] + [1] * 80])
def test_crop_deeper_than_the_margin_is_an_error(updates):
    layer = RollbackLayer(window=8, margin=5)
    for tokens in updates:
        layer.update(torch.randn(2, 1, tokens, 2), torch.randn(2, 1, tokens, 2))
    layer.crop(-3)
    with pytest.raises(RuntimeError, match="crop of 3 tokens is deeper than the cache margin 5"):
        layer.crop(-3)
    with pytest.raises(ValueError, match="tokens_to_remove must be <= 0, got 2"):
        layer.crop(2)


def test_rows_are_repeated_selected_and_forgotten():
    cache = RollbackLayer(window=None)
    cache.update(torch.arange(2.0).view(2, 1, 1, 1), torch.arange(2.0).view(2, 1, 1, 1))
    cache.batch_repeat_interleave(2)
    assert cache._keys[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    stored = cache._keys
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    assert cache._keys[:, 0, 0, 0].tolist() == [0, 1, 1]
    assert cache._keys.data_ptr() == stored.data_ptr()
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache._keys[:, 0, 0, 0].tolist() == [1, 0]
    keys, _ = cache.update(torch.full((2, 1, 1, 1), 7.0), torch.full((2, 1, 1, 1), 7.0))
    assert keys[0, 0, :, 0].tolist() == [1, 7]
    cache.reset()
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert keys.shape == (1, 1, 1, 1)


def test_the_default_device_is_not_the_caches(make_trunk):
    # What counts on the CPU was made on the default device; "meta" stands here for a GPU.
    cache = RollbackCache(make_trunk("llama").config, 8)
    states = torch.randn(2, 1, 4, 8)
    counts, indices = torch.tensor([0, 2]), torch.tensor([1])
    with torch.device("meta"):
        cache.update(states, states, 0)
        cache.rollback(counts)
        cache.batch_select_indices(indices)
    assert torch.equal(cache.layers[0].keys[0, 0, 2:], states[1, 0, :2])
