"""Documents as token ids: what depends on a tokenizer, but neither on the block protocol nor on a batch.

A document gives two views of its sections. ``clean`` is the text as written; in ``corrupted`` some repeated facts
carry another value, and those tokens are marked. Places are token indices of a section, so block size and lag stay
free.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_pdt.plan import plan_bucket

from .arguments import DataArguments, check_whole
from .data.publish import DOCUMENT_FEATURES, document_from_row, load_published
from .data.schema import Document, Fact
from .data.worlds import WorldOptions, generate_document
from .render import render_header, render_outline, render_request
from .token_places import item_tokens, mark_tokens, source_places, token_range, told_tokens
from .variants import collect_items, contrary_fact, contrary_items, render_fact

VALUE_DOCUMENTS = 500
"""Documents from which values (procedural ones) and plan items for contradictions are collected."""

MAX_KNOWN_TEXTS = 50_000

FEATURE_LAYOUT = 2
"""Changes with what [`FeatureMaker`] makes: `datasets` keeps features on disk, by their maker."""


def collect_values(documents: Iterable[Document]) -> dict[str, tuple[str, ...]]:
    """Values that documents state, by cue: the pool from which contradictions are planted."""
    values: dict[str, set[str]] = {}
    for document in documents:
        for span in (span for stream in document.streams for span in stream.spans):
            values.setdefault(span.cue, set()).add(span.value)
    return {cue: tuple(sorted(found)) for cue, found in sorted(values.items())}


def plant_contradictions(
    document: Document, values: Mapping[str, Sequence[str]], rate: float, rng: random.Random
) -> tuple[Document, set[tuple[int, int]]]:
    """
    The document with some repeated facts replaced by another value of the same cue.

    Args:
        document ([`Document`]): The document as written.
        values (`Mapping[str, Sequence[str]]`): Values by cue, from other documents.
        rate (`float`): Share of repeated facts that are replaced; above 0 at least one is, if there is one.
        rng (`random.Random`): Source of randomness.

    Returns:
        The new document, and (stream, number of the span) of every replaced value.
    """
    places = [
        (stream.stream_id, number)
        for stream in document.streams
        for number, span in enumerate(stream.spans)
        if span.kind == "sibling" and any(value != span.value for value in values.get(span.cue, ()))
    ]
    chosen = {place for place in places if rng.random() < rate}
    if rate > 0 and places and not chosen:
        chosen = {rng.choice(places)}
    streams = []
    for stream in document.streams:
        replaced = {}
        for number in sorted(number for index, number in chosen if index == stream.stream_id):
            span = stream.spans[number]
            replaced[number] = rng.choice([value for value in values[span.cue] if value != span.value])
        streams.append(stream.with_values(replaced))
    return replace(document, streams=tuple(streams)), chosen


@dataclass
class FeatureMaker:
    """
    Makes the features of one document; a callable for `datasets.map` as well as for a lazy dataset.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer (offsets are needed).
        num_plan_slots (`int`), plan_vocab_size (`int`), plan_hash_salt (`str`): Of the model's configurations.
        values (`Mapping[str, Sequence[str]]`, *optional*): Values by cue for contradictions, see [`collect_values`].
        corruption_rate (`float`, *optional*, defaults to 0.5): Share of repeated facts that the corrupted view
            replaces.
        seed (`int`, *optional*, defaults to 0): Seed of contradictions and of the choice of noisy notes.
        items (`Mapping[str, Sequence[str]]`, *optional*): Texts of plan items for contradictions, see
            [`collect_items`].
    """

    tokenizer: PreTrainedTokenizerBase
    num_plan_slots: int
    plan_vocab_size: int
    plan_hash_salt: str
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    corruption_rate: float = 0.5
    seed: int = 0
    items: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _known: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(f"tokenizer is a {type(self.tokenizer).__name__}, must be a fast one (with offsets).")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer.eos_token_id is None, must be the token that ends a section.")

    def __call__(self, document: Document | Mapping[str, Any]) -> dict[str, Any]:
        """
        Features of a document, or of a dataset row that holds one.

        Returns:
            `dict` with `document_id`, `request_ids`, `outline_ids`, `header_ids` `[streams][*]`, `item_ids`
            `[items][*]`, `contrary_item_ids` alike (no tokens without a pool), `item_streams` `[items]`, `plan_slots`
            `[num_plan_slots]` (0 = no item), and the views `clean` and `corrupted`, see [`FeatureMaker.view`].
        """
        if not isinstance(document, Document):
            document = document_from_row(document)
        rng = random.Random(f"{self.seed}/{document.document_id}")
        corrupted, planted = plant_contradictions(document, self.values, self.corruption_rate, rng)
        variant = rng.random()
        texts = [render_request(document.prompt, self.tokenizer), render_outline(document)]
        texts += [render_header(stream.header) for stream in document.streams]
        texts += [item.text for item in document.items]
        texts += contrary_items(document, self.items, random.Random(f"{self.seed}/{document.document_id}/items"))
        ids = self._encode(texts)
        streams, first = len(document.streams), 2 + len(document.streams)
        slots = [
            plan_bucket(item.text, item.stream, self.plan_hash_salt, self.plan_vocab_size) for item in document.items
        ][: self.num_plan_slots]
        clean = self.view(document, document, set(), variant)
        return {
            "document_id": document.document_id,
            "request_ids": ids[0],
            "outline_ids": ids[1],
            "header_ids": ids[2 : 2 + streams],
            "item_ids": ids[first : first + len(document.items)],
            "contrary_item_ids": ids[first + len(document.items) :],
            "item_streams": [item.stream for item in document.items],
            "plan_slots": slots + [0] * (self.num_plan_slots - len(slots)),
            "clean": clean,
            "corrupted": self.view(corrupted, document, planted, variant) if planted else clean,
        }

    def view(
        self, document: Document, original: Document, planted: set[tuple[int, int]], variant: float
    ) -> dict[str, list]:
        """
        Sections of one view.

        Args:
            document ([`Document`]): The text of this view.
            original ([`Document`]): The text as written, which tells where repeated facts come from.
            planted (`set[tuple[int, int]]`): Replaced values as (stream, number of the span).
            variant (`float`): In 0..1, chooses among the noisy notes.

        Returns:
            `dict` of lists by stream: `section_ids` (with EOS), `reference` (number of the repeated fact that a token
            belongs to, -1 for none), `own` (token of an own value), `told_token` (for a token of an own value's first
            statement, last token of the first sibling's statement of it, -1 = none), `planted` (token of a replaced
            value), per repeated fact `source_stream`, `source_token` (last token of its first statement, -1 = never),
            `contradicts`, `disputable` (its source's contradicting note has another value) and `ready` (of the data,
            -1 = no label), per fact of the true, contradicting and noisy notes `fact_ids`, `contrary_ids`,
            `fact_token`, `noisy_ids`, `paraphrase_ids` (the noisy ones in other words), `noisy_token`; and by plan
            item `item_token` (last token of the owner's statement, -1 = never, -2 = the data does not say).
        """
        encodings = self.tokenizer(
            [stream.text for stream in document.streams], add_special_tokens=False, return_offsets_mapping=True
        )
        offsets = encodings["offset_mapping"]
        ranges = [
            [token_range(offsets[stream.stream_id], span.start, span.end) for span in stream.spans]
            for stream in document.streams
        ]
        view: dict[str, list] = {key: [] for key in ("section_ids", "reference", "own", "planted")}
        for stream, ids in zip(document.streams, encodings["input_ids"], strict=True):
            number = stream.stream_id
            view["section_ids"].append([*ids, self.tokenizer.eos_token_id])
            marks = mark_tokens(len(ids) + 1, stream, ranges[number], {n for s, n in planted if s == number})
            for key, values in marks.items():
                view[key].append(values)
        view["told_token"] = told_tokens(document, ranges, [len(ids) for ids in view["section_ids"]])
        view |= source_places(document, original, ranges, planted, self.values)
        view["item_token"] = item_tokens(document, ranges)
        return view | self._notes(document, planted, offsets, variant)

    def _notes(
        self, document: Document, planted: set[tuple[int, int]], offsets: list, variant: float
    ) -> dict[str, list]:
        """Facts of true, contradicting and noisy notes by stream, with the token that ends their evidence."""
        rng = random.Random(f"{self.seed}/{document.document_id}/notes")
        chosen: dict[str, list[Sequence[Fact]]] = {"fact": [], "contrary": [], "noisy": []}
        for stream in document.streams:
            told = [span for place, span in enumerate(stream.spans) if (stream.stream_id, place) not in planted]
            facts = [Fact("", span.cue, span.value, span.start, span.end) for span in told]
            noisy: Sequence[Fact] = facts
            if stream.noisy_notes and not any(index == stream.stream_id for index, _ in planted):
                noisy = stream.noisy_notes[int(variant * len(stream.noisy_notes))].facts
            pairs = zip(facts, told, strict=True)
            chosen["fact"].append(facts)
            chosen["contrary"].append([contrary_fact(f, stream.stream_id, s, self.values, rng) for f, s in pairs])
            chosen["noisy"].append(noisy)
        texts = {name: [[render_fact(f) for f in facts] for facts in streams] for name, streams in chosen.items()}
        texts["paraphrase"] = [[render_fact(fact, rng) for fact in facts] for facts in chosen["noisy"]]
        flat = [text for streams in texts.values() for group in streams for text in group]
        ids = iter(self._encode(flat))
        notes: dict[str, list] = {
            f"{name}_ids": [[next(ids) for _ in group] for group in streams] for name, streams in texts.items()
        }
        for name in ("fact", "noisy"):
            notes[f"{name}_token"] = [
                [token_range(ends, fact.start, fact.end)[1] - 1 for fact in facts]
                for facts, ends in zip(chosen[name], offsets, strict=True)
            ]
        return notes

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of short texts; headers, plan items and facts recur, so they are remembered."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            if len(self._known) > MAX_KNOWN_TEXTS:
                self._known.clear()
                new = list(dict.fromkeys(texts))
            self._known.update(zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        return [self._known[text] for text in texts]

    def __getstate__(self) -> dict[str, Any]:
        """
        Without what it remembers, so that `datasets` sees the same maker before and after its use, and with what its
        features are, so that it does not take those of another release for them.
        """
        return {**self.__dict__, "_known": {}, "_layout": FEATURE_LAYOUT}


def load_features(data: DataArguments, maker: FeatureMaker, seed: int) -> tuple[Any, Any]:
    """
    Training and validation features: of a published dataset, or of procedural worlds made while training.

    Args:
        data ([`DataArguments`]): Where documents come from, and how many; see [`DataArguments.for_streams`].
        maker ([`FeatureMaker`]): Makes the features; its pools are filled here.
        seed (`int`): Seed of the worlds.
    """
    if data.dataset_path is None:
        check_whole("document_streams", data.document_streams, 2, 6)
        options = WorldOptions(data.document_streams, seed=seed)
        kinds = (False, True) if data.hard_fraction else (False,)
        pool = [
            generate_document("train", index, replace(options, hard=hard), with_notes=False)
            for hard in kinds
            for index in range(VALUE_DOCUMENTS)
        ]
        maker.values, maker.items = collect_values(pool), collect_items(pool)
        shares = data.hard_fraction, data.foreign_fraction
        train = WorldFeatures("train", data.train_documents, maker, options, *shares)
        return train, WorldFeatures("validation", data.eval_documents, maker, options, data.hard_fraction)
    splits = load_published(data.dataset_path)
    counts = {"train": data.train_documents, "validation": data.eval_documents}
    missing = sorted(counts.keys() - splits.keys())
    if missing:
        raise ValueError(f"dataset_path={data.dataset_path!r} lacks the splits {missing}, it has {sorted(splits)}.")
    missing = sorted(DOCUMENT_FEATURES.keys() - splits["train"].column_names)
    if missing:
        raise ValueError(
            f"dataset_path={data.dataset_path!r} lacks the columns {missing} of a dataset that was built."
        )
    parts = [splits[name].select(range(min(count, len(splits[name])))) for name, count in counts.items()]
    maker.values = collect_values(document_from_row(row) for row in parts[0])
    maker.items = collect_items(document_from_row(row) for row in islice(parts[0], VALUE_DOCUMENTS))
    workers = data.feature_workers if data.feature_workers > 1 else None
    return tuple(part.map(maker, remove_columns=part.column_names, num_proc=workers) for part in parts)


class WorldFeatures(Dataset):
    """
    Features of procedural documents and the `document` itself, made when they are asked for: item `i` is document `i`
    of a split.

    Args:
        split (`str`): ``"train"``, ``"validation"`` or ``"test"``.
        count (`int`): Number of documents.
        features ([`FeatureMaker`]): Makes the features.
        options ([`WorldOptions`]): Kind of the core documents; its `hard` is overruled by `hard_fraction`.
        hard_fraction (`float`, *optional*, defaults to 0.0): Share of documents with several facts of one type, spread
            evenly.
        foreign_fraction (`float`, *optional*, defaults to 0.0): Share of core and of hard documents with values of any
            type, spread evenly.
    """

    def __init__(
        self,
        split: str,
        count: int,
        features: FeatureMaker,
        options: WorldOptions,
        hard_fraction: float = 0.0,
        foreign_fraction: float = 0.0,
    ) -> None:
        self.split, self.count, self.features, self.options = split, count, features, options
        self.hard_fraction, self.foreign_fraction = hard_fraction, foreign_fraction

    def __len__(self) -> int:
        return self.count

    def stream_counts(self) -> list[int]:
        """Number of streams of every document."""
        return [self.options.num_streams] * self.count

    def document(self, index: int) -> Document:
        """The document behind item `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}, must be 0 to {self.count - 1}.")
        before, upto = (int(number * self.hard_fraction) for number in (index, index + 1))
        place, share = (before if upto > before else index - before), self.foreign_fraction
        foreign = int((place + 1) * share) > int(place * share)
        options = replace(self.options, hard=upto > before, foreign_values=foreign)
        return generate_document(self.split, index, options)

    def __getitem__(self, index: int) -> dict[str, Any]:
        document = self.document(index)
        return {**self.features(document), "document": document}
