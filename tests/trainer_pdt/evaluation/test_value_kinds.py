"""The table of what is lost, from counts by document."""

from trainer_pdt.evaluation.pooled import Pooled
from trainer_pdt.evaluation.value_kinds import value_kinds_table

# Two core documents, then one hard one.
PDT = {
    "": [(3, 4), (2, 2), (1, 3)],
    "_core": [(3, 4), (2, 2)],
    "_hard": [(1, 3)],
    "_trained_values": [(2, 2), (2, 2), (1, 1)],
    "_heldout_values": [(1, 1), (0, 0), (0, 2)],
}


def counts(mode, found):
    return {f"sibling_fact_recall/{mode}{suffix}": pairs for suffix, pairs in found.items()}


def test_kinds_of_documents_and_of_values_apart():
    other = {**PDT, "": [(2, 4), (2, 2), (1, 3)], "_trained_values": [(1, 2), (2, 2), (1, 1)]}
    table = value_kinds_table(Pooled([{}, {}], [counts("pdt", PDT), counts("pdt", other)], 20))
    assert table.rows == [
        ["PDT, notes on, core documents", "0.875 (8)", "1.000 (2)", "0.000 (2)"],
        ["PDT, notes on, hard documents", "1.000 (2)", "0.000 (4)", ""],
    ]


def test_a_mode_that_was_not_measured_has_no_row():
    found = counts("pdt", PDT) | counts("full_text", PDT)
    table = value_kinds_table(Pooled([{}], [found], 20))
    assert [row[0].split(",")[0] for row in table.rows] == ["PDT"] * 2 + ["streams read each other's text"] * 2
    assert value_kinds_table(Pooled([{}], [{"sibling_fact_recall/pdt": PDT[""]}], 20)).rows == []
