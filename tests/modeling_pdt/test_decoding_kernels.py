"""Decoding's own attention and head equal the trunk's, and the trunk keeps its own."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_pdt import decoding_kernels
from modeling_pdt.callbacks import ParallelDecodingCallback
from modeling_pdt.decoding_kernels import FAMILIES, FEW_ROWS, GROUPED, grouped_attention, head_logits

PROMPTS = torch.tensor([[0] * 9 + [7, 8, 9], list(range(20, 32))])
PADDING = torch.tensor([[0] * 9 + [1] * 3, [1] * 12])


class Scores(ParallelDecodingCallback):
    """Keeps the scores of every token, and which attention made them."""

    def __init__(self, model, raises=False):
        self.model, self.raises, self.scores, self.implementations = model, raises, [], set()

    def on_token(self, decoder, rows_M, tokens_M, scores_MV):
        self.scores.append(scores_MV.clone())
        self.implementations.add(self.model.trunk.config._attn_implementation)
        if self.raises:
            raise InterruptedError


def decode(model):
    """Two prompts, one padded, the other beyond the sliding window; withdrawn blocks."""
    scores = Scores(model)
    output = model.generate(
        PROMPTS,
        attention_mask=PADDING,
        num_streams=2,
        max_new_tokens=9,
        agreement_threshold=1.0,
        eos_token_id=None,
        do_sample=False,
        callbacks=[scores],
        return_dict_in_generate=True,
    )
    return output, scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_grouped_attention_is_the_familys_eager_attention(family, tokens):
    source = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = SimpleNamespace(num_key_value_groups=3, training=False, sinks=torch.randn(6))
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((6, tokens), (2, 11), (2, 11)))
    mask = torch.zeros(2, 1, tokens, 11).masked_fill(torch.rand(2, 1, tokens, 11) < 0.4, torch.finfo().min)
    mask[0, :, 0] = torch.finfo().min
    choices = {"s_aux": module.sinks} if family == "gpt_oss" else {}
    arguments = (module, query, key, value, mask, 0.3)
    expected, expected_weights = source.eager_attention_forward(*arguments, **choices)
    output, weights = grouped_attention(*arguments, **choices)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
def test_decoding_writes_what_it_writes_with_the_trunks_attention(make_model, monkeypatch, name):
    model = make_model(name, trained=True)
    model.trunk.config._attn_implementation = "eager"
    model.config._adapter_config.trained_parts = ["agreement"]
    output, scores = decode(model)
    assert output.trace.of_kind("rollback")
    assert scores.implementations == {GROUPED}
    assert model.trunk.config._attn_implementation == "eager"
    monkeypatch.setattr(decoding_kernels, "FAMILIES", ())
    own, own_scores = decode(model)
    assert own_scores.implementations == {"eager"}
    assert torch.equal(output.sequences, own.sequences)
    for mine, other in zip(scores.scores, own_scores.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_other_attention_stays_and_eager_attention_comes_back(make_model):
    model = make_model("llama")
    model.trunk.config._attn_implementation = "sdpa"
    assert decode(model)[1].implementations == {"sdpa"}
    model.trunk.config._attn_implementation = "eager"
    with pytest.raises(InterruptedError):
        model.generate(PROMPTS, max_new_tokens=3, callbacks=[Scores(model, raises=True)])
    assert model.trunk.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_trunk_may_have_the_attention_by_its_name(trunk, make_batch):
    batch = make_batch()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    trunk.set_attn_implementation("eager")
    expected = trunk(**inputs).logits
    trunk.set_attn_implementation(GROUPED)
    torch.testing.assert_close(trunk(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_head_logits_are_the_heads():
    head, hidden = nn.Linear(32, 97, bias=False), torch.randn(FEW_ROWS + 1, 32)
    expected = head(hidden)
    for rows in (1, 3, FEW_ROWS + 1):
        torch.testing.assert_close(head_logits(head, hidden[:rows]), expected[:rows], atol=1e-6, rtol=0)


def test_a_head_that_is_more_than_a_weight_is_called():
    head, hidden, seen = nn.Linear(32, 97, bias=False), torch.randn(3, 32), []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert head_logits(head, hidden) is seen[0]
    handle.remove()
    head.forward = lambda states: states
    assert head_logits(head, hidden) is hidden
    biased = nn.Linear(32, 97)
    assert torch.equal(head_logits(biased, hidden), biased(hidden))
    half = nn.Linear(32, 97, bias=False, dtype=torch.bfloat16)
    assert torch.equal(head_logits(half, hidden.bfloat16()), half(hidden.bfloat16()))
