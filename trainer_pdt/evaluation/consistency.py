"""Do the sections of one answer contradict each other? Pairs of siblings, judged by an NLI scorer."""

import random
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from ..data.counting import StreamText, bootstrap_rate
from ..data.schema import Document
from ..features import FeatureMaker, plant_contradictions
from ..losses import NLIScorer, nli_violation
from .scoring import rate_dict

NLI_MARGIN = 0.1
"""Probability by which contradiction may exceed neutral; the seeds' value."""

NLI_MODES = ("pdt", "pdt_gate", "independent", "sequential", "full_text")
"""Modes of decoding whose sections are judged."""


def judged_answers(
    written: Mapping[str, Sequence[Sequence[StreamText]]], documents: Sequence[Document], features: FeatureMaker
) -> dict[str, list[list[str]]]:
    """
    Sections by document, under the name of what wrote them: modes of decoding, and two controls.

    Args:
        written (`Mapping[str, Sequence[Sequence[StreamText]]]`): Texts by mode; those of [`NLI_MODES`] are taken.
        documents (`Sequence[Document]`): `given` are their own sections, which agree.
        features (`FeatureMaker`): `planted` are the contradictions of its corrupted view, which a scorer has to see.
    """
    answers = {
        mode: [[text.text for text in texts] for texts in written[mode]] for mode in NLI_MODES if mode in written
    }
    planted = []
    for document in documents:
        rng = random.Random(f"{features.seed}/{document.document_id}")
        planted.append(plant_contradictions(document, features.values, features.corruption_rate, rng)[0])
    for name, sources in (("given", documents), ("planted", planted)):
        answers[name] = [[stream.text for stream in document.streams] for document in sources]
    return answers


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
