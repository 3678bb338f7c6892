"""Sections of an evaluation on whole answers: do the parts fit together, do they differ from sequential ones?"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.chat_client import BudgetExceeded, ServerUnavailable
from ..data.counting import bootstrap_rate
from ..decode_metrics import similarity as pair_similarity
from .bert_score import bert_score_f1
from .consistency import (
    NLI_MARGIN,
    attribute_consistency,
    judged_answers,
    nli_measures,
    section_redundancy,
    stated_facts,
)
from .judge import judge_pairs
from .scoring import rate_dict

if TYPE_CHECKING:
    from .suite import Evaluation

logger = logging.getLogger(__name__)

REFERENCE_MODE = "sequential_again"
"""Sequential decoding with other draws: with the same ones, answers of any mode are alike beyond their content."""

SIMILARITIES = ("rouge_l", "tf_idf_cosine", "words_more")


def answer_similarity(
    answers: Sequence[str], references: Sequence[str], bert_score: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """
    [`~trainer_pdt.decode_metrics.similarity`] of answers and references to the same prompts, means over prompts.

    Args:
        answers (`Sequence[str]`), references (`Sequence[str]`): One per prompt.
        bert_score (`Mapping[str, Any]`, *optional*): Arguments of `bert_score.BERTScorer`; missing or empty = without.

    Returns:
        `{mean, low, high, n}` by measure of [`SIMILARITIES`], with `bert_score` also `bert_score_f1`; intervals
        resample prompts. A pair with an empty reference has no `words_more`.
    """
    pairs = [pair_similarity(*pair) for pair in zip(answers, references, strict=True)]
    values = {name: [pair[name] for pair in pairs if pair[name] is not None] for name in SIMILARITIES}
    if bert_score:
        values["bert_score_f1"] = bert_score_f1(answers, references, bert_score)
    return {name: rate_dict(bootstrap_rate((value, 1) for value in found)) for name, found in values.items()}


def _sections_by_mode(evaluation: "Evaluation") -> dict[str, list[list[str]]]:
    """Sections of every answer by mode, the gated one only where a threshold could be set; and two controls."""
    evaluation.calibration()
    written = {mode: evaluation.write(mode).texts for mode in evaluation.comparable_modes()}
    return judged_answers(written, evaluation.documents, evaluation.features)


def nli(evaluation: "Evaluation") -> dict[str, Any]:
    """Section `nli_violation`, or nothing without a scorer: [`nli_measures`] of the modes and two controls."""
    if evaluation.nli_scorer is None:
        return {}
    answers = _sections_by_mode(evaluation)
    logger.info("judging contradictions between sections: %s", ", ".join(answers))
    measures = {name: nli_measures(evaluation.nli_scorer, sections) for name, sections in answers.items()}
    return {"nli_violation": {"scorer": evaluation.arguments.nli_scorer, "margin": NLI_MARGIN, **measures}}


def consistency(evaluation: "Evaluation") -> dict[str, Any]:
    """Section `consistency`: `redundancy` of the sections of an answer, `attribute_consistency` of what they state."""
    answers = _sections_by_mode(evaluation)
    return {
        name: {
            "redundancy": section_redundancy(every),
            "attribute_consistency": attribute_consistency(
                [stated_facts(text) for text in sections] for sections in every
            ),
        }
        for name, every in answers.items()
    }


def similarity(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `similarity`: [`answer_similarity`] of answers of each mode to those of [`REFERENCE_MODE`].

    That of sequential decoding itself is the control: as alike as answers are that differ by their draws alone.
    """
    evaluation.calibration()
    references, found = _merged(evaluation, REFERENCE_MODE), {}
    for mode in evaluation.comparable_modes():
        answers = _merged(evaluation, mode)
        shared = [name for name in references if name in answers]
        pairs = ([texts[name] for name in shared] for texts in (answers, references))
        found[mode] = answer_similarity(*pairs, evaluation.arguments.bert_score)
    return found


def judge(evaluation: "Evaluation") -> dict[str, Any]:
    """
    Section `judge`, or nothing without a judge: parallel answers (with the commit gate where there is one) and
    independent ones, each against sequential ones, by [`judge_pairs`].
    """
    if evaluation.judge is None:
        return {}
    evaluation.calibration()
    parallel = "pdt_gate" if "pdt_gate" in evaluation.comparable_modes() else "pdt"
    references, found = _with_headers(evaluation, "sequential"), {}
    requests = {document.document_id: document.prompt for document in evaluation.documents}
    for mode in (parallel, "independent"):
        answers = _with_headers(evaluation, mode)
        shared = [name for name in references if name in answers][: evaluation.arguments.judge_documents]
        logger.info("judging %d answers against sequential ones: %s", len(shared), mode)
        pairs = [(requests[name], answers[name], references[name]) for name in shared]
        try:
            found[mode] = judge_pairs(evaluation.judge, pairs)
        except (BudgetExceeded, ServerUnavailable) as error:
            # The other sections are worth more than this one: the report says why there are no verdicts.
            logger.error("not judged: %s", error)
            found[mode] = {"model": evaluation.judge.model, "pairs": len(pairs), "judged": 0, "stopped": str(error)}
    return {"judge": found}


def _with_headers(evaluation: "Evaluation", mode: str) -> dict[str, str]:
    """Answers by document, each section under its heading."""
    return {
        document.document_id: "\n\n".join(
            f"{stream.header}\n{text.text.strip()}" for stream, text in zip(document.streams, texts, strict=True)
        )
        for document, texts in zip(evaluation.documents_of(mode), evaluation.write(mode).texts, strict=True)
    }


def _merged(evaluation: "Evaluation", mode: str) -> dict[str, str]:
    """Answers by document, sections in plan order."""
    return {
        document.document_id: "\n".join(text.text for text in texts)
        for document, texts in zip(evaluation.documents_of(mode), evaluation.write(mode).texts, strict=True)
    }
