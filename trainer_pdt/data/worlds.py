"""Procedural worlds: documents about fictional subjects whose facts only one section chooses and others repeat.

A document has a request, a plan that names fact types (cues) but no values, and one short section per stream. Each
section states the facts it owns and repeats some that siblings own, so consistency between sections can be counted
exactly. Everything is a function of (seed, split, index, options). Standard library only.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .schema import Document, PlanItem, Span, Stream
from .worlds_lexicon import (
    CUES,
    DOMAINS,
    FILLERS,
    GIVEN_NAMES,
    HARD_TYPES,
    NUM_HELDOUT_VALUES,
    NUM_HELDOUT_WORDINGS,
    NUMBER_WORDS,
    OPENING_FRAMES,
    OWN_FRAMES,
    PERSON,
    POOLS,
    REFERENCE_FRAMES,
    SUBJECT_ENDS,
    SUBJECT_STARTS,
    SURNAMES,
    Domain,
    Section,
    values_of,
)
from .worlds_notes import annotate

Split = Literal["train", "validation", "test", "trunk"]
SPLITS: tuple[str, ...] = get_args(Split)

MIN_STREAMS, MAX_STREAMS = 2, 6
P_LINKED = 0.25
P_UNSTATED = 0.12
P_OPENING_REFERENCE = 0.2
P_OPENER = 0.5
P_FILLER = 0.7
P_SECOND_REFERENCE = 0.6


@dataclass(frozen=True)
class WorldOptions:
    """What kind of documents to generate.

    Args:
        num_streams (`int`): Sections per document, 2 to 6.
        hard (`bool`): Give each section a person or a year as well, so that several facts share one type.
        heldout_values (`bool`, *optional*): False draws training values, True only held-out ones, None any.
        heldout_wordings (`bool`, *optional*): The same for plan wordings.
        seed (`int`): Another seed is another benchmark.
        foreign_values (`bool`): Give every fact a value of any type, in place of its cue's; linked facts are then
            facts like all others.
    """

    num_streams: int = 3
    hard: bool = False
    heldout_values: bool | None = False
    heldout_wordings: bool | None = False
    seed: int = 0
    foreign_values: bool = False

    def __post_init__(self):
        if not MIN_STREAMS <= self.num_streams <= MAX_STREAMS:
            raise ValueError(f"`num_streams` is {self.num_streams}, must be {MIN_STREAMS} to {MAX_STREAMS}.")

    @property
    def tags(self) -> tuple[str, ...]:
        """Split tags of the documents."""
        tags = ["hard" if self.hard else "core"]
        tags += ["foreign_values"] if self.foreign_values else []
        tags += ["heldout_values"] if self.heldout_values else []
        tags += ["heldout_wordings"] if self.heldout_wordings else []
        return tuple(tags)


@dataclass
class _Fact:
    """A fact while a document is being made."""

    cue: str
    owner: int
    value: str
    stated: bool
    hops: int = 1

    @property
    def item_id(self) -> str:
        return f"s{self.owner}/{self.cue}"


def generate_documents(
    split: Split,
    start: int = 0,
    count: int | None = None,
    *,
    num_streams: int = 3,
    hard: bool = False,
    heldout_values: bool | None = False,
    heldout_wordings: bool | None = False,
    seed: int = 0,
    foreign_values: bool = False,
    with_notes: bool = True,
) -> Iterator[Document]:
    """Documents `start`, `start + 1`, ... of a split; endless without `count`.

    The options are those of `WorldOptions`. Splits never share a random stream; ``"trunk"`` is the split for
    pretraining a trunk.
    """
    options = WorldOptions(num_streams, hard, heldout_values, heldout_wordings, seed, foreign_values)
    index = start
    while count is None or index < start + count:
        yield generate_document(split, index, options, with_notes=with_notes)
        index += 1


def generate_document(
    split: Split, index: int, options: WorldOptions, *, values_variant: int = 0, with_notes: bool = True
) -> Document:
    """Document number `index` of a split.

    Args:
        split (`str`): ``"train"``, ``"validation"``, ``"test"`` or ``"trunk"``.
        index (`int`): Number of the document, from 0.
        options ([`WorldOptions`]): Kind of document.
        values_variant (`int`): 0 is the document; 1, 2, ... are twins: same request, plan and layout, but every fact
            has another value than in variant 0. Their notes serve as swapped notes.
        with_notes (`bool`): Also make notes, noisy notes, snapshots and readiness labels.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, must be one of {', '.join(SPLITS)}.")
    if index < 0 or values_variant < 0:
        raise ValueError(f"`index` and `values_variant` are {index}, {values_variant}, must be >= 0.")
    key = f"{options.seed}/{split}/{'+'.join(options.tags)}/{options.num_streams}/{index}"
    layout, values = _rng(key + "/layout"), _rng(key + "/values")
    domain = layout.choice(DOMAINS)
    subject = layout.choice(SUBJECT_STARTS) + layout.choice(SUBJECT_ENDS)
    sections, link = _choose_sections(domain, options, layout)
    facts = _choose_facts(sections, link, options, layout)
    _draw_values(facts, options, values, avoid={})
    if values_variant:
        original = {fact.cue: fact.value for fact in facts}
        _draw_values(facts, options, _rng(f"{key}/values/{values_variant}"), avoid=original)
    items = tuple(PlanItem(fact.item_id, _wording(fact.cue, options, layout), fact.owner) for fact in facts)
    streams = tuple(
        _write_stream(number, section, subject, facts, link, layout) for number, section in enumerate(sections)
    )
    document = Document(
        document_id=f"{split}-{'-'.join(options.tags)}-{options.num_streams}s-{options.seed}-{index:07d}"
        + (f"-twin{values_variant}" if values_variant else ""),
        domain=domain.name,
        split_tags=options.tags,
        prompt=layout.choice(domain.requests).format(s=subject, n=NUMBER_WORDS[options.num_streams]),
        items=items,
        streams=streams,
    )
    if options.foreign_values:
        avoid = fact_values(generate_document(split, index, options, with_notes=False)) if values_variant else {}
        rng = _rng(f"{key}/foreign/{values_variant}")
        document = with_foreign_values(without_links(document), rng, options.heldout_values, avoid)
    return annotate(document, subject, _rng(key + "/notes")) if with_notes else document


def with_foreign_values(
    document: Document,
    rng: random.Random,
    heldout_values: bool | None = None,
    avoid: Mapping[str, str] | None = None,
) -> Document:
    """
    The document with values of any type for every fact, all different, so that only the cue tells which is meant;
    linked facts stay equal. Notes stay as they are.

    Args:
        document ([`Document`]): The document as generated.
        rng (`random.Random`): Source of randomness.
        heldout_values (`bool`, *optional*): Which values to draw, see [`WorldOptions`].
        avoid (`Mapping[str, str]`, *optional*): By cue, a value that it must not get.
    """
    avoid = avoid or {}
    spans = [(span, stream.stream_id) for stream in document.streams for span in stream.spans]
    linked = {span.cue for span, stream in spans if span.kind == "sibling" and span.owner == stream}
    roots = {span.cue: CUES[span.cue].source if span.cue in linked else span.cue for span, _ in spans}
    values: dict[str, str] = {}
    for root in sorted(set(roots.values())):
        while values.get(root) in (None, avoid.get(root)) or list(values.values()).count(values[root]) > 1:
            values[root] = rng.choice(values_of(rng.choice(list(CUES)), heldout_values))
    streams = tuple(
        stream.with_values({number: values[roots[span.cue]] for number, span in enumerate(stream.spans)})
        for stream in document.streams
    )
    return replace(document, streams=streams)


def without_links(document: Document) -> Document:
    """
    The document with its linked facts as facts like all others, which their owner chooses.

    For new values that need not be equal any more: a section that decodes states a linked fact before it can read
    the other one now and then, and its siblings have to repeat what it stated.
    """

    def free(span: Span, stream: int) -> Span:
        return replace(span, kind="own" if span.owner == stream else span.kind, hops=1)

    streams = tuple(
        replace(stream, spans=tuple(free(span, stream.stream_id) for span in stream.spans))
        for stream in document.streams
    )
    return replace(document, streams=streams)


def fact_values(document: Document) -> dict[str, str]:
    """Cue -> value for every fact that some section of the document states."""
    return {span.cue: span.value for stream in document.streams for span in stream.spans}


def chance_by_cue(heldout_values: bool | None = False) -> dict[str, float]:
    """Probability that the value of a random other document for a cue matches; values are drawn uniformly."""
    return {cue: 1.0 / len(values_of(cue, heldout_values)) for cue in CUES}


def is_heldout(cue: str, value: str) -> bool | None:
    """Whether adapter training never states this value of a cue; `None` for what is no value of the cue."""
    if value not in values_of(cue):
        return None
    return value not in values_of(cue, heldout=False)


def _rng(key: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def _choose_sections(
    domain: Domain, options: WorldOptions, rng: random.Random
) -> tuple[list[Section], tuple[int, int, int] | None]:
    """Sections in order of the answer, and for two-hop documents (source, linking, reading) stream numbers."""
    kinds = list(domain.sections)
    if options.hard:
        return _choose_hard(kinds, options.num_streams, rng), None
    if options.num_streams == 2 or rng.random() >= P_LINKED:
        return rng.sample(kinds, options.num_streams), None
    linking = rng.choice([kind for kind in kinds if kind.linked])
    source = next(kind for kind in kinds if CUES[linking.linked].source in kind.core)
    others = [kind for kind in kinds if kind not in (linking, source)]
    sections = [linking, source, *rng.sample(others, options.num_streams - 2)]
    reader = sections[2]
    rng.shuffle(sections)
    return sections, (sections.index(source), sections.index(linking), sections.index(reader))


def _choose_hard(kinds: list[Section], num_streams: int, rng: random.Random) -> list[Section]:
    """Sections of which at least two own a fact of the same hard type."""
    while True:
        sections = rng.sample(kinds, num_streams)
        types = [CUES[section.hard].value_type for section in sections]
        if any(types.count(value_type) > 1 for value_type in HARD_TYPES):
            return sections


def _choose_facts(
    sections: list[Section], link: tuple[int, int, int] | None, options: WorldOptions, rng: random.Random
) -> list[_Fact]:
    """Facts of all sections in plan order, without values; about one in eight is planned but not stated."""
    facts = []
    for owner, section in enumerate(sections):
        cues = list(section.core)
        rng.shuffle(cues)
        if options.hard:
            cues = [cues[0], section.hard]
            rng.shuffle(cues)
        own = [_Fact(cue, owner, "", rng.random() >= P_UNSTATED) for cue in cues]
        if link and owner == link[0]:
            source = CUES[sections[link[1]].linked].source
            own.sort(key=lambda fact: fact.cue != source)
            own[0].stated = True
        if not any(fact.stated for fact in own):
            own[0].stated = True
        if link and owner == link[1]:
            own.append(_Fact(section.linked, owner, "", True, hops=2))
        facts += own
    return facts


def _draw_values(facts: list[_Fact], options: WorldOptions, rng: random.Random, avoid: dict[str, str]) -> None:
    """Gives every fact a value; within a document no two facts of one type are equal, except linked ones."""
    used: set[str] = {word for value in avoid.values() for word in value.split()}
    for fact in facts:
        if fact.hops == 1:
            fact.value = _draw_value(CUES[fact.cue].value_type, options.heldout_values, used, rng)
            used.update(fact.value.split())
    by_cue = {fact.cue: fact.value for fact in facts}
    for fact in facts:
        if fact.hops == 2:
            fact.value = by_cue[CUES[fact.cue].source]


def _draw_value(value_type: str, heldout: bool | None, used: set[str], rng: random.Random) -> str:
    pools = (GIVEN_NAMES, SURNAMES) if value_type == PERSON else (POOLS[value_type],)
    words = []
    for pool in pools:
        allowed = pool if heldout is None else pool[-NUM_HELDOUT_VALUES:] if heldout else pool[:-NUM_HELDOUT_VALUES]
        fresh = [word for word in allowed if word not in used]
        words.append(rng.choice(fresh or allowed))
    return " ".join(words)


def _wording(cue: str, options: WorldOptions, rng: random.Random) -> str:
    wordings = CUES[cue].wordings
    if options.heldout_wordings is not None:
        split = len(wordings) - NUM_HELDOUT_WORDINGS
        wordings = wordings[split:] if options.heldout_wordings else wordings[:split]
    return rng.choice(wordings)


def _write_stream(
    number: int,
    section: Section,
    subject: str,
    facts: list[_Fact],
    link: tuple[int, int, int] | None,
    rng: random.Random,
) -> Stream:
    """One section: perhaps an opening reference, own facts, references to siblings' facts at the end."""
    own = [fact for fact in facts if fact.owner == number and fact.stated]
    others = [fact for fact in facts if fact.owner != number and fact.stated]
    readable = [fact for fact in others if fact.hops == 1]
    rng.shuffle(readable)
    last = [fact for fact in others if fact.hops == 2] if link and number == link[2] else []
    sentences: list[tuple[str, _Fact | None]] = []
    if readable and rng.random() < P_OPENING_REFERENCE:
        sentences.append((rng.choice(OPENING_FRAMES), readable.pop()))
    elif rng.random() < P_OPENER:
        sentences.append((rng.choice(section.openers), None))
    sentences += zip(rng.sample(OWN_FRAMES, len(own)), own, strict=True)
    if rng.random() < P_FILLER:
        sentences.append((rng.choice(FILLERS), None))
    wanted = 1 + (rng.random() < P_SECOND_REFERENCE) - len(last)
    references = readable[: max(wanted, 0)] + last
    sentences += zip(rng.sample(REFERENCE_FRAMES, len(references)), references, strict=True)
    text, spans = _join(sentences, subject, number)
    cues = " and ".join(fact.cue for fact in facts if fact.owner == number)
    summary = f"{section.header} of {subject}: {cues}."
    return Stream(stream_id=number, header=section.header, summary=summary, text=text, spans=spans)


def _join(sentences: list[tuple[str, "_Fact | None"]], subject: str, number: int) -> tuple[str, tuple[Span, ...]]:
    """The text of a section and the character ranges of its values."""
    text, spans = "", []
    for frame, fact in sentences:
        text += " " if text else ""
        if fact is None:
            text += frame.format(s=subject)
            continue
        before, after = frame.replace("{c}", fact.cue).split("{v}")
        start = len(text) + len(before)
        text += before + fact.value + after
        repeated = fact.owner != number or fact.hops == 2
        hops = fact.hops if fact.owner != number else 1
        spans.append(
            Span(
                start=start,
                end=start + len(fact.value),
                kind="sibling" if repeated else "own",
                cue=fact.cue,
                value=fact.value,
                item_id=fact.item_id,
                owner=fact.owner,
                hops=hops,
            )
        )
    return text, tuple(spans)
