"""The ways of answering a request, by name: parallel decoding and its baselines with the same trunk and sampler."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_pdt import ParallelGenerateOutput, PDTForParallelDecoding
from modeling_pdt.interventions import SelfOnly

from .answer import Answer, Call, Request
from .drafts import write_drafted
from .eagle import Eagle, EagleHead
from .lookahead import Lookahead, LookaheadOptions
from .medusa import Medusa, MedusaHeads
from .meter import CallMeter
from .plain import write_assisted, write_full_text, write_independent, write_sequential, write_shared_prefill
from .skeleton import Router, write_skeleton


@dataclass(frozen=True)
class Tools:
    """
    What single baselines are given besides the model.

    Args:
        router (`str`, *optional*, defaults to `"none"`): Of Skeleton-of-Thought: `"ask"` asks the trunk whether the
            answer falls into independent points, and writes sequentially where it does not.
        prompt_lookup_num_tokens (`int`, *optional*, defaults to 8): Longest draft of prompt lookup.
        assistant (`PreTrainedModel`, *optional*): Smaller model of the same vocabulary, for `assistant`.
        lookahead (`LookaheadOptions`): Sizes of lookahead decoding.
        medusa (`MedusaHeads`, *optional*), eagle (`EagleHead`, *optional*): Trained on this trunk, for the methods of
            these names.
        eagle_length (`int`, *optional*, defaults to 4): Tokens of EAGLE's chain.
    """

    router: Router = "none"
    prompt_lookup_num_tokens: int = 8
    assistant: PreTrainedModel | None = None
    lookahead: LookaheadOptions = field(default_factory=LookaheadOptions)
    medusa: MedusaHeads | None = None
    eagle: EagleHead | None = None
    eagle_length: int = 4


@dataclass
class Run:
    """
    A request answered in one way.

    Args:
        output (`ParallelGenerateOutput`): Streams, merged answer and trace.
        request (`Request`): What was answered; Skeleton-of-Thought brings an outline of its own.
        seconds (`float`): Wall clock of the whole call, from text to tokens.
        calls (`int`): Calls of the trunk, one after the other, those that read the prompt included.
        positions (`int`): Tokens that the trunk computed, padding included.
    """

    output: ParallelGenerateOutput
    request: Request
    seconds: float
    calls: int
    positions: int

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens of every section."""
        return [stream.token_ids for stream in self.output.streams[0]]

    @property
    def written(self) -> int:
        """How many tokens the sections have."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Method:
    """
    A way of answering.

    Args:
        label (`str`): For a reader.
        write (`Callable`): From a [`Call`] and [`Tools`] to an [`Answer`], or to parallel decoding's output.
        in_order (`bool`): Sections are written one after another, each with the earlier ones in its context.
        parallel (`bool`): The adapters take part.
        lossless (`bool`): Writes what `sequential` writes, with other calls of the trunk.
    """

    label: str
    write: Callable[[Call, Tools], Answer | ParallelGenerateOutput]
    in_order: bool = False
    parallel: bool = False
    lossless: bool = False


def _plain(write: Callable[[Answer], None]) -> Callable[[Call, Tools], Answer]:
    """A function that writes into an [`Answer`], as one of a call."""

    def run(call: Call, tools: Tools) -> Answer:
        answer = Answer(call)
        write(answer)
        return answer

    return run


def _assisted(call: Call, tools: Tools) -> Answer:
    if tools.assistant is None:
        raise ValueError("method 'assistant' needs a smaller model of the same vocabulary: assistant=None.")
    answer = Answer(call, assistant=tools.assistant.name_or_path)
    write_assisted(answer, assistant_model=tools.assistant)
    return answer


def _prompt_lookup(call: Call, tools: Tools) -> Answer:
    options = {"prompt_lookup_num_tokens": tools.prompt_lookup_num_tokens}
    answer = Answer(call, **options)
    write_assisted(answer, **options)
    return answer


def _lookahead(call: Call, tools: Tools) -> Answer:
    answer = Answer(call, **asdict(tools.lookahead))
    write_drafted(answer, Lookahead(tools.lookahead))
    return answer


def _medusa(call: Call, tools: Tools) -> Answer:
    _check_heads("medusa", tools.medusa)
    answer = Answer(call, num_heads=len(tools.medusa.heads))
    write_drafted(answer, Medusa(answer, tools.medusa))
    return answer


def _eagle(call: Call, tools: Tools) -> Answer:
    _check_heads("eagle", tools.eagle)
    answer = Answer(call, length=tools.eagle_length)
    write_drafted(answer, Eagle(answer, tools.eagle, tools.eagle_length))
    return answer


def _check_heads(name: str, heads: MedusaHeads | EagleHead | None) -> None:
    if heads is None:
        raise ValueError(f"method {name!r} needs heads trained on this trunk: {name}=None.")


METHODS: dict[str, Method] = {
    "pdt": Method("PDT, notes on", lambda call, tools: call.generate(), parallel=True),
    "self_only": Method(
        "PDT, own notes only", lambda call, tools: call.generate(interventions=[SelfOnly()]), parallel=True
    ),
    "sequential": Method("sequential: section after section", _plain(write_sequential), in_order=True),
    "independent": Method("independent streams: a batch of prompts", _plain(write_independent)),
    "shared_prefill": Method("independent streams: prompt read once", _plain(write_shared_prefill)),
    "skeleton": Method(
        "Skeleton-of-Thought: own outline, then a batch", lambda call, tools: write_skeleton(call, tools.router)
    ),
    "full_text": Method("full-text bus: streams read each other's text", _plain(write_full_text)),
    "assistant": Method("sequential, assistant_model", _assisted, in_order=True, lossless=True),
    "prompt_lookup": Method("sequential, prompt lookup", _prompt_lookup, in_order=True, lossless=True),
    "lookahead": Method("sequential, lookahead (ours)", _lookahead, in_order=True, lossless=True),
    "medusa": Method("sequential, Medusa heads (ours)", _medusa, in_order=True, lossless=True),
    "eagle": Method("sequential, EAGLE head (ours)", _eagle, in_order=True, lossless=True),
}
"""Ways of answering in the order in which they are shown."""


def run_method(
    name: str,
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    options: dict[str, Any],
    tools: Tools | None = None,
) -> Run:
    """
    Answers a request in one way.

    Args:
        name (`str`): One of `METHODS`.
        model (`PDTForParallelDecoding`): Trained adapters on the trunk; baselines run with them disabled.
        tokenizer (`PreTrainedTokenizerBase`): Of the trunk.
        request (`Request`): With its outline.
        options (`dict`): Keyword arguments of `generate` about length and sampling, `seed` included.
        tools (`Tools`, *optional*): Of single baselines.

    Raises:
        ValueError: For an unknown name, or options that a baseline cannot follow.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r}, allowed: {', '.join(METHODS)}.")
    method, started = METHODS[name], time.perf_counter()
    adapters = nullcontext() if method.parallel else model.disable_adapter()
    with torch.no_grad(), adapters, CallMeter(model.trunk) as meter:
        written = method.write(Call(name, model, tokenizer, request, options, meter), tools or Tools())
        output = written.output() if isinstance(written, Answer) else written
    seconds = time.perf_counter() - started
    if isinstance(written, Answer):
        request = written.request
    return Run(output, request, seconds, meter.calls, meter.tokens)
