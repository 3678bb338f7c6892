"""Choosing the next token of every row: processors on each row's own history, randomness keyed by what is written.

Letters: R rows, V vocabulary.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Processors that look at the scores only: one call serves rows of any length.
HISTORY_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Odd constants of the SplitMix64 generator (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """The SplitMix64 finaliser: a bijection of 64-bit integers whose output bits look random."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_uniform(*keys: torch.Tensor) -> torch.Tensor:
    """
    One uniform number in [0, 1) per row, a function of the keys alone.

    Args:
        keys (`torch.LongTensor` of shape `[R]`): For instance seed, prompt, stream, position and attempt.
    """
    state = torch.zeros_like(keys[0])
    for key in keys:
        state = mix(state ^ key)
    return _shift_right(state, 11).double() * 2.0**-53


def prompt_keys(prompts: list[list[int]]) -> list[int]:
    """A key per prompt from its tokens; a repeated prompt of one batch gets a key of its own."""
    keys, seen = [], {}
    for tokens in prompts:
        state = torch.zeros(1, dtype=torch.long)
        for token in tokens:
            state = mix(state ^ token)
        key = int(state)
        repeat = seen.get(key, 0)
        seen[key] = repeat + 1
        keys.append(int(mix(torch.tensor([key ^ repeat]))) if repeat else key)
    return keys


def process_logits(
    logits_RV: torch.Tensor, processors: LogitsProcessorList, histories: list[torch.Tensor]
) -> torch.Tensor:
    """
    Scores after the processors, each row with its own history.

    Args:
        logits_RV (`torch.Tensor` of shape `[R, V]`): Raw logits.
        processors (`LogitsProcessorList`): As `generate` builds them.
        histories (`list[torch.LongTensor]`): Per row, its prompt, header and committed or pending tokens.
    """
    if not processors:
        return logits_RV
    if all(isinstance(processor, HISTORY_FREE) for processor in processors):
        return processors(histories[0][None].expand(logits_RV.shape[0], -1), logits_RV)
    scores = torch.empty_like(logits_RV)
    lengths = [history.shape[0] for history in histories]
    for length in sorted(set(lengths)):
        rows = [row for row, value in enumerate(lengths) if value == length]
        scores[rows] = processors(torch.stack([histories[row] for row in rows]), logits_RV[rows])
    return scores


def choose_tokens(scores_RV: torch.Tensor, do_sample: bool, uniform_R: torch.Tensor | None) -> torch.Tensor:
    """
    Next token `[R]`: the argmax, or the inverse of the cumulative distribution at a given uniform number.

    Args:
        scores_RV (`torch.Tensor` of shape `[R, V]`): Processed scores.
        do_sample (`bool`): Sample or take the argmax.
        uniform_R (`torch.DoubleTensor` of shape `[R]`, *optional*): From [`keyed_uniform`].
    """
    if not do_sample:
        return scores_RV.argmax(dim=-1)
    cumulative = scores_RV.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform_R[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=scores_RV.shape[-1] - 1)
