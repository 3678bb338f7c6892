"""The start of a call: every prompt goes through the trunk once, then its cache serves all of its streams.

Letters: B prompts, R rows, T tokens.
"""

from dataclasses import replace
from typing import Any

import torch

from .cache import TwinCache
from .streams import StreamBatch


def prefill_prompts(stack: Any, streams: StreamBatch, pad_id: int) -> None:
    """
    Runs all prompts but for their last tokens, left-padded, and expands cache, mask and positions to the rows.

    Args:
        stack (`PDTStack`): Trunk and adapter; nothing is conditioned here.
        streams (`StreamBatch`): With an empty cache.
        pad_id (`int`): Fills up shorter prompts.
    """
    lengths = [len(prompt) - 1 for prompt in streams.prompts]
    longest = max(lengths)
    if longest > 0:
        ids = torch.full((streams.num_prompts, longest), pad_id, device=streams.device)
        mask = torch.zeros_like(ids)
        for index, (prompt, length) in enumerate(zip(streams.prompts, lengths, strict=True)):
            ids[index, longest - length :] = torch.tensor(prompt[:-1], dtype=torch.long, device=streams.device)
            mask[index, longest - length :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        tap = stack.lower(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=streams.cache)
        stack.upper(tap)
        if isinstance(streams.cache, TwinCache):
            stack.upper(replace(tap, cache=streams.cache.bare))
        streams.cache.batch_repeat_interleave(streams.num_streams)
        streams.mask = mask.repeat_interleave(streams.num_streams, dim=0)
    streams.position_R = torch.tensor(lengths, device=streams.device)[streams.prompt_R]


def header_batch(
    streams: StreamBatch, adapter_stream_R: torch.Tensor, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The last prompt token and the header of every row, right-padded.

    Args:
        streams (`StreamBatch`): Prompts and headers.
        adapter_stream_R (`torch.LongTensor` of shape `[R]`): Stream adapter of every row.
        pad_id (`int`): Fills up shorter headers.

    Returns:
        `(ids, stream_ids, lengths)` of shapes `[R, T]`, `[R, T]` and `[R]`; a prompt token belongs to no stream.
    """
    headers = [section.header for section in streams.sections]
    ids = torch.full((len(headers), 1 + max(map(len, headers))), pad_id, device=streams.device)
    stream_ids = torch.full_like(ids, -1)
    for row, header in enumerate(headers):
        tokens = [streams.prompts[row // streams.num_streams][-1], *header]
        ids[row, : len(tokens)] = torch.tensor(tokens, device=streams.device)
        stream_ids[row, 1 : len(tokens)] = adapter_stream_R[row]
    return ids, stream_ids, torch.tensor([1 + len(header) for header in headers], device=streams.device)
