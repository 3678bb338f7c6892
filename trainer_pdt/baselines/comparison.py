"""Ways of answering side by side: what agrees, what it costs, on the same requests in one run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding

from ..data.counting import StreamText, count_document, reference_rate
from ..data.schema import Document, PlanItem, Stream
from ..data.worlds_lexicon import CUES
from ..evaluation.benchmark import ratio_summary
from ..evaluation.modes import section_text
from ..evaluation.scoring import plan_adherence, rate_dict
from ..evaluation.tables import Table
from ..evaluation.values import scalar, show
from .answer import Request
from .methods import METHODS, Run, Tools, run_method

REFERENCE = "sequential"
"""The way whose seconds per token the others are compared with."""

WARM_UP_TOKENS = 2


def run_methods(
    names: Sequence[str],
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    options: dict[str, Any],
    tools: Tools | None = None,
    done: Callable[[str, int, Run], None] | None = None,
) -> dict[str, list[Run]]:
    """
    Answers every request in every way, the ways of one request one after another, the first one taking turns.

    Args:
        names (`Sequence[str]`): Of `METHODS`.
        model, tokenizer, options, tools: See [`run_method`].
        requests (`Sequence[Request]`): What is answered.
        done (`Callable`, *optional*): Told name, number of the request and result of every answer.

    Returns:
        Per name a result for every request. Each way has run once before, on two tokens per section, unmeasured.
    """
    for name in names:
        run_method(name, model, tokenizer, requests[0], {**options, "max_new_tokens": WARM_UP_TOKENS}, tools)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number, request in enumerate(requests):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            runs[name].append(run_method(name, model, tokenizer, request, options, tools))
            if done is not None:
                done(name, number, runs[name][-1])
    return runs


def measure_costs(name: str, runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    """
    What the answers of one way cost.

    Args:
        name (`str`), runs (`Sequence[Run]`): Of one way.
        reference (`Sequence[Run]`): The same requests answered in the way that is compared with.

    Returns:
        Sums over the answers (`written` section tokens, `calls`, `positions`), the median `seconds` of an answer,
        `speedup` (written tokens per second over those of the reference, median and quartiles over requests) and, of a
        lossless way, `same` (requests with exactly the reference's tokens).
    """
    costs: dict[str, Any] = {
        name: sum(getattr(run, name) for run in runs) for name in ("written", "calls", "positions")
    }
    costs["seconds"] = statistics.median(run.seconds for run in runs)
    pairs = zip(runs, reference, strict=True)
    costs["speedup"] = ratio_summary([(o.seconds / o.written, r.seconds / r.written) for r, o in pairs])
    if METHODS[name].lossless:
        costs["same"] = sum(run.tokens == other.tokens for run, other in zip(runs, reference, strict=True))
    return costs


def count_answers(
    name: str,
    runs: Sequence[Run],
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    model: PDTForParallelDecoding,
) -> dict[str, Any]:
    """
    Whether the sections of the answers agree on facts, counted as `trainer_pdt.data.counting` does.

    Sections that were written at the same time are counted in the model's blocks, whatever wrote them; of sections
    written one after another, everything earlier counts as visible. An answer with an outline of its own is counted
    by that outline.

    Returns:
        `recall` of feasible references, `references` (repeated facts per answer) and `stated` (planned items that
        their owner stated).
    """
    counts = []
    for run, document in zip(runs, documents, strict=True):
        if name == "skeleton":
            document = outlined_document(document, run.request)
        texts = stream_texts(name, run, tokenizer, model.config.block_size)
        counts.append(count_document(document, texts, lag=model.config.bus_lag, capacity=model.config.bus_capacity))
    return {
        "recall": rate_dict(reference_rate(counts)),
        "references": sum(len(count.select()) for count in counts) / len(counts),
        "stated": plan_adherence(counts)["owned_stated"],
    }


def stream_texts(name: str, run: Run, tokenizer: PreTrainedTokenizerBase, block_size: int) -> list[StreamText]:
    """Sections as text, with the rounds by which their references are classified."""
    method, results = METHODS[name], run.output.streams[0]
    baseline = run.output.trace.settings.get("baseline", {})
    if method.in_order or baseline.get("points") is False:
        return [StreamText(section_text(tokenizer, s.token_ids, []).text, (0,) * k) for k, s in enumerate(results)]
    texts = []
    for result in results:
        ends = [*range(0, len(result.token_ids), block_size), len(result.token_ids)]
        blocks = result.blocks if method.parallel else list(pairwise(ends))
        texts.append(section_text(tokenizer, result.token_ids, blocks))
    return texts


def outlined_document(document: Document, request: Request) -> Document:
    """A document with the plan of an outline, where its items are the worlds'; other items are left out."""
    cues = {wording: cue.name for cue in CUES.values() for wording in cue.wordings}
    items = [
        PlanItem(f"s{number}/{cues[text]}", text, number)
        for number, line in enumerate(request.lines)
        for text in line.items
        if text in cues
    ]
    streams = [Stream(number, line.header, "", "") for number, line in enumerate(request.lines)]
    return replace(document, items=tuple(items), streams=tuple(streams))


def comparison_table(measures: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per way of answering; columns without any value are left out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "recall (95 % interval)": lambda row: show(row.get("recall")),
        "references": lambda row: scalar((row.get("recall") or {}).get("n")),
        "tokens written": lambda row: scalar(row["written"]),
        "trunk calls": lambda row: scalar(row["calls"]),
        "tokens computed": lambda row: scalar(row["positions"]),
        "seconds per answer": lambda row: scalar(row["seconds"]),
        "tokens per second, over sequential": lambda row: show(row.get("speedup")),
        "answers as sequential": lambda row: scalar(row.get("same")),
    }
    cells = {title: [cell(row) for row in measures.values()] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    rows = [[METHODS[name].label, *row] for name, *row in zip(measures, *cells.values(), strict=True)]
    note = (
        "Recall: share of repeated facts with the value that the owning section stated in an earlier, visible round. "
        "Trunk calls follow one another; tokens computed are those of all rows, prompts, drafts and padding included. "
        "Ratios: median (quartiles) over requests, each answered in all ways in turn."
    )
    return Table("Baselines", ("decoding", *cells), rows, note)
