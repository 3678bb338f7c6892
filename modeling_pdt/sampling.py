"""Choosing the next token of every row: processors on each row's own history, randomness keyed by what is written.

Letters: R rows, V vocabulary.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

# Settings whose processors count from the length of the prompt that they were made for.
LENGTH_FIELDS = ("min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens")
# Settings whose processors keep the tokens of that prompt.
PROMPT_FIELDS = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
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


def fold_keys(*keys: torch.Tensor, state: torch.Tensor | int = 0) -> torch.Tensor:
    """A state `[R]` from keys `[R]`, one after the other; `state` is that of the keys before them."""
    for key in keys:
        state = mix(key ^ state)
    return state


def keyed_uniform(*keys: torch.Tensor, state: torch.Tensor | int = 0) -> torch.Tensor:
    """
    One uniform number in [0, 1) per row, a function of the keys alone.

    Args:
        keys (`torch.LongTensor` of shape `[R]`): For instance seed, prompt, stream, position and attempt.
        state (`torch.LongTensor` of shape `[R]`, *optional*): From [`fold_keys`], of the keys that come first.
    """
    return _shift_right(fold_keys(*keys, state=state), 11).double() * 2.0**-53


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


def capture_processors(
    model: Any,
    config: GenerationConfig,
    start: list[int],
    max_new_tokens: int,
    processors: Any = None,
    criteria: Any = None,
    tokenizer: Any = None,
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """
    Logits processors and the caller's criteria as `transformers` builds them from the configuration.

    The trunk's own `generate` prepares them and hands them to a loop that writes nothing.

    Args:
        model (`PDTForParallelDecoding`): Its trunk does the work.
        config (`PDTGenerationConfig`): Fields that `GenerationConfig` knows are used.
        start (`list[int]`): Prompt and header of a row.
        max_new_tokens (`int`): Limit of a section.
        processors, criteria, tokenizer (*optional*): The caller's.
    """
    known = vars(GenerationConfig())
    values = {key: value for key, value in config.to_dict().items() if key in known and value is not None}
    plain = GenerationConfig(**{**values, "max_new_tokens": max_new_tokens, "stop_strings": None})
    criteria = StoppingCriteriaList(criteria or [])
    of_trunk = getattr(model.trunk.generation_config, "stop_strings", None)
    if of_trunk is not None:
        raise ValueError(
            f"the trunk's generation_config.stop_strings={of_trunk!r}, allowed: None; give stop_strings= to this call."
        )
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={config.stop_strings!r} is text: pass tokenizer=.")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    caught = {}

    def loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        caught.update(kwargs)
        return input_ids

    ids = torch.tensor([start], device=model.stack.base_layer.embed_tokens.weight.device)
    model.trunk.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=plain,
        custom_generate=loop,
        logits_processor=LogitsProcessorList(processors or []),
        stopping_criteria=criteria,
    )
    given = {id(criterion) for criterion in criteria}
    of_the_loop = (MaxLengthCriteria, EosTokenCriteria)
    kept = [c for c in caught["stopping_criteria"] if id(c) in given or not isinstance(c, of_the_loop)]
    return caught["logits_processor"], StoppingCriteriaList(kept)


def row_processors(
    model: Any,
    config: GenerationConfig,
    starts: list[list[int]],
    max_new_tokens: int,
    processors: Any = None,
    criteria: Any = None,
    tokenizer: Any = None,
) -> tuple[list[LogitsProcessorList], StoppingCriteriaList]:
    """
    The processors of every row: one object for all rows, one per length of what stands before a section where they
    count from its start, one per row where they keep the prompt's tokens.

    Args:
        starts (`list[list[int]]`): Prompt and header of every row; see [`capture_processors`] for the others.
    """
    owners = (config, model.trunk.generation_config)

    def is_set(fields: tuple[str, ...]) -> bool:
        return any(getattr(owner, name, None) is not None for owner in owners for name in fields)

    keys = [0] * len(starts)
    if is_set(PROMPT_FIELDS):
        keys = list(range(len(starts)))
    elif is_set(LENGTH_FIELDS):
        keys = [len(start) for start in starts]
    made: dict[int, tuple] = {}
    for key, start in zip(keys, starts, strict=True):
        if key not in made:
            made[key] = capture_processors(model, config, start, max_new_tokens, processors, criteria, tokenizer)
    return [made[key][0] for key in keys], made[keys[0]][1]


def history_free(processors_R: list[LogitsProcessorList]) -> bool:
    """Whether all rows share processors that look at the scores only."""
    shared = all(processors is processors_R[0] for processors in processors_R)
    # The classes themselves: one derived from them may look at the history.
    return shared and all(type(processor) in HISTORY_FREE for processor in processors_R[0])


def process_logits(
    logits_RV: torch.Tensor, processors_R: list[LogitsProcessorList], histories: list[torch.Tensor]
) -> torch.Tensor:
    """
    Scores after the processors, each row with its own history.

    Args:
        logits_RV (`torch.Tensor` of shape `[R, V]`): Raw logits.
        processors_R (`list[LogitsProcessorList]`): Per row, as `generate` builds them.
        histories (`list[torch.LongTensor]`): Per row, its prompt, header and committed or pending tokens; not needed
            with processors that are [`history_free`].
    """
    if history_free(processors_R):
        return processors_R[0](logits_RV.new_zeros(logits_RV.shape[0], 0, dtype=torch.long), logits_RV)
    scores = torch.empty_like(logits_RV)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (processors, history) in enumerate(zip(processors_R, histories, strict=True)):
        groups.setdefault((id(processors), history.shape[0]), []).append(row)
    for rows in groups.values():
        scores[rows] = processors_R[rows[0]](torch.stack([histories[row] for row in rows]), logits_RV[rows])
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
