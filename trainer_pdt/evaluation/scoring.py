"""Numbers from written documents: recall by class, swapped facts, coverage, rollback, plan adherence."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..data.counting import (
    DocumentCounts,
    Rate,
    Reference,
    StreamText,
    bootstrap_rate,
    count_document,
    reference_rate,
)
from ..data.schema import Document
from ..data.worlds import chance_by_cue, is_heldout
from ..data.worlds_parser import parse_section

TIMINGS = ("feasible", "pending", "same", "late", "evicted", "never")
KNOWN_TIMINGS = ("feasible", "pending", "same")
"""Timings of references that the commit gate can know to be wrong: the fact was stated by the end of the round."""


def rate_dict(rate: Rate) -> dict[str, Any]:
    """`{mean, low, high, n}` and, where it was counted by document, its `clusters`."""
    entry = asdict(rate)
    return entry if rate.clusters else {name: value for name, value in entry.items() if name != "clusters"}


def count_written(
    documents: Sequence[Document], texts: Sequence[Sequence[StreamText]], lag: int, capacity: int
) -> list[DocumentCounts]:
    """Counts of every document under one bus lag and capacity."""
    return [
        count_document(document, list(text), lag=lag, capacity=capacity)
        for document, text in zip(documents, texts, strict=True)
    ]


def reference_classes(counts: Sequence[DocumentCounts]) -> dict[str, dict[str, Any]]:
    """Share of consistent references by timing class, and under `any` of all whose owner states the fact."""
    classes = {timing: rate_dict(reference_rate(counts, timing)) for timing in TIMINGS}
    return {**classes, "any": rate_dict(reference_rate(counts, None))}


def select_kind(documents: Sequence[Document], counts: Sequence[DocumentCounts], tag: str) -> list[DocumentCounts]:
    """Counts of the documents with a split tag."""
    return [count for document, count in zip(documents, counts, strict=True) if tag in document.split_tags]


def by_value(counts: Sequence[DocumentCounts]) -> dict[str, dict[str, Any]]:
    """Recall of visible facts with `trained_values`, and with `heldout_values` that adapter training never states."""

    def states(heldout: bool) -> Callable[[Reference], bool]:
        return lambda reference: is_heldout(reference.cue, reference.source_value or "") is heldout

    return {
        name: rate_dict(reference_rate(counts, where=states(heldout)))
        for name, heldout in (("trained_values", False), ("heldout_values", True))
    }


def swapped_rates(
    documents: Sequence[Document],
    own: Sequence[Sequence[StreamText]],
    donors: Sequence[Sequence[StreamText]],
    lag: int,
    capacity: int,
) -> dict[str, dict[str, Any]]:
    """
    References of streams that read a donor's notes: share that follows the donor's fact, and their own sibling's.

    A reference counts when the donor had stated the fact in a visible round, and another value than the reader's own
    sibling: where both state the same, following one is following the other. Nor does it count when a stream that the
    reader hears told the own sibling's value: owners read notes too, and what they took over reaches both documents.
    """
    follows, keeps = [], []
    for document, texts, donor in zip(documents, own, donors, strict=True):
        regular = count_document(document, list(texts), lag=lag, capacity=capacity)
        own_entry = {(entry.stream, entry.start): entry for entry in regular.references}
        hits = own_hits = trials = 0
        for stream in range(len(texts)):
            mixed = [texts[s] if s == stream else donor[s] for s in range(len(texts))]
            counts = count_document(document, mixed, lag=lag, capacity=capacity)
            for entry in counts.select("feasible", lambda reference, stream=stream: reference.stream == stream):
                sibling = own_entry[entry.stream, entry.start]
                heard = {
                    other.value
                    for other in counts.references
                    if other.stream != stream and other.round <= entry.round - lag
                }
                if sibling.source_value in heard | {entry.source_value}:
                    continue
                trials += 1
                hits += entry.consistent
                own_hits += sibling.consistent
        follows.append((hits, trials))
        keeps.append((own_hits, trials))
    return {
        "swapped_follow": rate_dict(bootstrap_rate(follows)),
        "swapped_own": rate_dict(bootstrap_rate(keeps)),
    }


def plan_adherence(counts: Sequence[DocumentCounts]) -> dict[str, dict[str, Any]]:
    """Owned items stated, mentions of cues that the plan has, and values that the worlds know."""
    return {
        "owned_stated": rate_dict(bootstrap_rate((len(c.stated_items), c.planned_items) for c in counts)),
        "mentions_on_plan": rate_dict(bootstrap_rate((c.mentions - c.off_plan, c.mentions) for c in counts)),
        "valid_values": rate_dict(bootstrap_rate((c.valid, c.mentions) for c in counts)),
    }


def stated_relative(documents: Sequence[Document], counts: Sequence[DocumentCounts]) -> dict[str, Any]:
    """
    Owned items stated, relative to the documents' own texts, which leave out about one item in eight by chance.

    A ratio of numbers of items, so it may pass 1.
    """
    pairs = []
    for document, count in zip(documents, counts, strict=True):
        own = {s.item_id for stream in document.streams for s in stream.spans if s.owner == stream.stream_id}
        pairs.append((len(count.stated_items), len(own)))
    return rate_dict(bootstrap_rate(pairs))


def references_relative(counts: Sequence[DocumentCounts], baseline: Sequence[DocumentCounts]) -> dict[str, Any]:
    """
    Repeated facts, relative to what another way of writing repeats in the same documents.

    A ratio of numbers of facts, so it may pass 1. Documents that only one of the two has written are left out.
    """
    others = {count.document_id: len(count.select()) for count in baseline}
    pairs = [(len(count.select()), others[count.document_id]) for count in counts if count.document_id in others]
    rate = rate_dict(bootstrap_rate(pairs))
    return {name: value for name, value in rate.items() if name != "clusters"}


def coverage_decisions(
    documents: Sequence[Document], texts: Sequence[Sequence[StreamText]], events: Sequence[Sequence[dict]]
) -> list[list[tuple[float, bool]]]:
    """
    Per document `(probability, truth)` of every own item at the end of every committed block.

    The truth is whether the parser finds the item's value, complete, in the stream's text up to there.
    """
    decisions = []
    for document, sections, trace in zip(documents, texts, events, strict=True):
        stated: dict[tuple[int, str], int] = {}
        for stream, section in enumerate(sections):
            for mention in parse_section(section.text):
                stated.setdefault((stream, mention.cue), mention.end)
        rows = []
        for event in trace:
            if event["kind"] != "commit" or not event.get("coverage"):
                continue
            stream = event["stream"]
            end = sections[stream].round_ends[event["round"]]
            for item, probability in event["coverage"].items():
                cue = document.items[int(item)].item_id.split("/", 1)[1]
                rows.append((probability, stated.get((stream, cue), end + 1) <= end))
        decisions.append(rows)
    return decisions


def precision_recall(decisions: Sequence[Sequence[tuple[float, bool]]], threshold: float) -> dict[str, dict[str, Any]]:
    """Precision and recall at a threshold, with document-cluster intervals."""
    precision = [
        (sum(truth for p, truth in rows if p >= threshold), sum(p >= threshold for p, _ in rows)) for rows in decisions
    ]
    recall = [
        (sum(p >= threshold for p, truth in rows if truth), sum(truth for _, truth in rows)) for rows in decisions
    ]
    return {"precision": rate_dict(bootstrap_rate(precision)), "recall": rate_dict(bootstrap_rate(recall))}


def precision_recall_curve(decisions: Iterable[Sequence[tuple[float, bool]]]) -> list[list[float]]:
    """`[recall, precision, threshold]` over thresholds 0.02, 0.04, ..., 0.98."""
    flat = [decision for rows in decisions for decision in rows]
    positives = sum(truth for _, truth in flat)
    curve = []
    for step in range(1, 50):
        threshold = step / 50
        flagged = [truth for p, truth in flat if p >= threshold]
        if flagged and positives:
            curve.append([sum(flagged) / positives, sum(flagged) / len(flagged), threshold])
    return curve


def best_f1_threshold(curve: Sequence[Sequence[float]]) -> float:
    """
    The threshold of a `[recall, precision, threshold]` curve with the best F1; the lowest of equals.

    The stated rule of the coverage threshold.
    """
    if not curve:
        raise ValueError("the curve is empty: no item was ever covered; give more documents.")
    return max(curve, key=lambda point: (2 * point[0] * point[1] / (point[0] + point[1] or 1), -point[2]))[2]


def mean_chance(counts: Sequence[DocumentCounts]) -> float:
    """
    Chance of the visible references: the share whose value would be the owner's if each named a random value of its
    cue, of all that the trunk may state, also those that adapter training never does.
    """
    chance = chance_by_cue(heldout_values=None)
    cues = [reference.cue for count in counts for reference in count.select("feasible")]
    return sum(chance[cue] for cue in cues) / max(1, len(cues))


def rollback_counts(counts: Sequence[DocumentCounts], events: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """Consistent and contradictory references, the same-round rate, and blocks rolled back."""
    judged = [r for count in counts for r in count.select(None, lambda r: r.timing in KNOWN_TIMINGS)]
    consistent = sum(reference.consistent for reference in judged)
    return {
        "consistent": consistent,
        "contradictory": len(judged) - consistent,
        "rate": rate_dict(_rate(counts, lambda r: r.timing in KNOWN_TIMINGS)),
        "same_round": rate_dict(reference_rate(counts, "same")),
        "blocks_rolled": sum(event["kind"] == "rollback" for trace in events for event in trace),
        "blocks": sum(event["kind"] == "commit" for trace in events for event in trace),
    }


def _rate(counts: Sequence[DocumentCounts], where: Callable[[Reference], bool]) -> Rate:
    return reference_rate(counts, None, where)


def roc(scores: Sequence[float], labels: Sequence[bool]) -> list[list[float]]:
    """`[false positive rate, true positive rate]` of "flag when the score is high", from (0, 0) to (1, 1)."""
    positives, negatives = sum(labels), len(labels) - sum(labels)
    if not positives or not negatives:
        return []
    points, hits, alarms = [[0.0, 0.0]], 0, 0
    ranked = sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])
    for index, (score, label) in enumerate(ranked):
        hits, alarms = hits + label, alarms + (not label)
        if index + 1 == len(ranked) or ranked[index + 1][0] != score:
            points.append([alarms / negatives, hits / positives])
    return points
