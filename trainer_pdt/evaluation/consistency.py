"""Do the sections of one answer fit together? Contradictions as an NLI scorer sees them, repetition, attributes."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

from ..data.counting import StreamText, bootstrap_rate
from ..data.schema import Document, Fact
from ..decode_metrics import redundancies
from ..features import FeatureMaker, collect_values, plant_contradictions
from ..losses import NLIScorer, nli_violation
from ..nli import stated_values
from .documents import held_out_documents
from .scoring import rate_dict

NLI_MARGIN = 0.1
"""Probability by which contradiction may exceed neutral; the seeds' value."""

ANSWER_MODES = ("pdt", "pdt_gate", "independent", "sequential", "full_text")
"""Modes of decoding whose sections are held against each other."""

CONTROL_DOCUMENTS, VALUE_DOCUMENTS = 24, 100
"""Held-out documents that a scorer has to judge rightly, and documents whose values are planted in them."""


def judged_answers(
    written: Mapping[str, Sequence[Sequence[StreamText]]], documents: Sequence[Document], features: FeatureMaker
) -> dict[str, list[list[str]]]:
    """
    Sections by document, under the name of what wrote them: modes of decoding, and two controls.

    Args:
        written (`Mapping[str, Sequence[Sequence[StreamText]]]`): Texts by mode; those of [`ANSWER_MODES`] are taken.
        documents (`Sequence[Document]`): `given` are their own sections, which agree.
        features (`FeatureMaker`): `planted` are the contradictions of its corrupted view, which a scorer has to see.
    """
    answers = {
        mode: [[text.text for text in texts] for texts in written[mode]] for mode in ANSWER_MODES if mode in written
    }
    return answers | control_answers(documents, features.values, features.corruption_rate, features.seed)


def control_answers(
    documents: Sequence[Document], values: Mapping[str, Sequence[str]], rate: float = 0.5, seed: int = 0
) -> dict[str, list[list[str]]]:
    """
    `given`, the documents' own sections, which agree, and `planted`, the same with contradictions.

    Args:
        documents (`Sequence[Document]`), values (`Mapping[str, Sequence[str]]`), rate (`float`), seed (`int`): See
            [`~trainer_pdt.features.plant_contradictions`].
    """
    planted = [
        plant_contradictions(document, values, rate, random.Random(f"{seed}/{document.document_id}"))[0]
        for document in documents
    ]
    return {
        name: [[stream.text for stream in document.streams] for document in sources]
        for name, sources in (("given", documents), ("planted", planted))
    }


def standard_control() -> dict[str, list[list[str]]]:
    """[`control_answers`] of held-out documents: the contradictions that a scorer has to see before it is believed."""
    values = collect_values(held_out_documents("train", VALUE_DOCUMENTS, 0))
    return control_answers(held_out_documents("test", CONTROL_DOCUMENTS, 0), values)


def sibling_pairs(sections: Sequence[str]) -> list[tuple[str, str]]:
    """Every two sections of an answer, in both orders: a scorer need not be symmetric."""
    return list(permutations(sections, 2))


def nli_measures(
    scorer: NLIScorer, answers: Sequence[Sequence[str]], margin: float = NLI_MARGIN
) -> dict[str, dict[str, Any]]:
    """
    `violation`, the mean `relu(contradiction - neutral - margin)` over pairs of sections, and `contradicting`, the
    share of pairs in which it is above 0.

    Args:
        scorer (`NLIScorer`): Judges pairs of texts.
        answers (`Sequence[Sequence[str]]`): Sections of each answer.
        margin (`float`, *optional*, defaults to 0.1): Contradiction allowed above neutral, in 0..1.

    Returns:
        `{mean, low, high, n}` by measure; intervals resample answers, `n` counts pairs.
    """
    pairs = [sibling_pairs(sections) for sections in answers]
    flat = [pair for answer in pairs for pair in answer]
    violations = nli_violation(scorer, [one for one, _ in flat], [other for _, other in flat], margin)
    parts = violations.split([len(answer) for answer in pairs]) if flat else []
    sums = [(float(part.sum()), len(part)) for part in parts]
    counts = [(int((part > 0).sum()), len(part)) for part in parts]
    return {"violation": rate_dict(bootstrap_rate(sums)), "contradicting": rate_dict(bootstrap_rate(counts))}


def check_control(
    scorer: NLIScorer, control: Mapping[str, Sequence[Sequence[str]]], margin: float = NLI_MARGIN
) -> dict[str, dict[str, Any]]:
    """
    [`nli_measures`] of `given` and `planted`, sections without and with contradictions.

    Raises:
        ValueError: When the scorer does not see them: the interval of `violation` of `planted` must lie above that of
            `given`.
    """
    found = {name: nli_measures(scorer, control[name], margin) for name in ("given", "planted")}
    given, planted = (found[name]["violation"] for name in ("given", "planted"))
    if not planted["n"] or not given["n"]:
        raise ValueError("control has no two sections of one answer in `given` or `planted`, allowed: both have some.")
    if not planted["low"] > given["high"]:
        raise ValueError(
            "the scorer does not see the contradictions of the control: violation is "
            f"{planted['mean']:.3f} ({planted['low']:.3f} to {planted['high']:.3f}) with and {given['mean']:.3f} "
            f"({given['low']:.3f} to {given['high']:.3f}) without; allowed: a scorer that tells them apart."
        )
    return found


def consistent_attributes(sections: Sequence[Iterable[Fact]]) -> tuple[int, int]:
    """
    How many attributes (a subject with a predicate) several sections state, and how many of these with one object.

    Args:
        sections (`Sequence[Iterable[Fact]]`): Facts of each section of an answer. Case and outer blanks do not matter.

    Returns:
        `tuple[int, int]`: Consistent attributes, shared ones. A section that contradicts itself counts too.
    """
    stated: dict[tuple[str, str], list[set[str]]] = {}
    for facts in sections:
        own: dict[tuple[str, str], set[str]] = {}
        for fact in facts:
            key = fact.subj_id.strip().casefold(), fact.predicate.strip().casefold()
            own.setdefault(key, set()).add(fact.object.strip().casefold())
        for key, objects in own.items():
            stated.setdefault(key, []).append(objects)
    shared = [set().union(*objects) for objects in stated.values() if len(objects) > 1]
    return sum(len(objects) == 1 for objects in shared), len(shared)


def attribute_consistency(documents: Iterable[Sequence[Iterable[Fact]]]) -> dict[str, Any]:
    """Share of shared attributes that are consistent, see [`consistent_attributes`]; `{mean, low, high, n}`."""
    return rate_dict(bootstrap_rate(consistent_attributes(sections) for sections in documents))


def stated_facts(text: str) -> list[Fact]:
    """Facts that the parser finds in a section of a procedural world, all of the one subject that a document has."""
    return [Fact("", cue, value, 0, 0) for cue, values in stated_values(text).items() for value in sorted(values)]


def section_redundancy(answers: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Mean [`~trainer_pdt.decode_metrics.redundancies`] of every two sections of an answer; `{mean, low, high, n}`."""
    pairs = [redundancies(sections) for sections in answers]
    return rate_dict(bootstrap_rate((sum(found), len(found)) for found in pairs))
