"""What a tiny trunk reads while it is pretrained: its tokenizer, rows of procedural worlds, and micro-batches of them.

Fact cards (``cue value`` pairs, each repeated) come first, without which a tiny trunk does not learn to copy; then
documents in sequential form and single sections in the form of a parallel stream's row, with some cards mixed in. In
between, facts get values of foreign types: with typed values alone a trunk finds what to repeat by its type, in its
first layer, where notes of other streams do not reach; what only the cue tells it has to look up in the upper ones.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data.schema import Document, Span
from .data.worlds import WorldOptions, generate_document, with_foreign_values
from .data.worlds_lexicon import (
    CUES,
    DOMAINS,
    GIVEN_NAMES,
    OPENING_FRAMES,
    OWN_FRAMES,
    POOLS,
    REFERENCE_FRAMES,
    SURNAMES,
    values_of,
)
from .render import Piece, render_prompt, render_row, render_sequential
from .trunk import IGNORE, TrunkArguments

PAD, EOS = "<pad>", "<eos>"
CARD_FORMS = ("The {c} {v}.",) * 10 + OWN_FRAMES + REFERENCE_FRAMES + OPENING_FRAMES


def train_tokenizer(vocab_size: int, seed: int = 0, num_documents: int = 5000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on documents of the trunk split and on every value of the pools."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(seed, num_documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _tokenizer_texts(seed: int, num_documents: int) -> Iterator[str]:
    rng = random.Random(seed)
    for index in range(num_documents):
        document = sample_document(rng, index, seed, p_hard=0.25)
        yield "".join(piece.text for piece in render_sequential(document))
    for value in (value for pool in (*POOLS.values(), GIVEN_NAMES, SURNAMES) for value in pool):
        yield f" {value}" * (num_documents // 15)


def sample_document(
    rng: random.Random, index: int, seed: int, p_hard: float, p_other_streams: float = 0.0
) -> Document:
    """A document of the trunk split with any values and any plan wordings."""
    num_streams = rng.choice((2, 2, 4, 4, 5, 6)) if rng.random() < p_other_streams else 3
    options = WorldOptions(num_streams, rng.random() < p_hard, None, None, seed)
    return generate_document("trunk", index, options, with_notes=False)


@dataclass
class TrunkExample:
    """One row: token ids, unshifted labels (-100 where there is no loss) and loss weights, all of length T."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def extend(self, ids: list[int], weights: list[float]) -> None:
        """Appends tokens; a weight of 0 masks the token's label."""
        self.input_ids += ids
        self.labels += [token if weight else IGNORE for token, weight in zip(ids, weights, strict=True)]
        self.weights += weights


class RowBuilder:
    """Turns documents and cards into rows of token ids with loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: TrunkArguments):
        self.tokenizer = tokenizer
        self.arguments = arguments

    def sequential(self, document: Document, rng: random.Random, p_foreign: float = 0.0) -> TrunkExample:
        """
        The whole answer in one row; values stated before in the row weigh `repeat_weight`. A share of rows has values
        of any type, which cannot be known where they are first stated: weight 0.
        """
        order = list(range(len(document.streams)))
        cut = False
        if rng.random() < self.arguments.p_permuted:
            rng.shuffle(order)
            cut = rng.random() < self.arguments.p_cut
        foreign = p_foreign > 0 and rng.random() < p_foreign
        if foreign:
            document = with_foreign_values(document, rng)
        example, seen = TrunkExample(), set()
        for piece in render_sequential(document, order):
            is_last = piece.stream == order[-1]
            self._add(example, piece, seen, rng if cut and not is_last else None, 0.0 if foreign else 1.0)
        return example

    def single(self, document: Document, stream: int) -> TrunkExample:
        """One section in the form of a parallel stream's row; siblings' facts can only be guessed here."""
        example = TrunkExample()
        for piece in render_row(document, stream):
            self._add(example, piece, None, None)
        return example

    def card(self, rng: random.Random, p_foreign: float, num_facts: int = 6, repeats: int = 3) -> TrunkExample:
        """Facts of one domain, each stated `repeats` times; a share of cards gives cues values of foreign types."""
        domain = rng.choice(DOMAINS)
        cues = [cue for section in domain.sections for cue in (*section.core, section.hard)]
        foreign = rng.random() < p_foreign
        facts = {}
        for cue in rng.sample(cues, num_facts):
            facts[cue] = rng.choice(values_of(rng.choice(list(CUES)) if foreign else cue))
        order = [cue for cue in facts for _ in range(repeats)]
        rng.shuffle(order)
        example, seen = TrunkExample(), set()
        for cue in order:
            before, after = rng.choice(CARD_FORMS).replace("{c}", cue).split("{v}")
            start, text = len(before), before + facts[cue] + after
            known = 1.0 if cue in seen else 0.0 if foreign else 0.2
            ids, in_value = self._encode(text, [(start, start + len(facts[cue]))])
            example.extend(ids, [known if inside else 0.2 for inside in in_value])
            seen.add(cue)
        example.extend([self.tokenizer.eos_token_id], [0.0])
        return example

    def _add(
        self,
        example: TrunkExample,
        piece: Piece,
        seen: set[tuple[str, str]] | None,
        cut: random.Random | None,
        own_weight: float = 1.0,
    ) -> None:
        """
        Appends a piece; `seen` collects values of the row, `cut` ends a section early and without EOS, `own_weight` is
        that of values stated for the first time.
        """
        if piece.kind != "section":
            ids = self.tokenizer.encode(piece.text, add_special_tokens=False)
            weight = self.arguments.outline_weight if piece.kind == "outline" else 0.0
            example.extend(ids, [weight] * len(ids))
            return
        repeated = [] if seen is None else [span for span in piece.spans if _is_seen(span, seen)]
        cues = [piece.text.rindex(span.cue, 0, span.start) for span in piece.spans]
        ids, in_value = self._encode(piece.text, [(span.start, span.end) for span in repeated])
        _, in_cue = self._encode(
            piece.text, [(start, start + len(span.cue)) for start, span in zip(cues, piece.spans, strict=True)]
        )
        _, in_any = self._encode(piece.text, [(span.start, span.end) for span in piece.spans])
        weights = [
            self.arguments.repeat_weight if value else own_weight if new else self.arguments.cue_weight if cue else 1.0
            for value, new, cue in zip(in_value, in_any, in_cue, strict=True)
        ]
        ids, weights = [*ids, self.tokenizer.eos_token_id], [*weights, 1.0]
        end = len(ids) if cut is None else cut.randint(1, len(ids))
        example.extend(ids[:end], weights[:end])

    def _encode(self, text: str, ranges: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids, and per token whether it overlaps one of the character ranges."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(a < end and b > start for start, end in ranges) for a, b in encoding["offset_mapping"]]
        return encoding["input_ids"], inside


def _is_seen(span: Span, seen: set[tuple[str, str]]) -> bool:
    """Whether the row has stated this fact, under the cue itself or under the linked one; remembers it."""
    cues = {span.cue, CUES[span.cue].source} | {name for name, cue in CUES.items() if cue.source == span.cue}
    found = any((cue, span.value) in seen for cue in cues if cue)
    seen.add((span.cue, span.value))
    return found


class TrunkCorpus(IterableDataset):
    """Endless micro-batches (lists of `TrunkExample`) for one process; a function of `arguments` and `seed` alone.

    Micro-batches come in pairs: two of cards in the card stage, later one of sequential rows and one of sequential
    rows, cards or single sections. From `foreign_from` to `foreign_until` many facts have values of foreign types.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: TrunkArguments, seed: int):
        self.rows = RowBuilder(tokenizer, arguments)
        self.arguments = arguments
        self.seed = seed

    def __iter__(self) -> Iterator[list[TrunkExample]]:
        arguments, rng, index = self.arguments, random.Random(self.seed), 0
        for _ in range(2 * arguments.card_steps):
            yield [self.rows.card(rng, arguments.p_foreign) for _ in range(arguments.rows_cards)]
        step = 0
        while True:
            step += 1
            foreign = arguments.foreign_from < step <= arguments.foreign_until
            p_cards = arguments.p_foreign_cards if foreign else arguments.p_foreign
            p_documents = arguments.p_foreign_documents if foreign else 0.0
            for second in (False, True):
                if second and step % arguments.card_every == 0:
                    yield [self.rows.card(rng, p_cards) for _ in range(arguments.rows_cards)]
                    continue
                single = second and step % arguments.single_every == 1
                documents = self._documents(rng, index, arguments.rows_single if single else arguments.rows_sequential)
                index += len(documents)
                yield [
                    self.rows.single(document, rng.randrange(len(document.streams)))
                    if single
                    else self.rows.sequential(document, rng, p_documents)
                    for document in documents
                ]

    def _documents(self, rng: random.Random, start: int, count: int) -> list[Document]:
        p_hard, p_other = self.arguments.p_hard, self.arguments.p_other_streams
        return [sample_document(rng, start + offset, self.seed, p_hard, p_other) for offset in range(count)]


@dataclass
class TrunkCollator:
    """Pads rows of one micro-batch on the right.

    Takes what a DataLoader of `TrunkCorpus` hands over (a list with one or more micro-batches) and returns
    `input_ids`, `attention_mask`, `labels`, `weights`, all [rows, tokens].
    """

    pad_token_id: int

    def __call__(self, batches: Iterable[list[TrunkExample]]) -> dict[str, Tensor]:
        """Tensors of all rows in `batches`."""
        rows = [row for batch in batches for row in batch]
        length = max(len(row.input_ids) for row in rows)

        def pad(values: list[Any], filler: float) -> list[Any]:
            return values + [filler] * (length - len(values))

        return {
            "input_ids": torch.tensor([pad(row.input_ids, self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
            "labels": torch.tensor([pad(row.labels, IGNORE) for row in rows]),
            "weights": torch.tensor([pad(row.weights, 0.0) for row in rows]),
        }


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> list[int]:
    """Tokens of request and outline of each document."""
    return [len(tokenizer.encode(render_prompt(document), add_special_tokens=False)) for document in documents]
