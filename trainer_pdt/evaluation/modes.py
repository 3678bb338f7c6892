"""Ways of writing the same documents: parallel with and without the bus, sequential, with shared text.

Every mode ends in the text of each stream with the character offset at which each round ended, so that
`trainer_pdt.data.counting` counts all of them alike.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.interventions import (
    Ablate,
    GateZero,
    Intervention,
    NormScramble,
    RandomGate,
    SelfOnly,
    Swap,
    ZeroNotes,
)
from modeling_pdt.readings import ReadingRecorder

from ..data.counting import StreamText
from ..data.schema import Document
from ..data.worlds_parser import parse_section
from ..render import render_header, render_outline, render_prompt, render_request

# Interventions of the parallel modes; a mode starts from the trained model with the bus on.
PARALLEL_MODES: dict[str, Callable[[], list[Intervention]]] = {
    "pdt": lambda: [],
    "ablated": lambda: [Ablate()],
    "zero_notes": lambda: [ZeroNotes()],
    "gate_zero": lambda: [GateZero()],
    "self_only": lambda: [SelfOnly()],
    "norm_scramble": lambda: [NormScramble()],
}


@dataclass
class Written:
    """
    Documents as one mode wrote them.

    Args:
        texts (`list[list[StreamText]]`): Per document, per stream.
        results (`list[list[StreamResult]]`): Per document, per stream; parallel modes only.
        events (`list[list[dict]]`): Trace events per document; parallel modes only.
        readings (`list[list[dict]]`): What each block read, per document, where it was recorded.
    """

    texts: list[list[StreamText]] = field(default_factory=list)
    results: list[list[Any]] = field(default_factory=list)
    events: list[list[dict]] = field(default_factory=list)
    readings: list[list[dict]] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence["Written"]) -> "Written":
        """All documents of `parts`, in their order."""
        return cls(*([entry for part in parts for entry in getattr(part, field.name)] for field in fields(cls)))


def plan_entries(document: Document) -> list[dict]:
    """The document's plan items as `generate` takes them."""
    return [{"text": item.text, "stream": item.stream} for item in document.items]


def section_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], blocks: Sequence[tuple]) -> StreamText:
    """A section's text without EOS, with the character offset at which each of its blocks ended."""
    tokens = [token for token in token_ids if token != tokenizer.eos_token_id]
    ends = tuple(len(tokenizer.decode(tokens[:end])) for _, end in blocks)
    return StreamText(tokenizer.decode(tokens), ends)


def calibrated_gate(model: PDTForParallelDecoding) -> dict[str, Any]:
    """The commit gate as calibrated here, as options of `generate`: workers have the model as it was loaded."""
    config = model.generation_config
    return {"agreement_threshold": config.agreement_threshold, "agreement_scaling": config.agreement_scaling}


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def write_parallel(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    interventions: Sequence[Intervention] = (),
    trunk_only: bool = False,
    prompts: Sequence[str] | None = None,
    record_readings: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    max_new_tokens: int = 110,
    **options: Any,
) -> Written:
    """
    All sections of every document at the same time, at temperature 1 unless `options` say otherwise.

    Args:
        documents (`Sequence[Document]`): Whose plans are written; all with the same number of streams.
        interventions (`Sequence[Intervention]`): What is changed in what the streams read.
        trunk_only (`bool`): Adapters off: independent streams of the bare trunk.
        prompts (`Sequence[str]`, *optional*): Prompt texts in place of the documents' own.
        record_readings (`bool`): Keep what each block read, see [`~modeling_pdt.readings.ReadingRecorder`].
        options: Further arguments of `generate`.
    """
    written = Written()
    prompts = [render_prompt(document, tokenizer) for document in documents] if prompts is None else prompts
    for batch in batches(list(zip(documents, prompts, strict=True)), batch_size):
        encoded = tokenizer(
            [prompt for _, prompt in batch], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with model.disable_adapter() if trunk_only else nullcontext():
            output = model.generate(
                encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                tokenizer=tokenizer,
                num_streams=len(batch[0][0].streams),
                plan_texts=[plan_entries(document) for document, _ in batch],
                stream_prefixes=[[render_header(stream.header) for stream in doc.streams] for doc, _ in batch],
                interventions=list(interventions),
                callbacks=[ReadingRecorder()] if record_readings else [],
                seed=seed,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **options},
            )
        for index, results in enumerate(output.streams):
            written.results.append(results)
            written.texts.append([section_text(tokenizer, r.token_ids, r.blocks) for r in results])
            written.events.append([event for event in output.trace.events if event.get("prompt") == index])
            if record_readings:
                written.readings.append([entry for entry in output.trace.readings if entry["prompt"] == index])
    return written


def write_random_gate(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    rate: float,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> Written:
    """
    Documents of which a share of the blocks is withdrawn whatever they say, in every batch at other places.

    Args:
        rate (`float`): Share of blocks.
        options: Of [`write_parallel`].
    """
    parts = []
    for batch in batches(documents, batch_size):
        places = zlib.crc32(f"{seed}/{batch[0].document_id}".encode())
        options |= {"seed": seed, "batch_size": batch_size, "agreement_threshold": 0.5}
        parts.append(write_parallel(model, tokenizer, batch, interventions=[RandomGate(rate, places)], **options))
    return Written.joined(parts)


def twin_prompts(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    For each document the request of another document of its domain over the document's own outline.

    The twin's streams state the same cues about another subject, so their notes can be swapped in.
    """
    prompts = []
    for index, document in enumerate(documents):
        others = [other for other in documents if other.domain == document.domain and other is not document]
        if not others:
            raise ValueError(
                f"documents hold one of domain {document.domain!r}, a swap needs two or more of each: "
                "choose more core_documents or hard_documents."
            )
        request = others[index % len(others)].prompt
        prompts.append(render_request(request, tokenizer) + render_outline(document))
    return prompts


def write_swapped(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Document, str]],
    batch_size: int = 32,
    **options: Any,
) -> tuple[Written, Written]:
    """
    Documents and their twins side by side, each reading the other's notes; returns both, in document order.

    Args:
        pairs (`Sequence[tuple[Document, str]]`): Documents and their prompts of [`twin_prompts`].
    """
    rows: list[tuple[Document, str]] = []
    for document, twin in pairs:
        rows += [(document, render_prompt(document, tokenizer)), (document, twin)]
    own, other = Written(), Written()
    for batch in batches(rows, batch_size - batch_size % 2):
        donors = [index ^ 1 for index in range(len(batch))]
        part = write_parallel(
            model,
            tokenizer,
            [document for document, _ in batch],
            prompts=[prompt for _, prompt in batch],
            interventions=[Swap(donors)],
            batch_size=len(batch),
            **options,
        )
        for target, offset in ((own, 0), (other, 1)):
            target.texts += part.texts[offset::2]
            target.results += part.results[offset::2]
            target.events += part.events[offset::2]
    return own, other


@torch.no_grad()
def write_sequential(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    batch_size: int = 32,
    seed: int = 0,
    max_new_tokens: int = 110,
    **options: Any,
) -> Written:
    """The bare trunk writes the sections one after another, each with all earlier ones in its context."""
    written = Written()
    for batch in batches(documents, batch_size):
        prefixes = [tokenizer(render_prompt(d, tokenizer), add_special_tokens=False)["input_ids"] for d in batch]
        texts: list[list[StreamText]] = [[] for _ in batch]
        for number in range(len(batch[0].streams)):
            headers = [render_header(document.streams[number].header) for document in batch]
            output = continue_rows(
                model, tokenizer, prefixes, headers, seed + number, max_new_tokens=max_new_tokens, **options
            )
            for index, results in enumerate(output.streams):
                tokens = results[0].token_ids
                # Everything of section k counts as round k: earlier sections are visible as a whole.
                texts[index].append(StreamText(section_text(tokenizer, tokens, []).text, (0,) * number))
                end = [] if tokens[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
                header = tokenizer(headers[index], add_special_tokens=False)["input_ids"]
                prefixes[index] = prefixes[index] + header + tokens + end
        written.texts += texts
    return written


def continue_rows(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    headers: Sequence[str],
    seed: int,
    **options: Any,
) -> Any:
    """One stream of the bare trunk per prefix, by the same loop as parallel decoding, with neither plan nor gate."""
    encoded = tokenizer.pad({"input_ids": [list(prefix) for prefix in prefixes]}, return_tensors="pt")
    with model.disable_adapter():
        return model.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            tokenizer=tokenizer,
            num_streams=1,
            stream_prefixes=[[header] for header in headers],
            seed=seed,
            plan=None,
            agreement_threshold=None,
            return_dict_in_generate=True,
            **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **options},
        )


def notes_as_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], blocks: Sequence[tuple], slots: int
) -> list[int]:
    """
    What a section says, with no more tokens per block than a block has notes: its facts, found by the parser.

    A block that completes facts is told as "cue value, cue value" in their order, of which the last `slots` tokens are
    kept, so that a value goes last; a block that completes none is told as nothing. This is the most favourable text
    of that size: a real writer would have to find the facts itself.
    """
    section = section_text(tokenizer, token_ids, blocks)
    told: list[list[str]] = [[] for _ in blocks]
    for mention in parse_section(section.text):
        told[min(section.round_of(mention.end - 1), len(blocks) - 1)].append(f"{mention.cue} {mention.value}")
    encoded = [tokenizer(" " + ", ".join(facts), add_special_tokens=False)["input_ids"] for facts in told if facts]
    return [token for tokens in encoded for token in tokens[-slots:]]


@torch.no_grad()
def write_full_text(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    block_size: int,
    batch_size: int = 32,
    seed: int = 0,
    max_new_tokens: int = 110,
    slots: int | None = None,
    **options: Any,
) -> Written:
    """
    The bare trunk writes in rounds of a block, each stream reading its siblings' text up to the round before.

    A stream's context is the prompt, every sibling's header and text so far, then its own header and text: what a bus
    could carry at most, at the price of a prefill per round.

    Args:
        block_size (`int`): Tokens of a round.
        slots (`int`, *optional*): In place of a sibling's text, [`notes_as_text`] with so many tokens per block;
            missing = the whole text.
    """
    written = Written()
    for batch in batches(documents, batch_size):
        rows = [(index, stream) for index, document in enumerate(batch) for stream in range(len(document.streams))]
        prompts = [tokenizer(render_prompt(d, tokenizer), add_special_tokens=False)["input_ids"] for d in batch]
        headers = [
            tokenizer(render_header(batch[i].streams[s].header), add_special_tokens=False)["input_ids"]
            for i, s in rows
        ]
        texts: list[list[int]] = [[] for _ in rows]
        blocks: list[list[tuple[int, int]]] = [[] for _ in rows]
        open_rows = list(range(len(rows)))
        while open_rows:
            prefixes = []
            for row in open_rows:
                index, stream = rows[row]
                prefix = list(prompts[index])
                for other, (document, sibling) in enumerate(rows):
                    if document == index and sibling != stream and texts[other]:
                        seen = (
                            texts[other]
                            if slots is None
                            else notes_as_text(tokenizer, texts[other], blocks[other], slots)
                        )
                        prefix += headers[other] + seen
                prefixes.append(prefix + headers[row] + texts[row])
            round_seed = seed + 1000 * len(blocks[open_rows[0]])
            # A row that is open has written whole blocks only, as many as every other open row.
            wanted = min(block_size, max_new_tokens - len(texts[open_rows[0]]))
            output = continue_rows(
                model, tokenizer, prefixes, [""] * len(prefixes), round_seed, max_new_tokens=wanted, **options
            )
            for row, results in zip(open_rows, output.streams, strict=True):
                start = len(texts[row])
                texts[row] = texts[row] + results[0].token_ids
                blocks[row].append((start, len(texts[row])))
            open_rows = [
                row
                for row in open_rows
                if texts[row][-1] != tokenizer.eos_token_id and len(texts[row]) < max_new_tokens
            ]
        streams = iter(range(len(rows)))
        for document in batch:
            own = [next(streams) for _ in document.streams]
            written.texts.append([section_text(tokenizer, texts[row], blocks[row]) for row in own])
    return written
