"""Evaluation of a trunk by sampling whole answers section by section, and saving it as the recipes ship it."""

import copy
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.counting import DocumentCounts, StreamText, count_document, reference_rate
from .data.schema import Document
from .data.worlds import WorldOptions, generate_document
from .data.worlds_lexicon import section_of
from .render import OUTLINE_END, OUTLINE_ITEM_SEPARATOR, render_header, render_prompt, render_request


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Samples one continuation per prefix of token ids; an EOS that was reached is the last id."""
    width = max(len(prefix) for prefix in prefixes)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prefix)) + list(prefix) for prefix in prefixes], device=model.device)
    mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes], device=model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not temperature:
        sampling = {"do_sample": False}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        **sampling,
    )
    rows = []
    for row in output[:, width:].tolist():
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows


def write_sequential(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    max_new_tokens: int = 110,
    temperature: float = 1.0,
) -> tuple[list[list[StreamText]], float]:
    """Writes the sections of each document one after another; returns the texts and the share that ended with EOS."""
    rows = [_encode(tokenizer, render_prompt(document, tokenizer)) for document in documents]
    texts: list[list[StreamText]] = [[] for _ in documents]
    finished = []
    for number in range(len(documents[0].streams)):
        for row, document in zip(rows, documents, strict=True):
            row += _encode(tokenizer, render_header(document.streams[number].header))
        for index, new in enumerate(complete(model, tokenizer, rows, max_new_tokens, temperature)):
            finished.append(new[-1] == tokenizer.eos_token_id)
            section = new[:-1] if finished[-1] else new
            rows[index] += [*section, tokenizer.eos_token_id]
            texts[index].append(StreamText(tokenizer.decode(section)))
    return texts, sum(finished) / len(finished)


def write_independent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    max_new_tokens: int = 110,
    temperature: float = 1.0,
) -> list[list[StreamText]]:
    """Writes every section from the prompt alone, so that siblings' facts can only be guessed."""
    prefixes = [
        _encode(tokenizer, render_prompt(document, tokenizer)) + _encode(tokenizer, render_header(stream.header))
        for document in documents
        for stream in document.streams
    ]
    new = iter(complete(model, tokenizer, prefixes, max_new_tokens, temperature))
    return [
        [StreamText(tokenizer.decode(next(new), skip_special_tokens=True)) for _ in document.streams]
        for document in documents
    ]


def evaluate_trunk(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_documents: int, start: int = 0
) -> dict[str, Any]:
    """Consistency and plan adherence of the trunk at temperature 1 on validation documents, per split.

    Splits: core, hard, core with held-out values and wordings; and the share of well-formed outlines it writes.
    """
    model.eval()
    kinds = {
        "core": WorldOptions(),
        "hard": WorldOptions(hard=True),
        "heldout": WorldOptions(heldout_values=True, heldout_wordings=True),
    }
    report: dict[str, Any] = {}
    for name, options in kinds.items():
        documents = [
            generate_document("validation", start + index, options, with_notes=False) for index in range(num_documents)
        ]
        texts, ended = write_sequential(model, tokenizer, documents)
        counts = [count_document(document, text) for document, text in zip(documents, texts, strict=True)]
        report[name] = summarize(counts) | {"ended": ended}
        if name == "core":
            texts = write_independent(model, tokenizer, documents)
            counts = [count_document(document, text) for document, text in zip(documents, texts, strict=True)]
            report["core_independent"] = summarize(counts)
            report["outline"] = _outline_quality(model, tokenizer, documents)
    return report


def summarize(counts: Sequence[DocumentCounts]) -> dict[str, Any]:
    """Consistency of references whose owner stated the fact, and how the texts keep to the plan."""
    consistent = reference_rate(counts, timing=None)
    mentions = max(sum(count.mentions for count in counts), 1)
    emitted = sum(len(count.select()) for count in counts)
    planned = max(sum(count.planned_references for count in counts), 1)
    return {
        "consistent": consistent.mean,
        "low": consistent.low,
        "high": consistent.high,
        "references": consistent.n,
        "on_plan": 1 - sum(count.off_plan for count in counts) / mentions,
        "valid_values": sum(count.valid for count in counts) / mentions,
        "items_stated": sum(len(count.stated_items) for count in counts)
        / max(sum(count.planned_items for count in counts), 1),
        "references_per_planned": emitted / planned,
    }


def save_trunk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes weights in bf16, configuration and tokenizer; each file replaces its old version in one step.

    The configuration keeps float32 as its dtype, so a plain `from_pretrained` computes in float32.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        small = copy.deepcopy(model).to(torch.bfloat16)
        small.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        config_file = Path(scratch, "config.json")
        config = json.loads(config_file.read_text())
        config |= {"dtype": "float32", "use_cache": True}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            os.replace(file, target / file.name)


def _outline_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> dict[str, float]:
    """Share of outlines, written from the bare request, with the right number of known, distinct headings."""
    prefixes = [_encode(tokenizer, render_request(document.prompt, tokenizer)) for document in documents]
    good, items = 0, 0
    for document, new in zip(documents, complete(model, tokenizer, prefixes, 70), strict=True):
        lines = re.findall(r"(?m)^(\d)\. ([^:\n]+): ([^\n]+)$", tokenizer.decode(new).split("\n" + OUTLINE_END)[0])
        headers = [header for _, header, _ in lines]
        items += sum(len(texts.split(OUTLINE_ITEM_SEPARATOR)) for *_, texts in lines)
        good += len(set(headers)) == len(document.streams) and all(_is_known(header) for header in headers)
    return {"well_formed": good / len(documents), "items_per_outline": items / len(documents)}


def _is_known(header: str) -> bool:
    try:
        section_of(header)
    except ValueError:
        return False
    return True


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
