"""The bars of the proof, held against several seeds: lower limits by the mean, upper limits by the interval's end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .pooled import Estimate, Pooled

CHANCE_MODES = {
    "independent": "independent streams",
    "zero_notes": "notes zeroed",
    "gate_zero": "SNC gate 0",
    "self_only": "own notes only",
    "norm_scramble": "notes scrambled, norms kept",
}
CONTROLS = {
    "zeroed_notes_generated": "auroc_generated",
    "controls/logp_gap_generated": "auroc_generated",
    "controls/reference_present_generated": "auroc_all_blocks_generated",
}
"""Controls of the agreement head, and the head's figure on the same blocks."""
ROLLBACK_MODES = ("none", "head", "head_stale", "random", "oracle", "oracle_stale")


@dataclass(frozen=True)
class Bar:
    """
    One line of the table.

    Args:
        name (`str`): What is measured.
        figure (`Callable`): Takes it from [`Pooled`]; a `KeyError` means that it was not measured.
        comparison (`str`): `">="` compares the mean over seeds, `"<="` the upper end of the interval, `"n >="` what
            was counted over all seeds.
        limit (`float`): The bar.
    """

    name: str
    figure: Callable[[Pooled], Estimate]
    comparison: str
    limit: float

    def check(self, pooled: Pooled) -> dict[str, Any]:
        """`{name, value, seeds, bar, met}`; where a seed did not measure it, or counted nothing, `met` is `None`."""
        row = {"name": self.name, "bar": f"{self.comparison} {self.limit:g}"}
        try:
            found = self.figure(pooled)
        except KeyError:
            return {**row, "value": None, "seeds": [], "met": None}
        value = {">=": found.mean, "<=": found.interval[1], "n >=": found.n}[self.comparison]
        met = None
        if not math.isnan(value):
            met = value <= self.limit if self.comparison == "<=" else value >= self.limit
        return {**row, "value": found.as_dict(), "seeds": found.seeds_S.tolist(), "met": met}


def _at(path: str) -> Callable[[Pooled], Estimate]:
    return lambda pooled: pooled.get(path)


def _recall(mode: str) -> Callable[[Pooled], Estimate]:
    return _at(f"sibling_fact_recall/{mode}")


def _above_chance(mode: str) -> Callable[[Pooled], Estimate]:
    return lambda pooled: pooled.get(f"sibling_fact_recall/{mode}") - pooled.get("chance/overall")


def _best_control(pooled: Pooled) -> Estimate:
    found = [pooled.get(f"agreement/{head}") - pooled.get(f"agreement/{name}") for name, head in CONTROLS.items()]
    return min(found, key=lambda estimate: estimate.mean)


def _contradictions(pooled: Pooled) -> Estimate:
    return (1.0 - pooled.get("rollback/head/rate")) / (1.0 - pooled.get("rollback/none/rate"))


def _fresh_notes(pooled: Pooled) -> Estimate:
    return pooled.get("rollback/head/same_round") - pooled.get("rollback/head_stale/same_round")


def _smallest_class(pooled: Pooled) -> Estimate:
    found = [pooled.counted(f"rollback/{mode}/same_round") for mode in ROLLBACK_MODES]
    return min(found, key=lambda counted: counted.n)


def _lag(pooled: Pooled) -> Estimate:
    return pooled.get("curves/bus_lag/1/pdt") - pooled.get("curves/bus_lag/2/pdt")


def _behind_sequential(pooled: Pooled) -> Estimate:
    return pooled.get("sibling_fact_recall/sequential_core") - pooled.get("sibling_fact_recall/pdt_core")


def _hard(pooled: Pooled) -> Estimate:
    return pooled.get("sibling_fact_recall/pdt_hard") / pooled.get("sibling_fact_recall/sequential_hard")


TWO_HOP = Bar("two-hop facts", _at("two_hop/repeated/pdt"), ">=", 0.80)
BARS: tuple[Bar, ...] = (
    Bar("recall, feasible, all types", _recall("pdt"), ">=", 0.90),
    Bar("recall, feasible, core", _recall("pdt_core"), ">=", 0.97),
    Bar("recall, feasible, values never trained on", _recall("pdt_heldout_values"), ">=", 0.90),
    Bar("sequential minus PDT, core", _behind_sequential, "<=", 0.05),
    *(Bar(f"{name}: recall above chance", _above_chance(mode), "<=", 0.03) for mode, name in CHANCE_MODES.items()),
    Bar("swapped notes: follows the swapped fact", _recall("swapped_follow"), ">=", 0.85),
    Bar("swapped notes: follows its own sibling", _recall("swapped_own"), "<=", 0.05),
    Bar("lag 1 minus lag 2", _lag, "<=", 0.10),
    TWO_HOP,
    Bar("mentions on plan", _at("plan/mentions_on_plan"), ">=", 0.95),
    Bar("owned items stated", _at("plan/owned_stated"), ">=", 0.95),
    Bar("owned items stated, relative to the documents' own texts", _at("plan/owned_stated_relative"), ">=", 0.95),
    Bar("cross-entropy above the trunk on other tokens (nats)", _at("text_ce/excess"), "<=", 0.01),
    Bar("KL from the trunk on other tokens (nats)", _at("text_ce/divergence"), "<=", 0.01),
    Bar("coverage precision", _at("coverage/precision"), ">=", 0.97),
    Bar("coverage recall", _at("coverage/recall"), ">=", 0.97),
    Bar("agreement AUROC, planted contradictions", _at("agreement/auroc"), ">=", 0.95),
    Bar("agreement AUROC, own text", _at("agreement/auroc_generated"), ">=", 0.90),
    Bar("agreement calibration error, own text", _at("agreement/expected_calibration_error_generated"), "<=", 0.05),
    Bar("contradicting blocks found at the operating point", _at("agreement/operating_point/repaired"), ">=", 0.70),
    Bar("clean judgeable blocks flagged there", _at("agreement/operating_point/false_rollback"), "<=", 0.05),
    Bar("agreement AUROC, own text, above the best of its controls", _best_control, ">=", 0.10),
    Bar("contradictions left by the gate", _contradictions, "<=", 0.50),
    Bar("same-round recall, gate minus stale notes", _fresh_notes, ">=", 0.20),
    Bar("references of the same round, fewest of the modes", _smallest_class, "n >=", 300),
    Bar("hard documents: PDT over sequential", _hard, ">=", 0.90),
    Bar("hard documents: sequential", _recall("sequential_hard"), ">=", 0.90),
)
"""What the proof promises; "far above the controls" is read as a distance of .10."""


def check_proof(main: Pooled, other_tap: Pooled | None = None) -> list[dict[str, Any]]:
    """
    Every bar, see [`Bar.check`].

    Args:
        main ([`Pooled`]): What the bars are held against.
        other_tap ([`Pooled`], *optional*): The same recipe with notes from the other tap, which may meet the bar on
            two-hop facts in its place.
    """
    rows = []
    for bar in BARS:
        row = bar.check(main)
        if bar is TWO_HOP and other_tap is not None and not row["met"]:
            other = bar.check(other_tap)
            if other["met"]:
                row = {**other, "name": f"{bar.name}, notes from the other tap"}
        rows.append(row)
    return rows
