"""What somebody with the bare trunk and transformers can do: one section after another, or a batch of sections.

Every function writes a whole [`Answer`] with the trunk's own `generate`; the sampler is that of parallel decoding.

Letters: R rows, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig

from modeling_pdt.cache import RollbackCache

from .answer import Answer
from .sampler import SamplerProcessor


def write_rows(
    answer: Answer,
    prefixes: Sequence[list[int]],
    streams: Sequence[int],
    max_new_tokens: int,
    cache: Cache | None = None,
    written: int = 0,
    **options: Any,
) -> list[list[int]]:
    """
    Continues rows with the trunk's `generate`; returns their new tokens up to EOS, which is included.

    Args:
        prefixes (`list[list[int]]`): Everything before the new tokens.
        streams (`list[int]`): Section that each row writes.
        max_new_tokens (`int`): Limit.
        cache (`Cache`, *optional*): Of the left-padded prefixes without their last tokens, or of a shorter part.
        written (`int`, *optional*, defaults to 0): Section tokens at the end of every prefix.
        options: Further arguments of the trunk's `generate`.
    """
    width, settings = max(map(len, prefixes)), answer.settings
    ids = [[settings.pad_id] * (width - len(prefix)) + list(prefix) for prefix in prefixes]
    mask = [[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(settings.eos_ids) or None,
        pad_token_id=settings.pad_id,
        prompt_lookup_num_tokens=options.pop("prompt_lookup_num_tokens", None),
    )
    answer.meter.reading()
    rows = answer.trunk.generate(
        input_ids=torch.tensor(ids, device=answer.device),
        attention_mask=torch.tensor(mask, device=answer.device),
        generation_config=config,
        logits_processor=[SamplerProcessor(answer.sampler, list(streams), width - written)],
        **({} if cache is None else {"past_key_values": cache}),
        **options,
    )
    return [until_end(row, settings.eos_ids) for row in rows[:, width:].tolist()]


def until_end(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Tokens up to the first EOS, which is included."""
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: place + 1]
    return tokens


def closed(answer: Answer, stream: int) -> list[int]:
    """Header and section as a later section reads them: ended by EOS, where the trunk has one."""
    section = answer.sections[stream]
    return section.header + section.tokens + ([] if section.finished else list(answer.settings.eos_ids[:1]))


def write_sequential(answer: Answer) -> None:
    """One row, one section after another, each with all earlier ones before it in the same cache."""
    cache, prefix = DynamicCache(config=answer.trunk.config), list(answer.prompt)
    for stream in answer.streams:
        rows = [prefix + answer.headers[stream]]
        answer.commit(stream, write_rows(answer, rows, [stream], answer.settings.max_new_tokens, cache)[0])
        prefix += closed(answer, stream)


def write_assisted(answer: Answer, **options: Any) -> None:
    """
    The same with assisted generation of transformers, which reads all that is before a section anew.

    Args:
        options: `assistant_model` or `prompt_lookup_num_tokens`.
    """
    prefix = list(answer.prompt)
    for stream in answer.streams:
        rows = [prefix + answer.headers[stream]]
        answer.commit(stream, write_rows(answer, rows, [stream], answer.settings.max_new_tokens, **options)[0])
        prefix += closed(answer, stream)


def write_independent(answer: Answer) -> None:
    """A batch of prompts, one per section: each row reads the whole prompt for itself and none sees another."""
    prefixes = [answer.prompt + header for header in answer.headers]
    for stream, tokens in enumerate(write_rows(answer, prefixes, answer.streams, answer.settings.max_new_tokens)):
        answer.commit(stream, tokens)


def write_shared_prefill(answer: Answer) -> None:
    """The same batch, its prompt read once; the cache is then repeated for the rows and aligned after the headers."""
    prompt, trunk, headers = answer.prompt, answer.trunk, answer.headers
    longest = max(map(len, headers))
    cache = RollbackCache(trunk.config, longest - min(map(len, headers)))
    if len(prompt) > 1:
        _read(answer, [prompt[:-1]], 0, cache)
        cache.batch_repeat_interleave(len(headers))
    rows = [[prompt[-1], *header][:-1] for header in headers]
    if longest:
        _read(answer, rows, len(prompt) - 1, cache)
        cache.rollback(torch.tensor([longest - len(row) for row in rows]))
    prefixes = [prompt + header for header in headers]
    written = write_rows(answer, prefixes, answer.streams, answer.settings.max_new_tokens, cache)
    for stream, tokens in enumerate(written):
        answer.commit(stream, tokens)


def _read(answer: Answer, rows: list[list[int]], start: int, cache: Cache) -> None:
    """Feeds right-padded rows whose first token stands at position `start`."""
    longest, pad = max(map(len, rows)), answer.settings.pad_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=answer.device)
    mask = torch.tensor([[1] * (start + len(row)) + [0] * (longest - len(row)) for row in rows], device=answer.device)
    positions = torch.arange(start, start + longest, device=answer.device).expand(len(rows), -1)
    answer.meter.reading()
    answer.trunk(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def write_full_text(answer: Answer) -> None:
    """
    Rounds of a block; every section reads its siblings' whole text up to the round before: what a bus could carry at
    most, at the price of a prefill of all rows per round.
    """
    while open_streams := [stream for stream in answer.streams if not answer.ends(stream)]:
        # A section that is open has written whole rounds only, as many as every other open one.
        written = len(answer.sections[open_streams[0]].tokens)
        prefixes = []
        for stream in open_streams:
            siblings = [answer.sections[other] for other in answer.streams if other != stream]
            text = [token for section in siblings if section.tokens for token in section.header + section.tokens]
            prefixes.append(answer.prompt + text + answer.headers[stream] + answer.sections[stream].tokens)
        wanted = min(answer.settings.block_size, answer.settings.max_new_tokens - written)
        rows = write_rows(answer, prefixes, open_streams, wanted, written=written)
        for stream, tokens in zip(open_streams, rows, strict=True):
            answer.commit(stream, tokens)
