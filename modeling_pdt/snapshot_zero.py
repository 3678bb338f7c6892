"""Snapshot 0, what is on the bus before the first token: an outline, plan items and seeds as vectors.

Letters: B prompts, S streams, P plan places, M texts, L tokens of a text, K notes per text, N note width.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from .configuration_generation import PDTGenerationConfig
from .generation_settings import end_and_pad
from .plan import OUTLINE_END, PLAN_SENTINEL, PlanEntry, StreamPlan, cut_outline, parse_outline
from .rollout import encode_texts


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
    shared = not values or not isinstance(values[0], (list, tuple))
    given = len(values) if shared else [len(row) for row in values]
    if shared:
        values = [values] * num_prompts
    if len(values) != num_prompts or any(len(row) != num_streams for row in values):
        raise ValueError(
            f"{name} must be [stream] or [prompt][stream] with {num_prompts} prompts and {num_streams} streams, got "
            f"{given} texts."
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
        stop_strings=[OUTLINE_END, PLAN_SENTINEL],
    )
    # Without notes and streams nothing is conditioned; switching the adapter off would reach other calls, too.
    written = model.trunk.generate(input_ids=ids, attention_mask=mask, generation_config=options, tokenizer=tokenizer)[
        :, width:
    ]
    extended, plans = [], []
    for prompt, row in zip(prompts, written.tolist(), strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        lines = parse_outline(text)
        if not lines:
            raise ValueError(f"the trunk wrote no outline of the form '1. Header: item; item', but {text!r}.")
        outline = cut_outline(text).rstrip("\n") + OUTLINE_END
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
