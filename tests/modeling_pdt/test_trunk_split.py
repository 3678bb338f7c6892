"""The trunk in two halves equals the trunk, bit for bit; trunks that cannot be split are refused by name."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.trunk_split import TapState, check_trunk, layer_types, run_lower, run_upper

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def split_logits(trunk, split: int, **inputs) -> torch.Tensor:
    stack = getattr(trunk, check_trunk(trunk))
    return trunk.get_output_embeddings()(run_upper(stack, run_lower(stack, split, **inputs)))


def splits(trunk) -> range:
    return range(trunk.config.num_hidden_layers + 1)


@torch.no_grad()
def test_halves_equal_the_trunk_for_every_split(trunk, make_batch):
    batch = make_batch()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    expected = trunk(**inputs).logits
    for split in splits(trunk):
        assert torch.equal(split_logits(trunk, split, **inputs), expected), split


@torch.no_grad()
def test_halves_equal_the_trunk_without_mask_and_from_embeddings(trunk, make_batch):
    batch = make_batch(padding=0)
    expected = trunk(input_ids=batch.ids).logits
    embeddings = trunk.get_input_embeddings()(batch.ids)
    for split in splits(trunk):
        assert torch.equal(split_logits(trunk, split, input_ids=batch.ids), expected)
        assert torch.equal(split_logits(trunk, split, inputs_embeds=embeddings), expected)


@torch.no_grad()
def test_halves_equal_the_trunk_with_a_cache(trunk, make_batch):
    # 20 tokens: prefill of 11, one chunk of 3, single steps; the window of 8 is passed.
    batch = make_batch()
    bounds = [0, 11, 14, 15, 16, 17, 18, 19, 20]
    for split in splits(trunk):
        ours, theirs = DynamicCache(config=trunk.config), DynamicCache(config=trunk.config)
        for begin, end in pairwise(bounds):
            inputs = {
                "input_ids": batch.ids[:, begin:end],
                "attention_mask": batch.mask[:, :end],
                "position_ids": batch.positions[:, begin:end],
            }
            expected = trunk(**inputs, past_key_values=theirs).logits
            assert torch.equal(split_logits(trunk, split, **inputs, past_key_values=ours), expected), (split, begin)
        for mine, reference in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(mine.keys, reference.keys) and torch.equal(mine.values, reference.values)


@torch.no_grad()
def test_positions_default_to_the_length_of_the_cache(trunk, make_batch):
    batch = make_batch(padding=0)
    expected = trunk(input_ids=batch.ids).logits
    cache = DynamicCache(config=trunk.config)
    first = split_logits(trunk, 1, input_ids=batch.ids[:, :13], past_key_values=cache)
    last = split_logits(trunk, 1, input_ids=batch.ids[:, 13:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, last], dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_upper_half_runs_again_from_one_tap(trunk, make_batch):
    batch = make_batch()
    stack = trunk.model
    tap = run_lower(stack, 1, input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
    assert isinstance(tap, TapState) and tap.split == 1 and tap.hidden.shape == (3, 20, 32)
    collected: list[torch.Tensor] = []
    first = run_upper(stack, tap, collect=collected)
    moved = run_upper(stack, tap, between=lambda index, hidden: hidden + 0.1)
    assert torch.equal(run_upper(stack, tap), first)
    assert not torch.equal(moved, first)
    assert len(collected) == trunk.config.num_hidden_layers - 1 and torch.equal(collected[0], tap.hidden)


@torch.no_grad()
def test_between_sees_every_boundary_once(trunk, make_batch):
    batch = make_batch()
    tap = run_lower(trunk.model, 2, input_ids=batch.ids, attention_mask=batch.mask)
    seen = []

    def between(index: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(index)
        return hidden

    run_upper(trunk.model, tap, between)
    assert seen == list(range(2, trunk.config.num_hidden_layers + 1))


@torch.no_grad()
def test_ready_masks_by_layer_type(trunk, make_batch):
    batch = make_batch()
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions}
    expected = trunk(**inputs, attention_mask=batch.mask).logits
    masks = run_lower(trunk.model, 0, **inputs, attention_mask=batch.mask).masks
    assert set(masks) == set(layer_types(trunk.config))
    assert torch.equal(split_logits(trunk, 1, **inputs, attention_mask=masks), expected)


def test_tokens_or_embeddings_are_needed(make_trunk):
    stack = make_trunk("llama").model
    ids = torch.ones(1, 3, dtype=torch.long)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": stack.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            run_lower(stack, 1, **inputs)


def test_layer_types_alternate_and_default():
    assert layer_types(LlamaConfig(num_hidden_layers=2)) == ["full_attention"] * 2
    assert layer_types(MistralConfig(num_hidden_layers=2, sliding_window=4)) == ["sliding_attention"] * 2


@torch.no_grad()
def test_window_on_every_layer(make_batch):
    batch = make_batch()
    trunk = MistralForCausalLM(MistralConfig(**{**SMALL, "vocab_size": 97}, sliding_window=6)).eval()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    expected = trunk(**inputs).logits
    for split in splits(trunk):
        assert torch.equal(split_logits(trunk, split, **inputs), expected)


REFUSED = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=31)), "embed_tokens"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)), "final_logit_softcapping"),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)), "rotary embedding differs"),
    "granite_logits": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), "logits_scaling"),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, embedding_multiplier=2.0)), "embedding_multiplier"),
    "qwen3_next": (
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1)),
        "linear_attention",
    ),
    "compiled": (lambda: torch.compile(LlamaForCausalLM(LlamaConfig(**SMALL))), "give the LlamaForCausalLM"),
    "headless": (lambda: LlamaModel(LlamaConfig(**SMALL)), "cannot be wrapped"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_trunks_say_why(name):
    build, reason = REFUSED[name]
    trunk = build()
    with pytest.raises(ValueError, match=f"{type(trunk).__name__} cannot be wrapped") as error:
        check_trunk(trunk)
    assert reason in str(error.value)


def test_a_window_that_the_family_does_not_know_is_none():
    # Taken for a sliding window, it cut what the upper layers see.
    class Older(PreTrainedConfig):
        def __init__(self, sliding_window=4, **values):
            self.sliding_window, self.num_hidden_layers = sliding_window, 2
            super().__init__(**values)

    assert layer_types(LlamaConfig(num_hidden_layers=2, sliding_window=8)) == ["full_attention"] * 2
    assert layer_types(MistralConfig(num_hidden_layers=2, sliding_window=8)) == ["sliding_attention"] * 2
    assert layer_types(Older()) == ["sliding_attention"] * 2


def test_a_trunk_whose_norms_have_no_weights():
    # `StopIteration` without a word.
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    trunk = OlmoForCausalLM(OlmoConfig(**sizes, num_hidden_layers=3)).eval()
    ids = torch.randint(2, 97, (1, 9))
    with torch.no_grad():
        expected = trunk(ids).logits
        assert torch.allclose(PDTForParallelDecoding.from_trunk(trunk)(ids).logits, expected, atol=1e-5)
