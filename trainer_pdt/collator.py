"""Features of documents as one batch of adjacent rows; the only place where a batch is a dictionary.

Letters: B documents, S streams, R = B * S rows, T tokens, V rounds, P plan items, L tokens of a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTConfig

from .losses import IGNORE_INDEX
from .token_places import UNKNOWN

NO_SOURCE = -1
SOURCE_NEVER = 1 << 20
"""Round of a fact that no sibling states: later than any round."""

NOTES = (("note", "fact", "fact"), ("noisy_note", "noisy", "noisy"))
"""Notes of a batch: name, and the features that hold the facts and their places."""

NOTE_VARIANTS = (("paraphrased_note", "paraphrase", "noisy"), ("contrary_note", "contrary", "fact"))
"""The same of their other renderings."""


@dataclass
class PDTDataCollator:
    """
    Rows of documents: request, outline, header, section, EOS. Rows of one document are adjacent.

    A token's label is the token itself. `write_round` is the round of the section token that a position consumes,
    `read_round` the round of the token it predicts: header positions predict for round 0, the last token of a section
    predicts nothing and keeps its own round, prompt and padding have -1 and no stream.

    Args:
        pad_token_id (`int`): Token of padding.
        block_size (`int`), bus_capacity (`int`), num_streams (`int`): Of the model's configurations; `num_streams` is
            the number of stream adapters, which further streams reuse in turn.
        padding_side (`str`, *optional*, defaults to `"both"`): ``"left"``, ``"right"``, or ``"both"``: prompts on the
            left and what follows on the right, so that all prompts end in one column and siblings can share theirs.
        with_corrupted (`bool`, *optional*, defaults to `False`): Add the corrupted view as `corrupted`.
        with_text_teacher (`bool`, *optional*, defaults to `False`): Add rows in which the siblings' sections precede
            the own one, as `text_input_ids`, `text_attention_mask` and `text_labels`.
        with_variants (`bool`, *optional*, defaults to `False`): Add notes in other words and with other values, plan
            items of other documents, and the data's readiness labels.
        max_row_tokens (`int`, *optional*): Longest row allowed.
    """

    pad_token_id: int
    block_size: int
    bus_capacity: int
    num_streams: int
    padding_side: str = "both"
    with_corrupted: bool = False
    with_text_teacher: bool = False
    with_variants: bool = False
    max_row_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right", "both"):
            raise ValueError(f"padding_side is {self.padding_side!r}, must be 'left', 'right' or 'both'.")

    @classmethod
    def from_config(cls, config: PDTConfig, tokenizer: PreTrainedTokenizerBase, **choices: Any) -> "PDTDataCollator":
        """A collator for a model's configuration; padding falls back to EOS where the tokenizer has no pad token."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(pad, config.block_size, config.bus_capacity, config.num_streams, **choices)

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            documents (`Sequence[Mapping]`): From `FeatureMaker`, all with the same number of streams.

        Returns:
            `dict[str, Tensor]`:

            - `input_ids`, `attention_mask`, `position_ids`, `labels`, `stream_ids`, `write_round`, `read_round`,
              `block_offset`, `own_mask`, `prompt_mask`, `planner_mask` (the request), `reference` (number of the
              repeated fact, -1 = none) and `source_round` (round that completed the fact at its source, or for an
              owner's first statement the sibling's that told it in an earlier round; -1 = no repeated fact) `[R, T]`,
              the last two and `own_mask` aligned with `labels`;
            - `item_ids`, `item_mask` `[B, P, L]`, `plan_slots` `[B, slots]`;
            - `coverage_targets`, `coverage_mask` `[R, V, P]`: own items stated by the end of each round;
            - `note_ids`, `note_mask`, `noisy_note_ids`, `noisy_note_mask` `[R, V, L]`;
            - `contradicts`, `judgeable`, `block_exists` `[R, V]`: judgeable blocks hold a repeated fact that its
              source states in a visible or in the same round;
            - if asked for, `paraphrased_note_ids`, `paraphrased_note_mask` (the noisy notes in other words),
              `contrary_note_ids`, `contrary_note_mask` `[R, V, L]`, `contrary_item_ids`, `contrary_item_mask`
              `[B, P, L]`, and aligned with `labels` `disputed_row` (row whose contrary notes tell the repeated fact
              with another value, -1 = none) and `ready` (1, 0, -1 = no label) `[R, T]`;
            - `corrupted`: the same for the corrupted view, if asked for.
        """
        streams = {len(document["header_ids"]) for document in documents}
        if len(streams) != 1:
            raise ValueError(f"documents of one batch must have one number of streams, got {sorted(streams)}.")
        for document in documents:
            self.check_rows(document)
        batch = self._view(documents, "clean")
        if self.with_corrupted:
            batch["corrupted"] = self._view(documents, "corrupted")
        return batch

    def check_rows(self, document: Mapping[str, Any]) -> None:
        """Raises a `ValueError` where a row of a document has more than `max_row_tokens`."""
        if self.max_row_tokens is None:
            return
        prompt = len(document["request_ids"]) + len(document["outline_ids"])
        for view in ("clean", "corrupted") if self.with_corrupted else ("clean",):
            for header, section in zip(document["header_ids"], document[view]["section_ids"], strict=True):
                length = prompt + len(header) + len(section)
                if length > self.max_row_tokens:
                    raise ValueError(
                        f"document {document['document_id']}: a row has {length} tokens, allowed: max_row_tokens = "
                        f"{self.max_row_tokens}."
                    )

    def _view(self, documents: Sequence[Mapping[str, Any]], name: str) -> dict[str, Tensor]:
        views = [document[name] for document in documents]
        rows = [
            self._row(document, view, stream)
            for document, view in zip(documents, views, strict=True)
            for stream in range(len(document["header_ids"]))
        ]
        rounds = max(-(-len(section) // self.block_size) for view in views for section in view["section_ids"])
        batch = self._pad_rows(rows, [sum(row["prompt_mask"]) for row in rows])
        if self.with_variants:
            streams = len(rows) // len(documents)
            first_R1 = torch.arange(len(rows))[:, None] // streams * streams
            batch["disputed_row"] = torch.where(batch["disputed_row"] >= 0, batch["disputed_row"] + first_R1, -1)
        batch |= self._items(documents)
        batch |= self._blocks(documents, views, rounds)
        if self.with_text_teacher:
            batch |= self._text_rows(documents, views)
        return batch

    def _row(self, document: Mapping[str, Any], view: Mapping[str, Any], stream: int) -> dict[str, list]:
        section, header = view["section_ids"][stream], document["header_ids"][stream]
        request, outline = len(document["request_ids"]), len(document["outline_ids"])
        prompt, length, opening = request + outline, len(section), request + outline + len(header)
        size = self.block_size
        ids = [*document["request_ids"], *document["outline_ids"], *header, *section]
        written = [token // size for token in range(length)]
        adapter = stream % self.num_streams
        row = {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "position_ids": list(range(len(ids))),
            "labels": [IGNORE_INDEX] * opening + _labels(view, stream),
            "stream_ids": [-1] * prompt + [adapter] * (len(ids) - prompt),
            "write_round": [-1] * opening + written,
            "read_round": [-1] * prompt + [0] * len(header) + written[1:] + written[-1:],
            "block_offset": [-1] * opening + [token % size for token in range(length)],
            "own_mask": [0] * opening + [int(own) for own in view["own"][stream]],
            "prompt_mask": [1] * prompt + [0] * (len(ids) - prompt),
            "planner_mask": [1] * request + [0] * (len(ids) - request),
            "reference": [-1] * opening + list(view["reference"][stream]),
            "source_round": [NO_SOURCE] * opening + self._source_rounds(view, stream),
        }
        return row | _variants(view, stream, opening) if self.with_variants else row

    def _source_rounds(self, view: Mapping[str, Any], stream: int) -> list[int]:
        """By token the round that completed its fact at a sibling; owners repeat what one told in an earlier round."""
        size = self.block_size
        sources = [token // size if token >= 0 else SOURCE_NEVER for token in view["source_token"][stream]]
        rounds = [sources[number] if number >= 0 else NO_SOURCE for number in view["reference"][stream]]
        for token, told in enumerate(view["told_token"][stream]):
            if told >= 0 and told // size < token // size:
                rounds[token] = told // size
        return rounds

    def _pad_rows(self, rows: list[dict[str, list]], prompts: list[int]) -> dict[str, Tensor]:
        """Rows of one length; `prompts` are the lengths of their prompts."""
        fillers = {
            "input_ids": self.pad_token_id,
            "labels": IGNORE_INDEX,
            **dict.fromkeys(("attention_mask", "position_ids", "own_mask", "prompt_mask", "planner_mask"), 0),
        }
        lengths = [len(row["input_ids"]) for row in rows]
        if self.padding_side == "both":
            lefts = [max(prompts) - prompt for prompt in prompts]
        else:
            lefts = [max(lengths) - length if self.padding_side == "left" else 0 for length in lengths]
        total = max(left + length for left, length in zip(lefts, lengths, strict=True))
        batch = {}
        for key in rows[0]:
            filler = [fillers.get(key, -1)]
            padded = [
                filler * left + row[key] + filler * (total - left - len(row[key]))
                for left, row in zip(lefts, rows, strict=True)
            ]
            batch[key] = torch.from_numpy(np.array(padded, dtype=np.int64))
        for key in batch.keys() & {"own_mask", "prompt_mask", "planner_mask"}:
            batch[key] = batch[key].bool()
        return batch

    def _items(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {"plan_slots": torch.tensor([document["plan_slots"] for document in documents])}
        for name in ("item", "contrary_item") if self.with_variants else ("item",):
            ids, mask = self._texts([document[f"{name}_ids"] for document in documents])
            batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return batch

    def _texts(self, texts: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
        """Right-padded tokens `[M, N, L]` of M lists of up to N texts, and their mask."""
        count = max(1, max(len(group) for group in texts))
        length = max(1, max((len(text) for group in texts for text in group), default=1))
        filled = [
            [text + [self.pad_token_id] * (length - len(text)) for text in [*group, *[[]] * (count - len(group))]]
            for group in texts
        ]
        lengths = torch.tensor([[*map(len, group), *[0] * (count - len(group))] for group in texts])
        return torch.from_numpy(np.array(filled, dtype=np.int64)), torch.arange(length) < lengths[:, :, None]

    def _blocks(
        self, documents: Sequence[Mapping[str, Any]], views: list[Mapping[str, Any]], rounds: int
    ) -> dict[str, Tensor]:
        size, items = self.block_size, max(1, max(len(document["item_ids"]) for document in documents))
        rows = [
            (document, view, s)
            for document, view in zip(documents, views, strict=True)
            for s in range(len(document["header_ids"]))
        ]
        exists, judgeable, contradicts = (torch.zeros(len(rows), rounds, dtype=torch.bool) for _ in range(3))
        targets, covered = (torch.zeros(len(rows), rounds, items, dtype=torch.bool) for _ in range(2))
        for row, (document, view, stream) in enumerate(rows):
            exists[row, : -(-len(view["section_ids"][stream]) // size)] = True
            for token, number in enumerate(view["reference"][stream]):
                source = view["source_token"][stream][number] // size if number >= 0 else NO_SOURCE
                if source >= 0 and token // size - self.bus_capacity < source <= token // size:
                    judgeable[row, token // size] = True
                    contradicts[row, token // size] |= view["contradicts"][stream][number]
            for item, (owner, token) in enumerate(zip(document["item_streams"], view["item_token"], strict=True)):
                if owner == stream and token != UNKNOWN:
                    covered[row, :, item] = exists[row]
                    targets[row, token // size if token >= 0 else rounds :, item] = True
        batch = {
            "block_exists": exists,
            "judgeable": judgeable,
            "contradicts": contradicts,
            "coverage_targets": targets & covered,
            "coverage_mask": covered,
        }
        for name, key, place in NOTES + NOTE_VARIANTS if self.with_variants else NOTES:
            texts = [
                _texts_by_round(view[f"{key}_ids"][s], view[f"{place}_token"][s], size, rounds) for _, view, s in rows
            ]
            batch[f"{name}_ids"], batch[f"{name}_mask"] = self._texts(texts)
        return batch

    def _text_rows(self, documents: Sequence[Mapping[str, Any]], views: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows, prompts = [], []
        for document, view in zip(documents, views, strict=True):
            prompt = [*document["request_ids"], *document["outline_ids"]]
            parts = [[*h, *s] for h, s in zip(document["header_ids"], view["section_ids"], strict=True)]
            for stream, part in enumerate(parts):
                siblings = [token for other, text in enumerate(parts) if other != stream for token in text]
                ids, own = [*prompt, *siblings, *part], _labels(view, stream)
                labels = [IGNORE_INDEX] * (len(ids) - len(own)) + own
                rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
                prompts.append(len(prompt))
        return {f"text_{key}": value for key, value in self._pad_rows(rows, prompts).items()}


def _labels(view: Mapping[str, Any], stream: int) -> list[int]:
    """Labels of a section: its tokens, without those of planted values."""
    pairs = zip(view["section_ids"][stream], view["planted"][stream], strict=True)
    return [IGNORE_INDEX if planted else token for token, planted in pairs]


def _variants(view: Mapping[str, Any], stream: int, opening: int) -> dict[str, list]:
    """What a section's tokens repeat: the stream that contrary notes contradict, and the data's readiness label."""
    facts = zip(view["disputable"][stream], view["source_stream"][stream], strict=True)
    disputed = [source if disputable else -1 for disputable, source in facts]
    values = {"disputed_row": disputed, "ready": view["ready"][stream]}
    reference = view["reference"][stream]
    return {
        name: [-1] * opening + [by_fact[number] if number >= 0 else -1 for number in reference]
        for name, by_fact in values.items()
    }


def _texts_by_round(texts: list[list[int]], tokens: list[int], block_size: int, rounds: int) -> list[list[int]]:
    """Texts joined by the round in which their evidence ends."""
    joined: list[list[int]] = [[] for _ in range(rounds)]
    for text, token in zip(texts, tokens, strict=True):
        joined[min(token // block_size, rounds - 1)] += text
    return joined
