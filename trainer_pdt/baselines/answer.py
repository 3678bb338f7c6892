"""A request as every baseline gets it, and an answer in the making, with the trace that parallel decoding leaves."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import ParallelGenerateOutput, PDTForParallelDecoding
from modeling_pdt.generation_inputs import merge_generation_config, prepare_inputs
from modeling_pdt.outputs import collect_output
from modeling_pdt.plan import PlanEntry, StreamPlan, check_plan_entries
from modeling_pdt.snapshot_zero import write_outlines
from modeling_pdt.streams import Section
from modeling_pdt.trace import DecodingTrace, describe_model, plan_items

from ..data.schema import Document
from ..render import render_header, render_outline_lines, render_request
from .meter import CallMeter
from .sampler import Sampler

# Choices of a call that a baseline follows; the others are those of bus, gate and blocks, which it does not have.
FOLLOWED = ("num_streams", "max_new_tokens", "do_sample", "seed", "eos_ids", "pad_id")


@dataclass(frozen=True)
class Request:
    """
    What is to be written: the same text for parallel decoding and for every baseline.

    Args:
        request (`str`): Rendered request, without outline.
        lines (`tuple[StreamPlan]`): The outline, a line per section.
    """

    request: str
    lines: tuple[StreamPlan, ...]

    @classmethod
    def from_document(cls, document: Document, tokenizer: PreTrainedTokenizerBase) -> "Request":
        """The request and the plan of a document."""
        lines = tuple(
            StreamPlan(stream.header, tuple(item.text for item in document.items if item.stream == stream.stream_id))
            for stream in document.streams
        )
        return cls(render_request(document.prompt, tokenizer), lines)

    @classmethod
    def outlined(cls, request: str, model: PDTForParallelDecoding, tokenizer: PreTrainedTokenizerBase) -> "Request":
        """A rendered request with the outline that the bare trunk writes."""
        prompt = tokenizer(request, add_special_tokens=False)["input_ids"]
        _, plans = write_outlines(model, tokenizer, [prompt], model.generation_config)
        return cls(request, tuple(plans[0]))

    @property
    def prompt(self) -> str:
        """Request and outline: what all sections have in common."""
        headers, items = [line.header for line in self.lines], [line.items for line in self.lines]
        return self.request + render_outline_lines(headers, items)

    @property
    def headers(self) -> list[str]:
        """The heading line of every section."""
        return [render_header(line.header) for line in self.lines]

    @property
    def items(self) -> list[dict[str, Any]]:
        """Plan items as `generate` takes them."""
        return [{"text": text, "stream": k} for k, line in enumerate(self.lines) for text in line.items]


@dataclass(frozen=True)
class Call:
    """
    One request to be answered in one way.

    Args:
        name (`str`): Of the way.
        model (`PDTForParallelDecoding`): Its trunk writes; for a baseline its adapters are disabled by the caller.
        tokenizer (`PreTrainedTokenizerBase`): Of the trunk.
        request (`Request`): What is written.
        options (`dict`): Keyword arguments of `generate` about length and sampling, `seed` included.
        meter (`CallMeter`): Counts the trunk's calls.
    """

    name: str
    model: PDTForParallelDecoding
    tokenizer: PreTrainedTokenizerBase
    request: Request
    options: dict[str, Any]
    meter: CallMeter

    def generate(self, **changes: Any) -> ParallelGenerateOutput:
        """Parallel decoding of the request by the model itself."""
        prompt = self.tokenizer([self.request.prompt], return_tensors="pt", add_special_tokens=False)
        return self.model.generate(
            prompt["input_ids"].to(self.model.trunk.device),
            tokenizer=self.tokenizer,
            num_streams=len(self.request.lines),
            plan_texts=self.request.items,
            stream_prefixes=self.request.headers,
            return_dict_in_generate=True,
            **self.options,
            **changes,
        )


class Answer:
    """
    An answer that a baseline writes with the bare trunk, section by section, in parallel decoding's own records.

    Args:
        call (`Call`): What is written, and with what.
        details: Options of the baseline, for the trace.

    Raises:
        ValueError: For options that parallel decoding or [`Sampler`] refuse.
    """

    def __init__(self, call: Call, **details: Any) -> None:
        self.started = time.perf_counter()
        self.model, self.trunk, self.meter, self.request = call.model, call.model.trunk, call.meter, call.request
        self.device = self.trunk.device
        options = {**call.options, "num_streams": len(call.request.lines), "plan": None}
        seed = options.pop("seed", 0)
        inputs, self.settings = prepare_inputs(
            self.model,
            merge_generation_config(self.model, None, options),
            torch.tensor([call.tokenizer(call.request.prompt, add_special_tokens=False)["input_ids"]]),
            tokenizer=call.tokenizer,
            stream_prefixes=call.request.headers,
            seed=seed,
        )
        self.prompt, self.headers, self.separator = inputs.prompts[0], inputs.headers, inputs.separator
        self.sampler = Sampler(inputs, self.settings, self.device)
        self.sections = [Section(list(header)) for header in inputs.headers]
        entries = check_plan_entries(call.request.items, self.settings.num_streams)
        self.trace = self._new_trace(entries, {"name": call.name, **details})

    def _new_trace(self, entries: list[PlanEntry], baseline: dict[str, Any]) -> DecodingTrace:
        settings = {key: value if key in FOLLOWED else None for key, value in asdict(self.settings).items()}
        settings |= {"plan": "external", "interventions": [], "baseline": baseline}
        trace = DecodingTrace(settings=settings, model=describe_model(self.model))
        trace.add("plan", prompt=0, items=plan_items(entries, self.model.config), headers=self.headers)
        return trace

    @property
    def streams(self) -> range:
        """Indices of the sections."""
        return range(len(self.sections))

    def ends(self, stream: int) -> bool:
        """Whether nothing more may be added to a section."""
        section = self.sections[stream]
        return section.finished or len(section.tokens) >= self.settings.max_new_tokens

    def commit(self, stream: int, tokens: Sequence[int]) -> None:
        """Adds tokens to a section, as one block."""
        section = self.sections[stream]
        start, end = len(section.tokens), len(section.tokens) + len(tokens)
        self.trace.add(
            "commit",
            prompt=0,
            stream=stream,
            round=len(section.blocks),
            attempt=0,
            start=start,
            end=end,
            agreement=None,
            coverage={},
            tokens=list(tokens),
            call=self.meter.steps,
            time_s=time.perf_counter() - self.started,
            forced=False,
        )
        section.tokens.extend(tokens)
        section.blocks.append((start, end))
        section.finished = section.tokens[-1] in self.settings.eos_ids

    def output(self) -> ParallelGenerateOutput:
        """The finished answer in the form of parallel decoding."""
        self.trace.calls = self.meter.steps
        total = time.perf_counter() - self.started
        self.trace.timings = {"prefill_s": self.meter.reading_s, "exchange_s": 0.0, "total_s": total}
        rows = SimpleNamespace(prompts=[self.prompt], sections=self.sections, device=self.device)
        return collect_output(rows, self.settings, self.trace, self.separator)
