"""Wall-clock comparisons: medians of ratios of interleaved pairs in one run, against named baselines, same trunk."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding

from ..data.schema import Document
from ..render import render_header, render_prompt
from .modes import plan_entries

Result = TypeVar("Result")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def in_turn(calls: Mapping[str, Callable[[int], Result]], rounds: int, warmup: int = 0) -> dict[str, list[Result]]:
    """
    What every call returned, `[rounds]` each, for the number of the round; within a round all calls follow each other,
    in turn first. Results of the `warmup` rounds before them are thrown away.
    """
    names, results = list(calls), {name: [] for name in calls}
    for index in range(warmup + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            result = calls[name](index)
            if index >= warmup:
                results[name].append(result)
    return results


def ratio_summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median, quartiles and number of the ratios of paired timings."""
    ratios = sorted(first / second for first, second in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {"mean": statistics.median(ratios), "low": low, "high": high, "n": len(ratios)}


@torch.no_grad()
def parallel_vs_single(
    model: PDTForParallelDecoding, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> dict[str, Any]:
    """
    One stream that writes as many tokens as all streams together, over parallel decoding with bus and gate on.

    Both go through the same loop; the single stream is the bare trunk and may not stop early. Above 1, parallel
    decoding is faster.
    """
    pairs, calls = [], []
    for index, document in enumerate(documents):
        inputs = tokenizer([render_prompt(document, tokenizer)], return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"]

        def parallel(document: Document = document, ids: torch.Tensor = ids, index: int = index) -> Any:
            return model.generate(
                ids,
                tokenizer=tokenizer,
                num_streams=len(document.streams),
                plan_texts=plan_entries(document),
                stream_prefixes=[render_header(stream.header) for stream in document.streams],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                seed=index,
                max_new_tokens=110,
                return_dict_in_generate=True,
            )

        parallel_s, output = timed(parallel)
        tokens = sum(len(result.token_ids) for result in output.streams[0])

        def single(ids: torch.Tensor = ids, tokens: int = tokens) -> Any:
            with model.disable_adapter():
                return model.generate(
                    ids,
                    num_streams=1,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=None,
                    plan=None,
                    agreement_threshold=None,
                    max_new_tokens=tokens,
                    return_dict_in_generate=True,
                )

        single_s, _ = timed(single)
        if index:
            pairs.append((single_s, parallel_s))
            calls.append((tokens, output.trace.calls))
    return {
        **ratio_summary(pairs),
        "critical_path_tokens": sum(c for _, c in calls) / sum(t for t, _ in calls),
        "parallel_s": statistics.median(p for _, p in pairs),
        "single_s": statistics.median(s for s, _ in pairs),
    }


@torch.no_grad()
def overhead_vs_shared_prefill(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    tokens: int = 72,
) -> dict[str, Any]:
    """
    Parallel decoding over `generate` of the bare trunk on as many rows with one shared prefill, fixed length.

    What bus, coverage and agreement cost beside plain batched decoding; 1 would be no cost.
    """
    pairs = []
    for index, document in enumerate(documents):
        ids = tokenizer([render_prompt(document, tokenizer)], return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ]
        streams = len(document.streams)

        def parallel(document: Document = document, ids: torch.Tensor = ids, streams: int = streams) -> Any:
            return model.generate(
                ids,
                tokenizer=tokenizer,
                num_streams=streams,
                plan_texts=plan_entries(document),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                max_retries=0,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
            )

        def batched(ids: torch.Tensor = ids, streams: int = streams) -> Any:
            trunk = model.trunk
            cache = DynamicCache(config=trunk.config)
            with model.disable_adapter():
                trunk(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(streams)
                config = GenerationConfig(
                    do_sample=True, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=None
                )
                rows = ids.expand(streams, -1)
                return trunk.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    past_key_values=cache,
                    generation_config=config,
                )

        parallel_s, _ = timed(parallel)
        batched_s, _ = timed(batched)
        if index:
            pairs.append((parallel_s, batched_s))
    return ratio_summary(pairs)
