"""Tables of the sections that have documents of their own; what was not measured has no row."""

import pytest

from trainer_pdt.evaluation.further_tables import (
    FURTHER_TABLES,
    bounds_table,
    curve_table,
    hops_table,
    threshold_table,
)
from trainer_pdt.evaluation.report import markdown_of, sections_of


def rate(mean, n=20):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": n}


EVALUATION = {
    "note_text": {"pdt": rate(0.8), "note_text": rate(0.7), "full_text": rate(0.85), "sequential": None},
    "two_hop": {"repeated": {"pdt": rate(0.6, 7), "ablated": rate(0.1, 6)}, "linked": {}},
    "curves": {
        "bus_lag": {
            "1": {"pdt": rate(0.8), "classes": {"feasible": rate(0.8), "same": rate(0.1, 3)}, "chance": 0.06},
            "2": {"pdt": rate(0.75), "classes": {"feasible": rate(0.75), "same": {"mean": None, "n": 0}}},
        },
        "num_streams": {"2": {"pdt": rate(0.9), "ablated": rate(0.05), "sequential": rate(0.95), "classes": {}}},
        "agreement_threshold": {
            "0.4": {"rate": rate(0.7), "same_round": rate(0.3, 9), "blocks_rolled": 4, "blocks": 90}
        },
    },
}


def test_bounds_stand_beside_the_model():
    rows = bounds_table(EVALUATION).rows
    assert rows[0] == ["PDT, notes on", "0.800 (0.700 to 0.900)", "20"]
    assert [row[0] for row in rows] == [
        "PDT, notes on",
        "streams read each other's text",
        "streams read each other's facts as text, as many tokens as notes",
    ]


def test_hops_have_counts():
    (row,) = hops_table(EVALUATION).rows
    assert row == ["repeats a sibling's linked fact, which that sibling could read", "0.600 (7)", "0.100 (6)", ""]


def test_curves_have_a_row_per_value():
    rows = curve_table(EVALUATION).rows
    assert [row[:2] for row in rows] == [["lag", "1"], ["lag", "2"], ["streams", "2"]]
    assert rows[0][2:] == ["0.800 (0.700 to 0.900)", "", "", "0.800 (20)", "0.100 (3)"]
    assert rows[2][3:5] == ["0.050 (-0.050 to 0.150)", "0.950 (0.850 to 1.050)"]
    assert threshold_table(EVALUATION).rows == [["0.4", "0.700 (0.600 to 0.800)", "0.300 (9)", "4", "90"]]


@pytest.mark.parametrize("make", FURTHER_TABLES)
def test_what_was_not_measured_has_no_table(make):
    assert make({}).rows == []


def test_they_are_in_the_page_and_in_markdown(tmp_path):
    (section,) = sections_of(EVALUATION, {})
    assert section.title == "Bounds and factors of decoding" and len(section.tables) == 4
    text = markdown_of(EVALUATION, [], tmp_path)
    for title in ("Two hops", "Factors of decoding", "Thresholds of the gate"):
        assert f"## {title}\n" in text
    assert "## Two hops" not in markdown_of({}, [], tmp_path)
