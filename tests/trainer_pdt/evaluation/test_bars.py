"""The bars: values, upper ends of intervals, and numbers that are missing."""

import pytest

from trainer_pdt.evaluation.bars import BARS, CHANCE_MODES, HEALTH, check_bars, check_health, look_up


def rate(mean, low=None, high=None, n=100):
    return {"mean": mean, "low": mean if low is None else low, "high": mean if high is None else high, "n": n}


def passing():
    """An evaluation that meets every bar exactly at its limit, where the limit counts as met."""
    evaluation = {}
    for _, path, comparison, bar in BARS:
        place = evaluation
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = rate(0.0, 0.0, bar) if comparison == "upper" else rate(bar, 0.0, 1.0)
    evaluation["agreement"].update(auroc=0.9, auroc_generated=0.8, zeroed_notes=0.6)
    evaluation["references_emitted"]["pdt"] = 0.8
    evaluation["chance"] = {"overall": 0.0625}
    for mode in CHANCE_MODES:
        evaluation["sibling_fact_recall"][mode] = rate(0.05, 0.04, 0.0925)
    evaluation["text_ce"] = {"pdt": 1.0, "trunk": 0.984375, "kl": 0.03, "tokens": 10}
    return evaluation


def row(evaluation, name):
    return next(bar for bar in check_bars(evaluation) if bar["name"] == name)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("a", "b"), 1), (("a",), {"b": 1}), (("a", "c"), None), (("x", "b"), None), (("a", "b", "c"), None)],
)
def test_look_up(path, value):
    assert look_up({"a": {"b": 1}}, path) == value


def test_every_bar_is_met_at_its_limit():
    rows = check_bars(passing())
    assert len(rows) == len(BARS) + len(CHANCE_MODES) + 2
    assert [bar["name"] for bar in rows if not bar["met"]] == []
    assert all(set(bar) == {"name", "value", "bar", "met"} for bar in rows)


def test_an_upper_bar_compares_the_upper_end_of_the_interval():
    evaluation = passing()
    evaluation["sibling_fact_recall"]["swapped_own"] = rate(0.01, 0.0, 0.0625)
    bar = row(evaluation, "swapped notes: follows its own sibling")
    assert bar == {"name": bar["name"], "value": 0.0625, "bar": "<= 0.05", "met": False}


def test_other_bars_compare_the_mean():
    evaluation = passing()
    evaluation["coverage"]["recall"] = rate(0.94, 0.9, 1.0)
    evaluation["agreement"]["zeroed_notes"] = 0.61
    bar = row(evaluation, "coverage recall")
    assert (bar["value"], bar["bar"], bar["met"]) == (0.94, ">= 0.95", False)
    bar = row(evaluation, "agreement AUROC with zeroed notes")
    assert (bar["value"], bar["bar"], bar["met"]) == (0.61, "<= 0.6", False)


def test_controls_may_exceed_the_measured_chance_by_a_margin():
    evaluation = passing()
    evaluation["sibling_fact_recall"]["zero_notes"] = rate(0.05, 0.04, 0.093)
    bar = row(evaluation, "zero_notes at chance")
    assert (bar["value"], bar["bar"], bar["met"]) == (0.093, "<= 0.092", False)
    assert row(evaluation, "gate_zero at chance")["met"]


def test_text_may_cost_a_margin():
    evaluation = passing()
    evaluation["text_ce"] = {"pdt": 1.25, "trunk": 1.0, "kl": 0.5, "tokens": 10}
    for name, value in (("text CE above the trunk", 0.25), ("text KL to the trunk", 0.5)):
        assert row(evaluation, name) == {"name": name, "value": value, "bar": "<= 0.03", "met": False}


def test_missing_numbers_have_no_row():
    assert check_bars({}) == []
    empty = {"mean": None, "low": None, "high": None, "n": 0}
    evaluation = passing()
    evaluation["sibling_fact_recall"].update(pdt_core=empty, swapped_own=empty, independent=empty)
    evaluation["agreement"]["auroc"] = None
    del evaluation["coverage"]["heldout_wordings"], evaluation["text_ce"]
    names = {bar["name"] for bar in check_bars(evaluation)}
    assert len(names) == len(BARS) + len(CHANCE_MODES) + 2 - 8
    assert "sibling-fact recall, feasible, all types" in names
    del evaluation["chance"]
    assert not any(bar["name"].endswith("at chance") for bar in check_bars(evaluation))


def test_health_holds_at_the_limit_and_not_beyond():
    at_limit = {name: limit for name, _, limit, _ in HEALTH}
    assert [row["name"] for row in check_health(at_limit)] == list(at_limit)
    assert all(row["met"] for row in check_health(at_limit))
    beyond = {name: limit - 0.01 if comparison == ">=" else limit + 0.01 for name, comparison, limit, _ in HEALTH}
    assert not any(row["met"] for row in check_health(beyond))


def test_health_of_missing_numbers_is_left_out():
    measures = {"mask_ablation": None, "kd_ce_ratio": float("nan"), "stability_kl": 0.1, "unknown": 3.0}
    assert check_health(measures) == [
        {
            **{"name": "stability_kl", "value": 0.1, "bar": "<= 0.2", "met": True},
            "means": "a refresh changes what it should leave alone",
        }
    ]
