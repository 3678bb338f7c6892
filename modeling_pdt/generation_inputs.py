"""Arguments of a parallel decoding call: checked once, text turned into tokens and vectors.

Letters: B prompts, S streams, P plan places, N note width.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .configuration_generation import PDTGenerationConfig
from .generation_settings import Settings, resolve_settings
from .interventions import Intervention, check_interventions
from .outputs import Merge
from .plan import PlanEntry, check_plan_entries, read_contract
from .sampling import row_processors
from .snapshot_zero import encode_plan, encode_seeds, per_prompt, predict_plan, tokenize, write_outlines

logger = logging.getLogger(__name__)

SECTION_SEPARATOR = "\n\n"
# Fields of `GenerationConfig` that parallel decoding does not have, and the values that ask for nothing.
RESTRICTED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "cache_implementation": (None,),
    "use_cache": (None, True),
    "token_healing": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_mtp": (None, False),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "assistant_early_exit": (None,),
}
# What an argument that is None means where the trunk's own generation configuration has a value: none of it.
SWITCHED_OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass
class Inputs:
    """
    What a call decodes from.

    Args:
        prompts (`list[list[int]]`): Tokens of each prompt, without padding, outline included.
        headers (`list[list[int]]`): Tokens of each row's header.
        entries (`list[list[PlanEntry]]`): Plan items of each prompt.
        plan_BPN, plan_mask_BP: Plan items first, then seeds.
        num_items (`int`): How many of these places are plan items.
        processors, criteria: Logits processors of every row, and the caller's stopping criteria.
        config (`PDTGenerationConfig`): What the processors were made from.
        custom_processors (`bool`): Some of them are the caller's.
        interventions (`tuple[Intervention]`): In the order given.
        plan_source (`str`, *optional*): Where the plan came from.
        separator (`list[int]`): Tokens between the sections of a merged answer; none without a tokenizer.
        merge (`Callable`, *optional*): The caller's way to merge an answer.
    """

    prompts: list[list[int]]
    headers: list[list[int]]
    entries: list[list[PlanEntry]]
    plan_BPN: torch.Tensor | None = None
    plan_mask_BP: torch.Tensor | None = None
    num_items: int = 0
    processors: list[LogitsProcessorList] = field(default_factory=list)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    config: PDTGenerationConfig | None = None
    custom_processors: bool = False
    interventions: tuple[Intervention, ...] = ()
    plan_source: str | None = None
    separator: list[int] = field(default_factory=list)
    merge: Merge | None = None

    def snapshot_zero(self, plan_on_bus: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What stands on the bus before the first token, and its mask; without `plan_on_bus` the seeds alone."""
        if plan_on_bus or self.plan_BPN is None:
            return self.plan_BPN, self.plan_mask_BP
        return self.plan_BPN[:, self.num_items :], self.plan_mask_BP[:, self.num_items :]


def merge_generation_config(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict
) -> PDTGenerationConfig:
    """
    The call's generation configuration: the model's, overridden by the one given, overridden by keyword arguments.

    Raises:
        ValueError: For an unknown argument, an impossible value, or something that parallel decoding does not have.
    """
    if not isinstance(generation_config, GenerationConfig | None):
        raise ValueError(f"generation_config must be a GenerationConfig, got {generation_config!r}.")
    config = copy.deepcopy(model.generation_config)
    unknown = sorted(set(kwargs) - set(vars(config)))
    if unknown:
        raise ValueError(f"generate() got unknown arguments {unknown}.")
    given = {} if generation_config is None else generation_config.to_dict()
    for key, value in given.items():
        if value is not None and not key.startswith("_"):
            setattr(config, key, value)
    for key, value in kwargs.items():
        setattr(config, key, SWITCHED_OFF.get(key) if value is None else value)
    config.check()
    for name, allowed in RESTRICTED.items():
        if getattr(config, name, None) not in allowed:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, allowed))}: parallel decoding writes one answer per prompt "
                f"with its own cache and its own loop, got {getattr(config, name)!r}."
            )
    if config.max_length not in (None, 20):  # transformers' default
        raise ValueError(f"max_length counts the prompt: use max_new_tokens, got {config.max_length!r}.")
    return config


def read_prompts(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """
    Prompts without padding.

    Raises:
        ValueError: For inputs that are not integers `[prompts, tokens]`, or an empty prompt.
    """
    if input_ids is not None and getattr(input_ids, "dtype", None) not in (torch.int64, torch.int32):
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ValueError(f"input_ids must be a tensor of integers, got {kind}.")
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[0] == 0:
        shape = None if input_ids is None else list(input_ids.shape)
        raise ValueError(f"input_ids must have shape [prompts >= 1, tokens >= 1], got {shape}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}."
        )
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; every prompt needs at least one token.")
    return prompts


def section_headers(titles: Sequence[list[str]]) -> list[list[str]]:
    """Headers `[prompt][stream]` as text, from titles."""
    return [[f"## {title}\n" for title in row] for row in titles]


def resolve_plan(
    model: Any,
    config: PDTGenerationConfig,
    tokenizer: Any,
    prompts: list[list[int]],
    plan_texts: list | None,
    num_streams: int,
    plan_contract: dict | list[dict] | None = None,
) -> tuple[list[list[int]], list[list[PlanEntry]], list[list[str]] | None, str | None]:
    """Prompts with their outlines, plan items, headers that the plan brings, and where the plan came from."""
    if plan_contract is not None:
        if plan_texts is not None:
            raise ValueError("give at most one of plan_texts and plan_contract.")
        contracts = plan_contract if isinstance(plan_contract, (list, tuple)) else [plan_contract] * len(prompts)
        if len(contracts) != len(prompts):
            raise ValueError(f"plan_contract must be one, or one per prompt ({len(prompts)}), got {len(contracts)}.")
        entries, titles = zip(*(read_contract(contract, num_streams) for contract in contracts), strict=True)
        return prompts, list(entries), section_headers(titles) if all(titles) else None, "contract"
    if plan_texts is not None:
        if not isinstance(plan_texts, (list, tuple)):
            raise ValueError(f"plan_texts must be a list of {{'text': str, 'stream': int}}, got {plan_texts!r}.")
        rows = plan_texts if plan_texts and isinstance(plan_texts[0], (list, tuple)) else [plan_texts] * len(prompts)
        if len(rows) != len(prompts):
            raise ValueError(
                f"plan_texts must be a list of entries, or one per prompt ({len(prompts)}), got {len(rows)}."
            )
        return prompts, [check_plan_entries(list(row), num_streams) for row in rows], None, "external"
    if config.plan == "trunk":
        prompts, plans = write_outlines(model, tokenizer, prompts, config)
        others = sorted({len(lines) for lines in plans} - {num_streams})
        if others:
            logger.warning(
                "the trunk wrote an outline of %s lines for num_streams=%d: further lines become no section, further "
                "streams get a header without plan items.",
                " and ".join(map(str, others)),
                num_streams,
            )
        plans = [lines[:num_streams] for lines in plans]
        entries = [[PlanEntry(text, k) for k, line in enumerate(lines) for text in line.items] for lines in plans]
        titles = [[line.header for line in lines] for lines in plans]
        for row in titles:
            row += [f"Part {k + 1}" for k in range(len(row), num_streams)]
        return prompts, entries, section_headers(titles), "trunk"
    return prompts, [[] for _ in prompts], None, None


def prepare_inputs(
    model: Any,
    config: PDTGenerationConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    tokenizer: Any = None,
    plan_texts: list | None = None,
    stream_prefixes: list | None = None,
    seed_texts: list | None = None,
    seed_notes: torch.Tensor | None = None,
    logits_processor: list | None = None,
    stopping_criteria: list | None = None,
    interventions: list[Intervention] | None = None,
    seed: int = 0,
    plan_contract: dict | list[dict] | None = None,
) -> tuple[Inputs, Settings]:
    """Checks and resolves everything that a call was given; see [`parallel_generate`] for the arguments."""
    prompts = read_prompts(input_ids, attention_mask)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [-2**63, 2**63 - 1], got {seed!r}.")
    num_streams = config.num_streams or model.config.num_streams
    settings = resolve_settings(model, config, num_streams, seed)
    device = model.stack.base_layer.embed_tokens.weight.device
    headers = per_prompt("stream_prefixes", stream_prefixes, len(prompts), num_streams)
    prompts, entries, titles, source = resolve_plan(
        model, config, tokenizer, prompts, plan_texts, num_streams, plan_contract
    )
    headers = headers or titles
    if headers is None:
        header_ids: list[list[int]] = [[] for _ in range(len(prompts) * num_streams)]
    else:
        header_ids = tokenize("stream_prefixes", tokenizer, [text for row in headers for text in row])
    starts = [prompts[row // num_streams] + header for row, header in enumerate(header_ids)]
    processors, criteria = row_processors(
        model, config, starts, settings.max_new_tokens, logits_processor, stopping_criteria, tokenizer
    )
    inputs = Inputs(prompts, header_ids, entries, processors=processors, criteria=criteria, plan_source=source)
    inputs.config, inputs.custom_processors = config, bool(logits_processor)
    if tokenizer is not None:
        inputs.separator = tokenize("separator", tokenizer, [SECTION_SEPARATOR])[0]
    inputs.interventions = check_interventions(interventions, len(prompts), num_streams)
    parts = []
    if any(entries):
        parts.append(encode_plan(model, tokenizer, entries, device))
    elif config.plan == "planner":
        parts.append(predict_plan(model, prompts, device))
        inputs.plan_source = "planner"
    inputs.num_items = parts[0][0].shape[1] if parts else 0
    if settings.flicker_guard is not None and settings.flicker_guard.max_switches is not None and not inputs.num_items:
        raise ValueError("flicker_guard.max_switches watches plan items: it needs a plan.")
    seeds = encode_seeds(model, tokenizer, seed_texts, seed_notes, len(prompts), num_streams, device)
    if seeds is not None:
        parts.append(seeds)
    if parts:
        inputs.plan_BPN = torch.cat([vectors for vectors, _ in parts], dim=1)
        inputs.plan_mask_BP = torch.cat([mask for _, mask in parts], dim=1)
    return inputs, settings
