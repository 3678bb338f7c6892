"""The bars that a demo run is held against, and the ranges in which the measures of training are healthy."""

import math
from collections.abc import Mapping
from typing import Any

# Name, place in evaluation.json, comparison, bar. "upper" compares the upper end of the interval.
BARS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("sibling-fact recall, feasible, all types", ("sibling_fact_recall", "pdt"), ">=", 0.60),
    ("sibling-fact recall, feasible, core", ("sibling_fact_recall", "pdt_core"), ">=", 0.75),
    ("sequential decode by the same trunk, core", ("sibling_fact_recall", "sequential_core"), ">=", 0.95),
    ("swapped notes: follows the swapped fact", ("sibling_fact_recall", "swapped_follow"), ">=", 0.50),
    ("swapped notes: follows its own sibling", ("sibling_fact_recall", "swapped_own"), "upper", 0.05),
    ("coverage precision", ("coverage", "precision"), ">=", 0.93),
    ("coverage recall", ("coverage", "recall"), ">=", 0.95),
    ("coverage precision, wordings never seen", ("coverage", "heldout_wordings", "precision"), ">=", 0.93),
    ("coverage recall, wordings never seen", ("coverage", "heldout_wordings", "recall"), ">=", 0.95),
    ("agreement AUROC, planted contradictions", ("agreement", "auroc"), ">=", 0.90),
    ("agreement AUROC, own generated text", ("agreement", "auroc_generated"), ">=", 0.80),
    ("agreement AUROC with zeroed notes", ("agreement", "zeroed_notes"), "<=", 0.60),
    ("references emitted, relative to sequential", ("references_emitted", "pdt"), ">=", 0.80),
    ("wall clock, all streams vs one stream", ("speed", "parallel_vs_single"), ">=", 1.4),
)
# Measure, comparison, limit, what to look at outside; docs/metrics.md defines the measures and says where the limits
# are from, docs/training.md has causes and remedies.
HEALTH: tuple[tuple[str, str, float, str], ...] = (
    ("mask_ablation", ">=", 0.1, "notes are not used"),
    ("kd_ce_ratio", "<=", 0.5, "written notes tell less than true ones"),
    ("stability_kl", "<=", 0.2, "a refresh changes what it should leave alone"),
    ("rollback_kl", "<=", 0.5, "a rewriting would read quite differently"),
    ("repair_error_rate", "<=", 0.1, "many tokens would change in a rewriting"),
    ("coverage_precision", ">=", 0.6, "items count as written that are not"),
    ("coverage_recall", ">=", 0.6, "written items are not seen"),
    ("coverage_f1", ">=", 0.6, "the coverage head has not learnt"),
    ("agreement_precision", ">=", 0.7, "sound blocks are flagged"),
    ("agreement_recall", ">=", 0.5, "contradictions pass"),
    ("agreement_f1", ">=", 0.58, "the agreement head has not learnt"),
    ("redundancy", "<=", 0.1, "siblings write the same notes at the same time"),
    ("other_kl_trunk", "<=", 0.05, "text that no sibling decides has drifted from the trunk"),
)
CHANCE_MODES = ("independent", "zero_notes", "gate_zero")
CHANCE_MARGIN = 0.03
TEXT_MARGIN = 0.03


def look_up(evaluation: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of keys; `None` where a key is missing."""
    value: Any = evaluation
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def check_bars(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """`{name, value, bar, met}` for every bar whose number is there."""
    rows = []
    for name, path, comparison, bar in BARS:
        value = look_up(evaluation, path)
        if isinstance(value, dict):
            value = value["high"] if comparison == "upper" else value["mean"]
        if value is not None:
            met = value >= bar if comparison == ">=" else value <= bar
            rows.append(
                {"name": name, "value": value, "bar": f"{'>=' if comparison == '>=' else '<='} {bar}", "met": met}
            )
    chance = look_up(evaluation, ("chance", "overall"))
    for mode in CHANCE_MODES:
        value = look_up(evaluation, ("sibling_fact_recall", mode))
        if value and value["high"] is not None and chance is not None:
            bar = chance + CHANCE_MARGIN
            rows.append(
                {
                    "name": f"{mode} at chance",
                    "value": value["high"],
                    "bar": f"<= {bar:.3f}",
                    "met": value["high"] <= bar,
                }
            )
    text = evaluation.get("text_ce")
    if text:
        for name, value in (
            ("text CE above the trunk", text["pdt"] - text["trunk"]),
            ("text KL to the trunk", text["kl"]),
        ):
            rows.append({"name": name, "value": value, "bar": f"<= {TEXT_MARGIN}", "met": value <= TEXT_MARGIN})
    return rows


def check_health(measures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{name, value, bar, met, means}` for every measure of [`HEALTH`] that is a number; other entries are ignored."""
    rows = []
    for name, comparison, limit, means in HEALTH:
        value = measures.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            met = value >= limit if comparison == ">=" else value <= limit
            rows.append({"name": name, "value": value, "bar": f"{comparison} {limit}", "met": met, "means": means})
    return rows
