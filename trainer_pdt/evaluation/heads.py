"""Sections of an evaluation on the heads: coverage and agreement with intervals, controls and an operating point.

`decisions` are (probability, truth) by document, for statistics over several runs; they go to `documents.json`.
"""

import logging
from typing import TYPE_CHECKING, Any

from ..calibration import Judgements, assess
from ..data.counting import bootstrap_rate
from .blocks import Decisions, block_decisions, documents_from_texts, score_blocks
from .documents import held_out_documents
from .modes import write_parallel
from .scoring import coverage_decisions, precision_recall, precision_recall_curve, rate_dict, roc

if TYPE_CHECKING:
    from .suite import Evaluation

logger = logging.getLogger(__name__)

ROC_POINTS = 200
AREAS = ("auroc", "average_precision", "expected_calibration_error")


def thinned(points: list[list[float]], count: int) -> list[list[float]]:
    """About `count` of the points, evenly taken, the last one among them."""
    step = max(1, -(-len(points) // count))
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def areas(decisions: Decisions, finds: bool, threshold: float | None = None) -> dict[str, Any]:
    """
    `auroc`, `average_precision` and `expected_calibration_error` of [`assess`], and `f1` where a threshold is given;
    nothing without a decision.
    """
    if not any(decisions):
        return {}
    report = assess(Judgements.of(decisions, finds), 0.5 if threshold is None else threshold)
    names = AREAS if threshold is None else ("f1", *AREAS)
    return {name: report[name] for name in names if report[name]["mean"] is not None}


def coverage(evaluation: "Evaluation") -> dict[str, Any]:
    """Section `coverage`: own items at the end of every block, on the model's own text."""
    evaluation.calibration()
    arguments, threshold = evaluation.arguments, evaluation.model.generation_config.coverage_threshold
    written = evaluation.write("pdt")
    decisions = coverage_decisions(evaluation.documents, written.texts, written.events)
    documents = held_out_documents("test", arguments.core_documents, 0, heldout_wordings=True)
    logger.info("writing %d documents with plan wordings never trained on", len(documents))
    unseen = evaluation.writers(write_parallel, documents, agreement_threshold=None, **evaluation.common())
    unseen_decisions = coverage_decisions(documents, unseen.texts, unseen.events)
    return {
        **precision_recall(decisions, threshold),
        **areas(decisions, finds=True, threshold=threshold),
        "heldout_wordings": {
            **precision_recall(unseen_decisions, threshold),
            **areas(unseen_decisions, finds=True, threshold=threshold),
        },
        "curve": precision_recall_curve(decisions),
        "threshold": threshold,
        "decisions": {"own_text": decisions},
    }


def agreement(evaluation: "Evaluation") -> dict[str, Any]:
    """Section `agreement`: planted contradictions and the model's own text, with controls and an operating point."""
    calibration = evaluation.calibration()
    threshold = evaluation.model.generation_config.agreement_threshold
    if threshold is None:
        raise ValueError("agreement_threshold is None and could not be calibrated; give more documents.")
    logger.info("scoring blocks: planted contradictions, own text")
    documents = evaluation.documents
    planted = score_blocks(evaluation.model, evaluation.features, documents, "corrupted")
    own = documents_from_texts(documents, evaluation.write("pdt").texts)
    generated = score_blocks(evaluation.model, evaluation.features, own)
    result: dict[str, Any] = {"threshold": threshold, "controls": {}, "decisions": {}}
    for suffix, scores in (("", planted), ("_generated", generated)):
        decisions = block_decisions(scores, len(documents), lambda score: 1 - score.disagreement)
        found = areas(decisions, finds=False)
        result |= {f"{name}{suffix}": found.get(name) for name in AREAS}
        flat = [decision for rows in decisions for decision in rows]
        labels = [not stands for _, stands in flat]
        result[f"roc{suffix}"] = thinned(roc([1 - p for p, _ in flat], labels), ROC_POINTS)
        result[f"blocks{suffix}"], result[f"positives{suffix}"] = len(labels), sum(labels)
        # Most blocks repeat nothing that could be judged; the control that knows which do is held against all of them.
        whole = block_decisions(scores, len(documents), lambda score: 1 - score.disagreement, only_judgeable=False)
        result[f"auroc_all_blocks{suffix}"] = areas(whole, finds=False).get("auroc")
        controls = {
            "zeroed_notes": block_decisions(scores, len(documents), lambda score: 1 - score.zeroed),
            "logp_gap": block_decisions(scores, len(documents), lambda score: -score.logp_gap),
            "reference_present": block_decisions(
                scores, len(documents), lambda score: 1.0 - score.judgeable, only_judgeable=False
            ),
        }
        result["decisions"]["generated" if suffix else "planted"] = decisions
        result["decisions"][f"all_blocks{suffix}"] = whole
        result["decisions"] |= {f"{name}{suffix}": rows for name, rows in controls.items()}
        without = {name: areas(rows, finds=False).get("auroc") for name, rows in controls.items()}
        result[f"zeroed_notes{suffix}"] = without.pop("zeroed_notes")
        result["controls"] |= {f"{name}{suffix}": area for name, area in without.items()}
    decisions = result["decisions"]["generated"]
    result |= flagged(decisions, threshold)
    chosen = calibration.get("agreement_judgeable")
    if chosen is not None:
        at = chosen["threshold"]["mean"]
        result["operating_point"] = {"threshold": at, "rule": chosen["rule"], **flagged(decisions, at)}
    return result


def flagged(decisions: Decisions, threshold: float) -> dict[str, Any]:
    """`repaired` and `false_rollback`: shares of contradicting and of sound judgeable blocks below the threshold."""
    shares = {}
    for name, wanted in (("false_rollback", True), ("repaired", False)):
        rows = [[p < threshold for p, stands in document if stands is wanted] for document in decisions]
        shares[name] = rate_dict(bootstrap_rate((sum(flags), len(flags)) for flags in rows))
    return shares
