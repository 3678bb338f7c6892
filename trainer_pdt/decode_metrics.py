"""Measures of decoding runs: speed, rollbacks, agreement, gate, coverage, and how much two runs' texts differ."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean, median, pstdev
from typing import Any

from .data.counting import wilson_rate
from .decode_runs import DecodeRun
from .evaluation.scoring import rate_dict

HISTOGRAM_EDGES = (1, 2, 4, 8, 16)
ENTROPY_BINS = 20
HIGH, LOW = 0.75, 0.25
# Share of a plan item's words that a reference note must hold to count as stating it.
OBSERVED_OVERLAP = 0.4
# Similarity of two sections below which they are not redundant.
REDUNDANT_ABOVE = 0.7


def quantile(values: Sequence[float], share: float) -> float | None:
    """Quantile by linear interpolation; `None` without values."""
    if not values:
        return None
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation; `None` where one side does not vary."""
    if len(first) < 2 or not pstdev(first) or not pstdev(second):
        return None
    mean_1, mean_2 = fmean(first), fmean(second)
    covariance = fmean((a - mean_1) * (b - mean_2) for a, b in zip(first, second, strict=True))
    return covariance / (pstdev(first) * pstdev(second))


def speed(run: DecodeRun) -> dict[str, Any]:
    """
    `alpha`: median seconds from one block boundary of a stream to its next; `beta`: share of the tokens written that
    were withdrawn; `tokens_per_second`: committed tokens of all streams by total seconds.
    """
    committed, withdrawn = sum(run.committed.values()), sum(map(sum, run.rollbacks.values()))
    total = run.seconds["total"]
    return {
        "alpha": median(run.rounds_s) if run.rounds_s else None,
        "beta": withdrawn / (committed + withdrawn) if committed + withdrawn else None,
        "tokens_per_second": committed / total if total else None,
        "tokens": committed,
        "seconds": total,
        "prefill_share": run.seconds["prefill"] / total if total and "prefill" in run.seconds else None,
        "exchange_share": run.seconds["exchange"] / total if total and "exchange" in run.seconds else None,
        "calls": run.calls,
    }


def rollbacks(run: DecodeRun) -> dict[str, Any]:
    """Blocks withdrawn, in all, by stream and by length, how agreement goes with that, how often a block waited."""
    lengths = [tokens for blocks in run.rollbacks.values() for tokens in blocks]
    scored = [(score, withdrawn) for _, score, withdrawn in run.judged if score is not None]
    names = [*map(str, HISTOGRAM_EDGES), f"over {HISTOGRAM_EDGES[-1]}"]
    bins = Counter(next((i for i, edge in enumerate(HISTOGRAM_EDGES) if n <= edge), len(names) - 1) for n in lengths)
    return {
        "events": len(lengths),
        "tokens": sum(lengths),
        "forced": run.forced,
        "waits": run.waits,
        "per_block": len(lengths) / len(run.judged) if run.judged else None,
        "by_stream": {stream: len(blocks) for stream, blocks in run.rollbacks.items()},
        "length_p50": quantile(lengths, 0.5),
        "length_p95": quantile(lengths, 0.95),
        "length_up_to": {name: bins[index] for index, name in enumerate(names)},
        "agreement_correlation": correlation([score for score, _ in scored], [float(gone) for _, gone in scored]),
    }


def series(by_stream: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """
    A value between 0 and 1 that every stream has at its blocks: spread, entropy, and how it moves.

    `entropy` is Shannon's, in bits, over 20 bins. Dwell is the mean number of blocks in a row at >= 0.75, <= 0.25 or
    between. An oscillation is a change of direction.
    """
    values = [value for stream in by_stream.values() for value in stream]
    if not values:
        return None
    bins = Counter(min(int(value * ENTROPY_BINS), ENTROPY_BINS - 1) for value in values)
    shares = [count / len(values) for count in bins.values()]
    dwells: dict[str, list[int]] = {"high": [], "mid": [], "low": []}
    turns = possible = 0
    for stream in by_stream.values():
        zones = ["high" if value >= HIGH else "low" if value <= LOW else "mid" for value in stream]
        for index, zone in enumerate(zones):
            if index == 0 or zone != zones[index - 1]:
                dwells[zone].append(0)
            dwells[zone][-1] += 1
        steps = [b - a for a, b in pairwise(stream) if b != a]
        turns += sum(a * b < 0 for a, b in pairwise(steps))
        possible += max(len(stream) - 2, 0)
    return {
        **{"n": len(values), "mean": fmean(values), "std": pstdev(values), "min": min(values), "max": max(values)},
        "entropy": -sum(share * math.log2(share) for share in shares) or 0.0,
        "share_high": sum(value >= HIGH for value in values) / len(values),
        "share_low": sum(value <= LOW for value in values) / len(values),
        **{f"dwell_{zone}": fmean(lengths) if lengths else None for zone, lengths in dwells.items()},
        "oscillations": turns,
        "oscillation_rate": turns / possible if possible else None,
    }


def words(text: str) -> list[str]:
    """Words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def coverage(run: DecodeRun, threshold: float, band: float) -> dict[str, Any]:
    """
    Items covered (>= threshold + band), missing (<= threshold - band) and partial, by stream; with reference notes
    also precision and recall (Wilson's intervals, over items) and F1 of "covered" (>= threshold) against notes that
    hold 40 % of the item's words.
    """
    counts, true, false, lost = {}, 0, 0, 0
    for stream, items in run.coverage.items():
        status = Counter(
            "covered" if p >= threshold + band else "missing" if p <= threshold - band else "partial" for _, p in items
        )
        counts[stream] = {name: status[name] for name in ("covered", "partial", "missing")}
        notes = [set(words(note)) for note in run.reference_notes.get(stream, [])]
        for text, probability in items if stream in run.reference_notes else []:
            wanted = set(words(text))
            observed = any(len(wanted & note) >= OBSERVED_OVERLAP * len(wanted) for note in notes)
            true += observed and probability >= threshold
            false += not observed and probability >= threshold
            lost += observed and probability < threshold
    result: dict[str, Any] = {"by_stream": counts}
    if run.reference_notes:
        result |= {"true_positives": true, "false_positives": false, "false_negatives": lost}
        result["precision"] = rate_dict(wilson_rate(true, true + false))
        result["recall"] = rate_dict(wilson_rate(true, true + lost))
        result["f1"] = 2 * true / (2 * true + false + lost) if true + false + lost else None
    return result


def tf_idf(texts: Sequence[str]) -> list[dict[str, float]]:
    """Unit vectors of word counts times `ln((1 + n) / (1 + texts with the word)) + 1`."""
    counts = [Counter(words(text)) for text in texts]
    seen = Counter(word for count in counts for word in count)
    vectors = []
    for count in counts:
        raw = {word: n * (math.log((1 + len(texts)) / (1 + seen[word])) + 1) for word, n in count.items()}
        length = math.sqrt(sum(value * value for value in raw.values()))
        vectors.append({word: value / length for word, value in raw.items()})
    return vectors


def cosine(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Inner product of two sparse vectors."""
    return sum(value * second.get(word, 0.0) for word, value in first.items())


def redundancies(sections: Sequence[str]) -> list[float]:
    """`relu(cosine - 0.7)` of the TF-IDF vectors of every two sections of an answer."""
    return [max(cosine(first, second) - REDUNDANT_ABOVE, 0.0) for first, second in combinations(tf_idf(sections), 2)]


def redundancy(run: DecodeRun) -> float | None:
    """Mean of [`redundancies`] over all prompts; `None` without a pair."""
    prompts: dict[str, list[str]] = {}
    for stream, text in run.sections.items():
        prompts.setdefault(stream.split("/")[0], []).append(text)
    similar = [value for texts in prompts.values() for value in redundancies(texts)]
    return fmean(similar) if similar else None


def rouge_l(first: str, second: str) -> float:
    """F1 of the longest common subsequence of words; 1 for two empty texts."""
    one, other = words(first), words(second)
    if not one or not other:
        return float(one == other)
    row = [0] * (len(other) + 1)
    for word in one:
        above = row
        row = [0]
        for column, match in enumerate(other):
            row.append(above[column] + 1 if word == match else max(above[column + 1], row[-1]))
    return 2 * row[-1] / (len(one) + len(other))


def similarity(text: str, reference: str) -> dict[str, float | None]:
    """
    `rouge_l`, `tf_idf_cosine` of the two as a collection of their own, and `words_more`: words of the text beyond
    those of the reference, over the reference's; `None` where it has none.
    """
    mine, theirs = len(words(text)), len(words(reference))
    return {
        "rouge_l": rouge_l(text, reference),
        "tf_idf_cosine": cosine(*tf_idf((text, reference))),
        "words_more": (mine - theirs) / theirs if theirs else None,
    }


def run_metrics(run: DecodeRun, threshold: float = 0.5, band: float = 0.2) -> dict[str, Any]:
    """
    All measures of one run.

    Args:
        run (`DecodeRun`): From [`read_run`].
        threshold (`float`, *optional*, defaults to 0.5), band (`float`, *optional*, defaults to 0.2): Coverage at
            `threshold + band` is covered, at `threshold - band` missing.
    """
    agreement: dict[str, list[float]] = {}
    for stream, score, _ in run.judged:
        if score is not None:
            agreement.setdefault(stream, []).append(score)
    margins = {f"p{share:02d}": quantile(run.margins, share / 100) for share in (5, 50, 95)}
    return {
        "speed": speed(run),
        "rollback": rollbacks(run),
        "agreement": series(agreement),
        "gate": series(run.gates),
        "margin": margins if run.margins else None,
        "coverage": coverage(run, threshold, band),
        "redundancy": redundancy(run),
    }


def compare_texts(run: DecodeRun, baseline: DecodeRun) -> dict[str, Any]:
    """
    A run beside a baseline that answered the same prompts: `speedup` in tokens per second, and how alike the answers
    are (means over prompts).

    Raises:
        ValueError: When the numbers of answers differ.
    """
    if len(run.merged) != len(baseline.merged):
        raise ValueError(
            f"{run.name} has {len(run.merged)} answers, {baseline.name} {len(baseline.merged)}: they cannot be paired."
        )
    alike = [similarity(*pair) for pair in zip(run.merged, baseline.merged, strict=True)]
    mine, theirs = (sum(one.committed.values()) for one in (run, baseline))
    rates = [speed(one)["tokens_per_second"] for one in (run, baseline)]
    return {
        "speedup": rates[0] / rates[1] if all(rates) else None,
        **{name: fmean(pair[name] for pair in alike) for name in ("rouge_l", "tf_idf_cosine")},
        "tokens_more": (mine - theirs) / theirs if theirs else None,
    }


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested measures by dotted name; text and what is missing is left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Over runs: mean, least and largest of every number but those of single streams, and how many runs have it."""
    values: dict[str, list[float]] = {}
    for metrics in runs:
        for name, value in flatten(metrics).items():
            if "by_stream" not in name.split("."):
                values.setdefault(name, []).append(value)
    return {
        name: {"mean": fmean(found), "min": min(found), "max": max(found), "n": len(found)}
        for name, found in values.items()
    }
