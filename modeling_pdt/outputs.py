"""What the model returns: one training or scoring forward, and one parallel decoding call.

Letters: R rows, T tokens, V rounds, K notes per block, N note width, P plan items, S streams.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from .trace import DecodingTrace
from .trunk_split import TapState


@dataclass
class PDTOutput(ModelOutput):
    """
    Result of [`PDTForParallelDecoding.forward`]; a field is `None` where its inputs were not given.

    Args:
        loss (`torch.Tensor`): Shifted cross-entropy over labels that are not -100.
        logits (`torch.Tensor` of shape `[R, T, vocab]`, or `[M, vocab]` with a `logits_mask`): Next-token logits.
        planner_logits (`torch.Tensor` of shape `[R, P, plan_vocab_size]`): Plan buckets predicted from the prompt.
        notes (`torch.Tensor` of shape `[R, V, K, N]`): Teacher notes, encoded from text.
        speculation (`torch.Tensor` of shape `[R, V, K, N]`): Notes that the streams wrote themselves.
        agreement_logits (`torch.Tensor` of shape `[R, V]`): Per block: may it stand?
        agreement_token_logits (`torch.Tensor` of shape `[R, T]`): The same per token; a block is as good as its worst.
        coverage_logits (`torch.Tensor` of shape `[R, V, P]`): Per round and plan item: covered so far?
        stream_logits (`torch.Tensor` of shape `[R, S]`): Which stream wrote the row.
        past_key_values (`Cache`): The cache given, updated.
        hidden_states (`tuple[torch.Tensor]`): Inputs of the upper layers and the final state.
        last_hidden_state (`torch.Tensor` of shape `[R, T, D]`): What the language-model head reads.
        tap (`TapState`): The trunk between its halves, to be passed to a second forward over the same rows.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    planner_logits: torch.Tensor | None = None
    notes: torch.Tensor | None = None
    speculation: torch.Tensor | None = None
    agreement_logits: torch.Tensor | None = None
    agreement_token_logits: torch.Tensor | None = None
    coverage_logits: torch.Tensor | None = None
    stream_logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    last_hidden_state: torch.Tensor | None = None
    tap: TapState | None = None


@dataclass
class StreamResult:
    """
    One stream of one answer.

    Args:
        name (`str`): `"stream_0"`, `"stream_1"`, ...
        token_ids (`list[int]`): The section's committed tokens, EOS included when it was met.
        blocks (`list[tuple[int, int]]`): Token range of each committed block.
        coverage (`dict[int, float]`): Probability per plan item index that the section covers it.
        covered (`tuple[int, ...]`): Items whose probability reaches `coverage_threshold`.
        retries (`int`): Blocks that were withdrawn and written again.
        finished (`bool`): Whether the section ended with EOS (otherwise by the length limit).
    """

    name: str
    token_ids: list[int]
    blocks: list[tuple[int, int]]
    coverage: dict[int, float]
    covered: tuple[int, ...]
    retries: int
    finished: bool


@dataclass
class ParallelGenerateOutput(ModelOutput):
    """
    Result of [`PDTForParallelDecoding.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `[prompts * streams, T]`): Prompt, header and section of every row,
            left-padded, padded after EOS; rows of one prompt are adjacent.
        streams (`list[list[StreamResult]]`): Per prompt, per stream.
        merged (`list[torch.LongTensor]`): Per prompt, what `merge` makes of headers and sections; by default all of
            them in plan order, without EOS, with an empty line between them where a tokenizer was given.
        trace (`DecodingTrace`): What happened.
    """

    sequences: torch.Tensor | None = None
    streams: list[list[StreamResult]] | None = None
    merged: list[torch.Tensor] | None = None
    trace: DecodingTrace | None = None


Merge = Callable[[list[list[int]], list[StreamResult]], list[int]]


def join_parts(parts: list[list[int]], results: list[StreamResult], separator: list[int]) -> list[int]:
    """The parts of an answer in plan order, with a separator between them."""
    return [token for index, part in enumerate(parts) for token in (separator if index else []) + part]


def collect_output(
    streams: Any, settings: Any, trace: DecodingTrace, separator: list[int], merge: Merge | None = None
) -> ParallelGenerateOutput:
    """
    The result of a finished call.

    Args:
        streams (`StreamBatch`): Prompts and sections.
        settings (`Settings`): Choices of the call.
        trace (`DecodingTrace`): What happened.
        separator (`list[int]`): Tokens between the sections of a merged answer.
        merge (`Callable`, *optional*): See [`~generate.parallel_generate`].
    """
    merge = merge or partial(join_parts, separator=separator)
    results: list[list[StreamResult]] = [[] for _ in streams.prompts]
    parts: list[list[list[int]]] = [[] for _ in streams.prompts]
    rows = []
    for row, section in enumerate(streams.sections):
        prompt, stream = divmod(row, settings.num_streams)
        results[prompt].append(
            StreamResult(
                name=f"stream_{stream}",
                token_ids=section.tokens,
                blocks=section.blocks,
                coverage=section.coverage,
                covered=tuple(i for i, p in section.coverage.items() if p >= settings.coverage_threshold),
                retries=section.retries,
                finished=section.finished,
            )
        )
        parts[prompt].append(section.header + [token for token in section.tokens if token not in settings.eos_ids])
        rows.append((streams.prompts[prompt] + section.header, section.tokens))
    left = max(len(start) for start, _ in rows)
    right = max(len(section) for _, section in rows)
    sequences = torch.full((len(rows), left + right), settings.pad_id)
    for row, (start, section) in enumerate(rows):
        sequences[row, left - len(start) : left + len(section)] = torch.tensor(start + section)
    trace.streams = [[asdict(result) for result in row] for row in results]
    return ParallelGenerateOutput(
        sequences=sequences.to(streams.device),
        streams=results,
        merged=[torch.tensor(merge(*one), dtype=torch.long) for one in zip(parts, results, strict=True)],
        trace=trace,
    )
