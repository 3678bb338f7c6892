"""The shipped tiny trunk, or half of it, with untrained adapters, requests, and greedy decoding without any cache."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding
from trainer_pdt.baselines import Request
from trainer_pdt.data.worlds import WorldOptions, generate_document

TRUNK = Path(__file__).parents[1] / "recipes/tiny/trunk"
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    """That of the trunk."""
    return AutoTokenizer.from_pretrained(TRUNK)


def _model(**changes: Any) -> PDTForParallelDecoding:
    trunk = AutoModelForCausalLM.from_pretrained(TRUNK, **changes)
    return PDTForParallelDecoding.from_trunk(trunk, notes_dim=16, adapter_bottleneck=4, block_size=8).eval()


@lru_cache
def whole_model() -> PDTForParallelDecoding:
    """The trunk that can write an outline."""
    return _model()


@lru_cache
def tiny_model() -> PDTForParallelDecoding:
    """Its first two layers."""
    return _model(num_hidden_layers=2, layer_types=["full_attention"] * 2)


@lru_cache
def sliding_model() -> PDTForParallelDecoding:
    """The same two, the first with a window shorter than the prompt."""
    return _model(num_hidden_layers=2, sliding_window=16, layer_types=["sliding_attention", "full_attention"])


@lru_cache
def make_request(index: int = 0) -> Request:
    """A held-out document's request and plan, of three sections."""
    return Request.from_document(generate_document("test", index, WorldOptions(), with_notes=False), tokenizer())


@torch.no_grad()
def greedy(trunk: PreTrainedModel, prefix: list[int], tokens: int) -> list[int]:
    """The likeliest token, again and again, everything computed anew for each."""
    written: list[int] = []
    while len(written) < tokens and written[-1:] != [tokenizer().eos_token_id]:
        written.append(int(trunk(torch.tensor([prefix + written]), use_cache=False).logits[0, -1].argmax()))
    return written
