"""Counts whether sections of one answer agree on facts: every reference of every stream, classified by round.

Works on plain text plus the character offset at which each round of a stream ended, so that any decoder can be counted
the same way. Standard library only.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

from .schema import Document
from .worlds_lexicon import CUES, values_of
from .worlds_parser import Mention, parse_section

_KNOWN_VALUES = {cue.value_type: frozenset(values_of(cue.name)) for cue in CUES.values()}

Timing = Literal["feasible", "pending", "same", "late", "evicted", "never"]


@dataclass(frozen=True)
class StreamText:
    """What one stream wrote.

    Args:
        text (`str`): The section, without header and end token.
        round_ends (`tuple[int]`): Entry `r` is the character offset at which round `r` ended; empty = one round.
    """

    text: str
    round_ends: tuple[int, ...] = ()

    def round_of(self, offset: int) -> int:
        """Round in which the character at `offset` was written."""
        return bisect_right(self.round_ends, offset)


@dataclass(frozen=True)
class Reference:
    """A sibling's fact that a stream repeated.

    Args:
        stream (`int`): The stream that wrote it.
        cue (`str`), value (`str`), start (`int`): What it wrote, and where in its text.
        round (`int`): Round in which the value begins.
        source (`int`): Stream whose statement counts.
        source_value (`str`, *optional*): What that stream stated first; `None` if it never did.
        source_round (`int`, *optional*): Round in which that value was complete.
        hops (`int`): 2 if the source itself repeats a third stream's fact.
        is_link (`bool`): The stream's own linked fact, which must equal a sibling's fact under another cue.
        is_repeat (`bool`): The stream has written this cue before; such mentions need no bus and are not counted.
        timing (`str`): ``"feasible"`` stated in a visible round, ``"pending"`` in an earlier round that the lag still
            hides, ``"same"`` in the same round, ``"late"`` afterwards, ``"evicted"`` too long ago, ``"never"``.
        follows (`bool`): The value is the one of the document whose notes were swapped in.
        source_timing (`str`, *optional*): Over two hops, `timing` of what the source had to repeat, for its first
            statement: ``"feasible"`` where it could read the fact, anything else where it had to guess.
    """

    stream: int
    cue: str
    value: str
    start: int
    round: int
    source: int
    source_value: str | None
    source_round: int | None
    hops: int
    is_link: bool
    is_repeat: bool
    timing: Timing
    follows: bool = False
    source_timing: Timing | None = None

    @property
    def consistent(self) -> bool:
        """Both streams wrote the same value."""
        return self.source_value is not None and self.value == self.source_value

    @property
    def value_type(self) -> str:
        """Value type of the cue."""
        return CUES[self.cue].value_type


@dataclass(frozen=True)
class DocumentCounts:
    """Counts of one generated document.

    Args:
        document_id (`str`): Which document; clusters of the bootstrap.
        references (`tuple[Reference]`): Every mention of a fact owned by another stream, and linked own facts.
        off_plan (`int`): Mentions of cues that the plan does not have.
        valid (`int`), mentions (`int`): Mentions whose value is in the cue's pool, and all mentions.
        stated_items (`frozenset[str]`): Plan items that their owner stated.
        planned_items (`int`): Items in the plan.
        planned_references (`int`): References in the document's own text.
    """

    document_id: str
    references: tuple[Reference, ...]
    off_plan: int
    valid: int
    mentions: int
    stated_items: frozenset[str]
    planned_items: int
    planned_references: int

    def select(
        self, timing: Timing | None = None, where: Callable[[Reference], bool] | None = None
    ) -> list[Reference]:
        """References of a timing class that satisfy `where`, without repeats."""
        return [
            reference
            for reference in self.references
            if not reference.is_repeat
            and (timing is None or reference.timing == timing)
            and (where is None or where(reference))
        ]


@dataclass(frozen=True)
class Rate:
    """A share with its document-cluster bootstrap interval (95 %); all `None` when `n` is 0.

    `clusters` are the (successes, trials) that it was counted from, one pair per document, empty ones included.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    clusters: tuple[tuple[float, float], ...] = field(default=(), repr=False, compare=False)


def count_document(
    document: Document,
    texts: Sequence[StreamText],
    *,
    lag: int = 1,
    capacity: int = 16,
    swapped_values: Mapping[str, str] | None = None,
) -> DocumentCounts:
    """Counts what the streams of one document wrote.

    Args:
        document ([`Document`]): The plan that was decoded; its own texts are used for the planned counts only.
        texts (`Sequence[StreamText]`): One per stream.
        lag (`int`): A round `v` sees rounds up to `v - lag`.
        capacity (`int`): Rounds kept on the bus.
        swapped_values (`Mapping[str, str]`, *optional*): Cue -> value of the document whose notes were shown.
    """
    if len(texts) != len(document.streams):
        raise ValueError(f"`texts` has {len(texts)} entries, must be {len(document.streams)}, one per stream.")
    owners = {_cue_of(item.item_id): item.stream for item in document.items}
    parsed = [parse_section(text.text) for text in texts]
    first = _first_statements(parsed, owners)
    references, off_plan = [], 0
    for stream, mentions in enumerate(parsed):
        seen: set[str] = set()
        for mention in mentions:
            if mention.cue not in owners:
                off_plan += 1
                continue
            source_cue = _source_cue(mention.cue, stream, owners)
            if source_cue is None:
                continue
            references.append(
                _reference(mention, stream, source_cue, owners, first, texts, lag, capacity, swapped_values, seen)
            )
            seen.add(mention.cue)
    every = [mention for mentions in parsed for mention in mentions]
    items = {_cue_of(item.item_id): item.item_id for item in document.items}
    return DocumentCounts(
        document_id=document.document_id,
        references=tuple(references),
        off_plan=off_plan,
        valid=sum(is_known_value(mention.cue, mention.value) for mention in every),
        mentions=len(every),
        stated_items=frozenset(items[cue] for cue in first),
        planned_items=len(document.items),
        planned_references=sum(span.kind == "sibling" for stream in document.streams for span in stream.spans),
    )


def is_known_value(cue: str, value: str) -> bool:
    """Whether the worlds can give this value to this cue."""
    return value in _KNOWN_VALUES[CUES[cue].value_type]


def bootstrap_rate(
    clusters: Iterable[tuple[int, int]], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Rate:
    """
    Share of successes over (successes, trials) pairs, one per document, with a cluster bootstrap interval.

    Where it is a ratio of two counts, a document may have successes without trials.
    """
    every = tuple(clusters)
    pairs = [pair for pair in every if any(pair)]
    trials = sum(total for _, total in pairs)
    if not trials:
        return Rate(None, None, None, 0, every)
    rng, rates = random.Random(seed), []
    for _ in range(resamples):
        sample = rng.choices(pairs, k=len(pairs))
        if tried := sum(total for _, total in sample):
            rates.append(sum(hit for hit, _ in sample) / tried)
    rates.sort()
    tail, drawn = (1 - level) / 2, len(rates)
    low, high = rates[int(tail * drawn)], rates[min(int((1 - tail) * drawn), drawn - 1)]
    return Rate(sum(hit for hit, _ in pairs) / trials, low, high, trials, every)


def wilson_rate(successes: int, trials: int, level: float = 0.95) -> Rate:
    """Share of successes among independent trials with Wilson's interval, which is honest at 0 and 1 too."""
    if not trials:
        return Rate(None, None, None, 0)
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return Rate(share, max(0.0, middle - spread), min(1.0, middle + spread), trials)


def reference_rate(
    counts: Iterable[DocumentCounts],
    timing: Timing | None = "feasible",
    where: Callable[[Reference], bool] | None = None,
    success: Callable[[Reference], bool] = lambda reference: reference.consistent,
    resamples: int = 1000,
) -> Rate:
    """Share of selected references that satisfy `success`; with `timing=None` all whose source stated the fact."""
    pairs = []
    for count in counts:
        chosen = [entry for entry in count.select(timing, where) if timing or entry.timing != "never"]
        pairs.append((sum(success(entry) for entry in chosen), len(chosen)))
    return bootstrap_rate(pairs, resamples)


def _cue_of(item_id: str) -> str:
    return item_id.split("/", 1)[1]


def _first_statements(parsed: Sequence[list[Mention]], owners: Mapping[str, int]) -> dict[str, Mention]:
    """Cue -> the owner's first statement of it."""
    first: dict[str, Mention] = {}
    for stream, mentions in enumerate(parsed):
        for mention in mentions:
            if owners.get(mention.cue) == stream:
                first.setdefault(mention.cue, mention)
    return first


def _source_cue(cue: str, stream: int, owners: Mapping[str, int]) -> str | None:
    """Cue of the statement that a mention must equal; `None` for a fact the stream chooses itself."""
    if owners[cue] != stream:
        return cue
    source = CUES[cue].source
    return source if source is not None and owners.get(source, stream) != stream else None


def _reference(
    mention: Mention,
    stream: int,
    source_cue: str,
    owners: Mapping[str, int],
    first: Mapping[str, Mention],
    texts: Sequence[StreamText],
    lag: int,
    capacity: int,
    swapped_values: Mapping[str, str] | None,
    seen: set[str],
) -> Reference:
    source = owners[source_cue]
    statement = first.get(source_cue)
    round_read = texts[stream].round_of(mention.start)
    source_round = _round_of_statement(source_cue, owners, first, texts)
    linked_cue = _source_cue(source_cue, source, owners) if source_cue == mention.cue else None
    source_timing = None
    if linked_cue is not None and statement is not None:
        linked_round = _round_of_statement(linked_cue, owners, first, texts)
        source_timing = _timing(texts[source].round_of(statement.start), linked_round, lag, capacity)
    return Reference(
        stream=stream,
        cue=mention.cue,
        value=mention.value,
        start=mention.start,
        round=round_read,
        source=source,
        source_value=statement.value if statement else None,
        source_round=source_round,
        hops=1 if linked_cue is None else 2,
        is_link=source_cue != mention.cue,
        is_repeat=mention.cue in seen,
        timing=_timing(round_read, source_round, lag, capacity),
        follows=swapped_values is not None and swapped_values.get(source_cue) == mention.value,
        source_timing=source_timing,
    )


def _round_of_statement(
    cue: str, owners: Mapping[str, int], first: Mapping[str, Mention], texts: Sequence[StreamText]
) -> int | None:
    """Round in which the owner's first statement of a fact was complete; `None` if it never stated it."""
    return texts[owners[cue]].round_of(first[cue].end - 1) if cue in first else None


def _timing(round_read: int, source_round: int | None, lag: int, capacity: int) -> Timing:
    if source_round is None:
        return "never"
    if source_round > round_read:
        return "late"
    if source_round <= round_read - lag - capacity:
        return "evicted"
    if source_round <= round_read - lag:
        return "feasible"
    return "same" if source_round == round_read else "pending"
