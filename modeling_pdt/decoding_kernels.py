"""What decoding computes in another order than the trunk's own modules, with their results.

Letters: R rows, H query heads, G key-value heads, T tokens, K keys, C head width, D trunk width, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

GROUPED = "pdt_grouped"
"""Name of [`grouped_attention`] among the attention implementations of transformers."""

FAMILIES = ("gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Model types whose eager attention is what [`grouped_attention`] computes."""

FEW_ROWS = 8
"""Up to so many rows, the product of a language-model head is faster from the weight's side."""


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Eager attention in which the H / G query heads of a group read their keys and values where they are: nothing is
    repeated for every query head, which for long prompts costs more than the attention itself.

    Args:
        module (`nn.Module`): The attention layer; its mode decides on dropout.
        query (`torch.Tensor` of shape `[R, H, T, C]`), key, value (`torch.Tensor` of shape `[R, G, K, C]`): States.
        attention_mask (`torch.Tensor` of shape `[R, 1, T, K]`, *optional*): Added to the scores.
        scaling (`float`), dropout (`float`, *optional*, defaults to 0.0): Of the scores, and of the weights.
        s_aux (`torch.Tensor` of shape `[H]`, *optional*): Score of every head's sink, a key without a value.

    Returns:
        `(output, weights)` of shapes `[R, T, H, C]` and `[R, H, T, K]`.
    """
    rows, heads, tokens, width = query.shape
    groups, keys = key.shape[1:3]
    queries = (query * scaling).reshape(rows, groups, -1, width)
    scores = (queries @ key.transpose(2, 3)).view(rows, heads, tokens, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(rows, -1, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :keys].to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights.reshape(rows, groups, -1, keys) @ value
    return output.view(rows, heads, tokens, width).transpose(1, 2), weights


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)

# Decoding calls that are inside [`grouped_eager_attention`], by the identity of their trunk's configuration.
_calls: Counter[int] = Counter()
_lock = Lock()


@contextmanager
def grouped_eager_attention(trunk: nn.Module) -> Iterator[None]:
    """
    Inside, a trunk of [`FAMILIES`] whose attention is eager uses [`grouped_attention`]; every other trunk its own.
    Of several threads inside with one trunk, the last one out gives it its own attention back.

    Args:
        trunk (`nn.Module`): The causal LM.
    """
    config, key = trunk.config, id(trunk.config)
    with _lock:
        changes = config.model_type in FAMILIES and (_calls[key] > 0 or config._attn_implementation == "eager")
        if changes:
            _calls[key] += 1
            config._attn_implementation = GROUPED
    try:
        yield
    finally:
        if changes:
            with _lock:
                _calls[key] -= 1
                if not _calls[key]:
                    del _calls[key]
                    config._attn_implementation = "eager"


def head_logits(head: nn.Module, hidden_RD: torch.Tensor) -> torch.Tensor:
    """
    Logits `[R, V]` of a language-model head.

    On a CPU, for 2 to [`FEW_ROWS`] rows of float32, the product is made from the weight's side: the weight is then
    read once for all rows, and not once for each. A head that is more than such a weight is called as it is.
    """
    few = hidden_RD.device.type == "cpu" and hidden_RD.dtype == torch.float32 and 1 < len(hidden_RD) <= FEW_ROWS
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    if not few or not plain or head._forward_hooks or head._forward_pre_hooks:
        return head(hidden_RD)
    return (head.weight @ hidden_RD.T).T
