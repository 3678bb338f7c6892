"""Arguments of a parallel decoding call: checked once, defaults filled in, text turned into tokens and vectors.

Letters: B prompts, S streams, P plan places, N note width, K notes per text.
"""

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .configuration_generation import PDTGenerationConfig
from .interventions import Intervention, check_interventions
from .plan import OUTLINE_END, PlanEntry, StreamPlan, check_plan_entries, parse_outline
from .rollout import encode_texts
from .sampling import row_processors

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256
SECTION_SEPARATOR = "\n\n"
# Fields of `GenerationConfig` that parallel decoding does not have, and the values that ask for nothing.
RESTRICTED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "max_length": (None, 20),
    "guidance_scale": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "cache_implementation": (None,),
    "use_cache": (None, True),
    "token_healing": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@dataclass(frozen=True)
class Settings:
    """Choices of one call with every default resolved; names as in [`PDTGenerationConfig`]."""

    num_streams: int
    block_size: int
    bus_lag: int
    bus_capacity: int
    max_retries: int
    retry_policy: str
    agreement_threshold: float | None
    gate_scale: float
    coverage_threshold: float
    max_new_tokens: int
    do_sample: bool
    seed: int
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclass
class Inputs:
    """
    What a call decodes from.

    Args:
        prompts (`list[list[int]]`): Tokens of each prompt, without padding, outline included.
        headers (`list[list[int]]`): Tokens of each row's header.
        entries (`list[list[PlanEntry]]`): Plan items of each prompt.
        plan_BPN, plan_mask_BP: Snapshot 0: plan items first, then seeds.
        num_items (`int`): Places of snapshot 0 that are plan items.
        processors, criteria: Logits processors of every row, and the caller's stopping criteria.
        interventions (`tuple[Intervention]`): In the order given.
        plan_source (`str`, *optional*): Where the plan came from.
        separator (`list[int]`): Tokens between the sections of a merged answer; none without a tokenizer.
    """

    prompts: list[list[int]]
    headers: list[list[int]]
    entries: list[list[PlanEntry]]
    plan_BPN: torch.Tensor | None = None
    plan_mask_BP: torch.Tensor | None = None
    num_items: int = 0
    processors: list[LogitsProcessorList] = field(default_factory=list)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    interventions: tuple[Intervention, ...] = ()
    plan_source: str | None = None
    separator: list[int] = field(default_factory=list)


def merge_generation_config(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict
) -> PDTGenerationConfig:
    """
    The call's generation configuration: the model's, overridden by the one given, overridden by keyword arguments.

    Raises:
        ValueError: For an unknown argument, an impossible value, or something that parallel decoding does not have.
    """
    config = copy.deepcopy(model.generation_config)
    unknown = sorted(set(kwargs) - set(vars(config)))
    if unknown:
        raise ValueError(f"generate() got unknown arguments {unknown}.")
    given = {} if generation_config is None else generation_config.to_dict()
    for key, value in given.items():
        if value is not None and not key.startswith("_"):
            setattr(config, key, value)
    for key, value in kwargs.items():
        setattr(config, key, value)
    config.check()
    for name, allowed in RESTRICTED.items():
        if getattr(config, name, None) not in allowed:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, allowed))}: parallel decoding writes one answer per prompt "
                f"with its own cache, got {getattr(config, name)!r}."
            )
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {config.max_new_tokens}.")
    return config


def end_and_pad(config: PDTGenerationConfig) -> tuple[tuple[int, ...], int]:
    """Tokens that end a row, and the one that fills it up: the first of these, or 0, where none is named."""
    eos = config.eos_token_id
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos_ids[0] if eos_ids else 0)
    return eos_ids, pad


def resolve_settings(model: Any, config: PDTGenerationConfig, num_streams: int, seed: int) -> Settings:
    """`None` replaced by the values in the model's configuration; the gate is off while the head is untrained."""

    def value(name: str) -> Any:
        chosen = getattr(config, name)
        return getattr(model.config, name) if chosen is None else chosen

    threshold = config.agreement_threshold
    if threshold is not None and "agreement" not in model.config.trained_parts:
        logger.warning("agreement_threshold=%s is ignored: the agreement head is not trained.", threshold)
        threshold = None
    if value("block_size") > model.config.commit_horizon:
        raise ValueError(
            f"block_size must be in [1, commit_horizon={model.config.commit_horizon}], got {value('block_size')}."
        )
    eos_ids, pad = end_and_pad(config)
    return Settings(
        num_streams=num_streams,
        block_size=value("block_size"),
        bus_lag=value("bus_lag"),
        bus_capacity=value("bus_capacity"),
        max_retries=config.max_retries,
        retry_policy=config.retry_policy,
        agreement_threshold=threshold,
        gate_scale=config.gate_scale,
        coverage_threshold=config.coverage_threshold,
        max_new_tokens=config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        do_sample=bool(config.do_sample),
        seed=seed,
        eos_ids=eos_ids,
        pad_id=int(pad),
    )


def read_prompts(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """
    Prompts without padding.

    Raises:
        ValueError: For inputs that are not `[prompts, tokens]`, or an empty prompt.
    """
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


def per_prompt(name: str, values: list | None, num_prompts: int, num_streams: int) -> list[list] | None:
    """
    A text argument as `[prompt][stream]`; `[stream]` serves every prompt.

    Raises:
        ValueError: When the lengths fit neither form.
    """
    if values is None:
        return None
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of texts, [stream] or [prompt][stream], got {values!r}.")
    if values and not isinstance(values[0], (list, tuple)):
        values = [values] * num_prompts
    if len(values) != num_prompts or any(len(row) != num_streams for row in values):
        raise ValueError(
            f"{name} must be [stream] or [prompt][stream] with {num_prompts} prompts and {num_streams} streams."
        )
    for row in values:
        for text in row:
            if not isinstance(text, str):
                raise ValueError(f"{name} must hold texts, got {text!r}.")
    return [list(row) for row in values]


def tokenize(name: str, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of texts without special tokens; asks for `tokenizer=` when there is none."""
    if tokenizer is None:
        raise ValueError(f"{name} is text: pass tokenizer=.")
    return [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]


def pad_texts(texts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as right-padded `[M, L]` ids and mask."""
    longest = max(1, max(len(text) for text in texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for index, text in enumerate(texts):
        ids[index, : len(text)] = torch.tensor(text, dtype=torch.long, device=device)
        mask[index, : len(text)] = True
    return ids, mask


def write_outlines(
    model: Any, tokenizer: Any, prompts: list[list[int]], config: PDTGenerationConfig
) -> tuple[list[list[int]], list[list[StreamPlan]]]:
    """
    `plan="trunk"`: the bare trunk continues every prompt with a numbered outline.

    Returns:
        The prompts with their outlines appended, and the outlines' lines.
    """
    if tokenizer is None:
        raise ValueError('plan="trunk" reads the outline as text: pass tokenizer=.')
    width, (_, pad) = max(map(len, prompts)), end_and_pad(config)
    device = model.stack.base_layer.embed_tokens.weight.device
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    options = GenerationConfig(
        max_new_tokens=config.outline_max_new_tokens,
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=pad,
        stop_strings=[OUTLINE_END],
    )
    with model.disable_adapter():
        written = model.trunk.generate(
            input_ids=ids, attention_mask=mask, generation_config=options, tokenizer=tokenizer
        )[:, width:]
    extended, plans = [], []
    for prompt, row in zip(prompts, written.tolist(), strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        lines = parse_outline(text)
        if not lines:
            raise ValueError(f"the trunk wrote no outline of the form '1. Header: item; item', but {text!r}.")
        outline = text.split(OUTLINE_END)[0].rstrip("\n") + OUTLINE_END
        extended.append(prompt + tokenize("outline", tokenizer, [outline])[0])
        plans.append(lines)
    return extended, plans


def encode_plan(
    model: Any, tokenizer: Any, entries: list[list[PlanEntry]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan item vectors `[B, P, N]` and their mask `[B, P]`."""
    places = max(len(items) for items in entries)
    flat = tokenize("plan_texts", tokenizer, [entry.text for items in entries for entry in items])
    heads = model.stack.heads
    vectors = torch.zeros(len(entries), places, model.config.notes_dim, device=device)
    mask = torch.tensor([[p < len(items) for p in range(places)] for items in entries], device=device)
    ids, present = pad_texts(flat, device)
    vectors[mask] = heads.encode_items(encode_texts(model.stack, ids, present), present)
    return vectors, mask


def predict_plan(model: Any, prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Snapshot 0 `[B, P, N]` from the planner head's buckets; bucket 0 is an empty place."""
    ids, mask = pad_texts(prompts, device)
    states = encode_texts(model.stack, ids, mask)
    slots = model.stack.heads.planner(states, mask).argmax(dim=-1)
    return model.stack.heads.embed_slots(slots), slots > 0


def encode_seeds(
    model: Any,
    tokenizer: Any,
    seed_texts: list[list[str]] | None,
    seed_notes: torch.Tensor | None,
    num_prompts: int,
    num_streams: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Seeds as further places of snapshot 0: encoded texts `[B, S * K, N]`, or vectors `[B, places, N]` as given."""
    if seed_notes is not None and seed_texts is not None:
        raise ValueError("give at most one of seed_texts and seed_notes.")
    if seed_notes is not None:
        seed_notes = torch.as_tensor(seed_notes, dtype=torch.float32, device=device)
        seed_notes = seed_notes[None].expand(num_prompts, -1, -1) if seed_notes.dim() == 2 else seed_notes
        width = model.config.notes_dim
        if seed_notes.dim() != 3 or seed_notes.shape[0] != num_prompts or seed_notes.shape[2] != width:
            raise ValueError(
                f"seed_notes must have shape [prompts={num_prompts}, places, notes_dim={width}], "
                f"got {list(seed_notes.shape)}."
            )
        return seed_notes, torch.ones(seed_notes.shape[:2], dtype=torch.bool, device=device)
    texts = per_prompt("seed_texts", seed_texts, num_prompts, num_streams)
    if texts is None:
        return None
    ids, present = pad_texts(tokenize("seed_texts", tokenizer, [text for row in texts for text in row]), device)
    notes = model.stack.heads.encode(encode_texts(model.stack, ids, present), present)
    filled = present.any(dim=1)[:, None].expand(-1, notes.shape[1])
    return notes.reshape(num_prompts, -1, notes.shape[-1]), filled.reshape(num_prompts, -1)


def resolve_plan(
    model: Any,
    config: PDTGenerationConfig,
    tokenizer: Any,
    prompts: list[list[int]],
    plan_texts: list | None,
    num_streams: int,
) -> tuple[list[list[int]], list[list[PlanEntry]], list[list[str]] | None, str | None]:
    """Prompts with their outlines, plan items, headers that the plan brings, and where the plan came from."""
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
        plans = [lines[:num_streams] for lines in plans]
        entries = [[PlanEntry(text, k) for k, line in enumerate(lines) for text in line.items] for lines in plans]
        titles = [[line.header for line in lines] for lines in plans]
        for row in titles:
            row += [f"Part {k + 1}" for k in range(len(row), num_streams)]
        return prompts, entries, [[f"## {title}\n" for title in row] for row in titles], "trunk"
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
) -> tuple[Inputs, Settings]:
    """Checks and resolves everything that a call was given; see [`parallel_generate`] for the arguments."""
    prompts = read_prompts(input_ids, attention_mask)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [-2**63, 2**63 - 1], got {seed!r}.")
    num_streams = config.num_streams or model.config.num_streams
    settings = resolve_settings(model, config, num_streams, seed)
    device = model.stack.base_layer.embed_tokens.weight.device
    headers = per_prompt("stream_prefixes", stream_prefixes, len(prompts), num_streams)
    prompts, entries, titles, source = resolve_plan(model, config, tokenizer, prompts, plan_texts, num_streams)
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
    if tokenizer is not None:
        inputs.separator = tokenize("separator", tokenizer, [SECTION_SEPARATOR])[0]
    inputs.interventions = check_interventions(interventions, len(prompts))
    parts = []
    if any(entries):
        parts.append(encode_plan(model, tokenizer, entries, device))
    elif config.plan == "planner":
        parts.append(predict_plan(model, prompts, device))
        inputs.plan_source = "planner"
    inputs.num_items = parts[0][0].shape[1] if parts else 0
    seeds = encode_seeds(model, tokenizer, seed_texts, seed_notes, len(prompts), num_streams, device)
    if seeds is not None:
        parts.append(seeds)
    if parts:
        inputs.plan_BPN = torch.cat([vectors for vectors, _ in parts], dim=1)
        inputs.plan_mask_BP = torch.cat([mask for _, mask in parts], dim=1)
    return inputs, settings
