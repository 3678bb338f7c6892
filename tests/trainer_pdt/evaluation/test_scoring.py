"""Numbers from written documents, against values counted by hand."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trainer_pdt.data.counting import DocumentCounts, Rate, Reference, StreamText, reference_rate
from trainer_pdt.data.schema import Document, PlanItem, Stream
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.data.worlds_lexicon import values_of
from trainer_pdt.evaluation.scoring import (
    TIMINGS,
    best_f1_threshold,
    by_value,
    count_written,
    coverage_decisions,
    mean_chance,
    plan_adherence,
    precision_recall,
    precision_recall_curve,
    rate_dict,
    reference_classes,
    references_relative,
    roc,
    rollback_counts,
    select_kind,
    stated_relative,
    swapped_rates,
)
from trainer_pdt.evaluation.tables import timing_table

METAL, FRUIT = "raw metal", "snack fruit"


def make_document(number=0, *tags):
    """Two streams: the first owns a metal, the second a fruit."""
    items = (PlanItem(f"s0/{METAL}", METAL, 0), PlanItem(f"s1/{FRUIT}", FRUIT, 1))
    streams = tuple(Stream(index, f"Part {index}", "", "") for index in range(2))
    return Document(f"document-{number}", "factory", tags, "Describe it in two parts.", items, streams)


def blocks(*texts):
    """A section of one text per round."""
    ends = [sum(map(len, texts[: index + 1])) for index in range(len(texts))]
    return StreamText("".join(texts), tuple(ends))


def says(cue, value):
    return f"The {cue} {value}. "


def make_reference(timing, consistent, stream=1):
    return Reference(stream, METAL, "iron", 0, 1, 0, "iron" if consistent else "tin", 0, 1, False, False, timing)


def make_counts(*references, **fields):
    values = {"off_plan": 0, "valid": 0, "mentions": 0, "stated_items": frozenset(), "planned_items": 0}
    return DocumentCounts("document", references, planned_references=0, **{**values, **fields})


def test_rate_dict_has_the_four_numbers():
    assert rate_dict(Rate(0.5, 0.25, 0.75, 8)) == {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}


def test_reference_classes_name_every_timing_and_leave_empty_ones_without_a_number():
    never = make_reference("never", False)
    classes = reference_classes(
        [make_counts(make_reference("feasible", True)), make_counts(make_reference("same", False), never)]
    )
    assert tuple(classes) == (*TIMINGS, "any")
    assert classes["feasible"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1, "clusters": ((1, 1), (0, 0))}
    assert classes["same"]["mean"] == 0.0
    assert classes["late"] == {"mean": None, "low": None, "high": None, "n": 0, "clusters": ((0, 0), (0, 0))}
    # What the owner never states agrees with nothing, and is counted apart.
    assert (classes["any"]["mean"], classes["any"]["clusters"]) == (0.5, ((1, 1), (0, 1)))
    assert (classes["never"]["mean"], classes["never"]["clusters"]) == (0.0, ((0, 0), (0, 1)))
    table = timing_table({"reference_classes": {"pdt": classes}})
    assert table.columns[-2:] == ("all that the owner states", "the owner leaves it out")
    assert table.rows[0][-2:] == ["0.500 (2)", "0.000 (1)"]


def test_count_written_uses_lag_and_capacity():
    text = [blocks(says(METAL, "iron"), " ", " "), blocks(" ", " ", says(METAL, "iron"))]

    def timing(lag, capacity):
        (count,) = count_written([make_document()], [text], lag, capacity)
        return count.references[0].timing

    assert [timing(1, 16), timing(3, 16), timing(1, 1)] == ["feasible", "pending", "evicted"]


def test_select_kind_keeps_documents_with_the_tag():
    documents = [make_document(0, "core"), make_document(1, "hard"), make_document(2, "core", "heldout_values")]
    counts = [make_counts(mentions=number) for number in range(3)]
    assert [count.mentions for count in select_kind(documents, counts, "core")] == [0, 2]
    assert select_kind(documents, counts, "none") == []
    with pytest.raises(ValueError, match="shorter"):
        select_kind(documents, counts[:2], "core")


def test_by_value_tells_values_of_training_from_others():
    """Iron is trained and repeated; lithium never occurs in training and becomes tin; a word is no metal at all."""
    stated, repeated = ("iron", "lithium", "granite"), ("iron", "tin", "granite")
    texts = [
        [blocks(says(METAL, own), " "), blocks(" ", says(METAL, other))]
        for own, other in zip(stated, repeated, strict=True)
    ]
    rates = by_value(count_written([make_document()] * 3, texts, 1, 16))
    assert {name: (rate["mean"], rate["n"]) for name, rate in rates.items()} == {
        "trained_values": (1.0, 1),
        "heldout_values": (0.0, 1),
    }


def test_chance_counts_every_value_that_a_trunk_may_state():
    """Owner and reader draw from all values of the cue; references that no note can have told do not count."""
    values, rng = values_of(METAL), random.Random(0)
    texts = [
        [blocks(says(METAL, rng.choice(values)), " "), blocks(" ", says(METAL, rng.choice(values)))]
        for _ in range(1500)
    ]
    counts = count_written([make_document()] * len(texts), texts, 1, 16)
    assert mean_chance(counts) == pytest.approx(1 / len(values))
    assert reference_rate(counts).mean == pytest.approx(mean_chance(counts), abs=0.02)
    assert mean_chance([make_counts(make_reference("late", True))]) == 0.0


def test_swapped_rates_tell_whom_a_stream_follows():
    """Five documents: follows the donor; its own sibling; neither; donor too late; its own second sentence."""
    own = [
        [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"), says(METAL, "tin"))],
        [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"), says(METAL, "iron"))],
        [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"), says(METAL, "lead"))],
        [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"), says(METAL, "tin"))],
        [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"))],
    ]
    donors = [[blocks(says(METAL, "tin")), blocks(says(FRUIT, "figs"))] for _ in own]
    donors[3][0] = blocks(" ", says(METAL, "tin"))
    documents = [make_document(number) for number in range(5)]
    rates = swapped_rates(documents, own, donors, lag=1, capacity=16)
    assert {name: (rate["mean"], rate["n"]) for name, rate in rates.items()} == {
        "swapped_follow": (pytest.approx(1 / 3), 3),
        "swapped_own": (pytest.approx(1 / 3), 3),
    }


def test_swapped_rates_leave_out_facts_that_donor_and_sibling_share():
    own = [[blocks(says(METAL, "tin")), blocks(" ", says(METAL, "tin"))]]
    rates = swapped_rates([make_document()], own, own, lag=1, capacity=16)
    assert rates["swapped_follow"]["n"] == rates["swapped_own"]["n"] == 0


@pytest.mark.parametrize(("before", "heard"), [(0, True), (1, False)])
def test_swapped_rates_leave_out_what_another_stream_of_the_donor_told(before, heard):
    """Our own sibling states iron, as the donor's third stream does: in a round before the reader's, or in its own."""
    document = make_document()
    document = replace(document, streams=(*document.streams, Stream(2, "Part 2", "", "")))
    own = [blocks(says(METAL, "iron")), blocks(says(FRUIT, "figs"), says(METAL, "iron")), blocks(" ")]
    third = blocks(*[" "] * before, says(METAL, "iron"), " ")
    rates = swapped_rates([document], [own], [[blocks(says(METAL, "tin")), blocks(" "), third]], lag=1, capacity=16)
    assert rates["swapped_follow"]["n"] == rates["swapped_own"]["n"] == int(not heard)
    assert heard or rates["swapped_own"]["mean"] == 1.0


def test_plan_adherence():
    counts = [
        make_counts(stated_items=frozenset("ab"), planned_items=4, mentions=5, off_plan=1, valid=5),
        make_counts(stated_items=frozenset("c"), planned_items=2, mentions=5, off_plan=0, valid=4),
    ]
    means = {name: (rate["mean"], rate["n"]) for name, rate in plan_adherence(counts).items()}
    assert means == {"owned_stated": (0.5, 6), "mentions_on_plan": (0.9, 10), "valid_values": (0.9, 10)}


def commit(stream, number, coverage, kind="commit"):
    return {"kind": kind, "stream": stream, "round": number, "coverage": coverage}


def test_coverage_decisions_compare_each_committed_block_with_the_text_up_to_its_end():
    # The value "iron" straddles the first two blocks of stream 0; stream 1 never states its fruit.
    texts = [blocks("The raw metal ir", "on. So it is.", " End."), blocks(says(METAL, "iron"))]
    events = [
        {"kind": "plan", "items": []},
        commit(0, 0, {0: 0.75}),
        commit(0, 1, {0: 0.5}, kind="rollback"),
        commit(0, 1, {0: 0.25}),
        commit(0, 2, {"0": 1.0}),
        commit(1, 0, {1: 0.125}),
        commit(1, 0, {}),
    ]
    decisions = coverage_decisions([make_document()], [texts], [events])
    assert decisions == [[(0.75, False), (0.25, True), (1.0, True), (0.125, False)]]


DECISIONS = [[(0.9, True), (0.8, False), (0.3, True)], [(0.5, True), (0.1, False)]]


def test_precision_recall_counts_a_probability_at_the_threshold():
    result = precision_recall(DECISIONS, 0.5)
    assert (result["precision"]["mean"], result["precision"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (result["recall"]["mean"], result["recall"]["n"]) == (pytest.approx(2 / 3), 3)
    nothing = precision_recall(DECISIONS, 0.95)
    assert nothing["precision"]["mean"] is None
    assert nothing["recall"]["mean"] == 0.0


def test_precision_recall_curve_falls_in_recall_and_stops_where_nothing_is_flagged():
    curve = precision_recall_curve(DECISIONS)
    assert curve[0] == [1.0, 3 / 5, 0.02]
    by_threshold = {threshold: (recall, precision) for recall, precision, threshold in curve}
    assert by_threshold[0.5] == (2 / 3, 2 / 3)
    assert by_threshold[0.9] == (1 / 3, 1.0)
    assert max(by_threshold) == 0.9
    assert [row[0] for row in curve] == sorted((row[0] for row in curve), reverse=True)
    assert precision_recall_curve([[(0.9, False)]]) == []


def test_rollback_counts():
    counts = [
        make_counts(make_reference("feasible", True), make_reference("same", False), make_reference("late", False)),
        make_counts(make_reference("same", True), make_reference("pending", False), make_reference("evicted", True)),
    ]
    events = [[commit(0, 0, {}), commit(0, 1, {}, "rollback")], [commit(0, 0, {}), commit(1, 0, {}), {"kind": "plan"}]]
    result = rollback_counts(counts, events)
    assert (result["consistent"], result["contradictory"]) == (2, 2)
    assert (result["rate"]["mean"], result["rate"]["n"]) == (0.5, 4)
    assert (result["same_round"]["mean"], result["same_round"]["n"]) == (0.5, 2)
    assert (result["blocks_rolled"], result["blocks"]) == (1, 3)


def test_rollback_rate_agrees_with_its_counts_on_real_text():
    """A value whose owner never states it is nobody's contradiction."""
    texts = [blocks(" "), blocks(says(METAL, "iron"))]
    counts = count_written([make_document()], [texts], 1, 16)
    result = rollback_counts(counts, [[]])
    assert (result["consistent"], result["contradictory"], result["rate"]["n"]) == (0, 0, 0)
    assert reference_rate(counts, None).n == 0


@pytest.mark.parametrize(
    ("scores", "labels", "points"),
    [
        ([0.9, 0.1], [True, False], [[0, 0], [0, 1], [1, 1]]),
        ([0.1, 0.9], [True, False], [[0, 0], [1, 0], [1, 1]]),
        ([0.5, 0.5, 0.5], [True, False, True], [[0, 0], [1, 1]]),
        ([3, 2, 2, 1], [True, True, False, False], [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]),
        ([4, 3, 2, 1], [True, False, True, False], [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]),
    ],
)
def test_roc(scores, labels, points):
    assert roc(scores, labels) == points


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_roc_needs_both_classes(labels):
    scores = [0.5] * len(labels)
    assert roc(scores, labels) == []


def test_items_stated_relative_to_the_documents_own_texts():
    document = next(generate_documents("test", 0, 1, with_notes=False))
    own = {span.item_id for stream in document.streams for span in stream.spans if span.owner == stream.stream_id}
    texts = [StreamText(stream.text) for stream in document.streams]
    (whole,) = count_written([document], [texts], 1, 16)
    assert stated_relative([document], [whole])["mean"] == 1.0 and whole.stated_items == own
    (part,) = count_written([document], [[texts[0], StreamText(""), StreamText("")]], 1, 16)
    assert stated_relative([document], [part])["clusters"] == ((len(part.stated_items), len(own)),)


def test_best_f1_threshold():
    assert best_f1_threshold([[1.0, 0.5, 0.2], [0.8, 0.8, 0.4], [0.6, 0.9, 0.6]]) == 0.4
    assert best_f1_threshold([[0.8, 0.8, 0.4], [0.8, 0.8, 0.6]]) == 0.4
    assert best_f1_threshold([[0.0, 0.0, 0.4]]) == 0.4
    with pytest.raises(ValueError, match="the curve is empty"):
        best_f1_threshold([])


def test_references_relative_to_another_way_of_writing():
    def counted(document, references):
        return SimpleNamespace(document_id=document, select=lambda: [None] * references)

    mine, theirs = [counted("a", 3), counted("b", 1), counted("c", 9)], [counted("a", 4), counted("b", 0)]
    # The third document was not written by the other way; the second counts although that repeats nothing in it.
    found = references_relative(mine, theirs)
    assert (found["mean"], found["n"]) == (1.0, 4) and found.keys() == {"mean", "low", "high", "n"}
    assert found["low"] == 0.75 < found["high"]
