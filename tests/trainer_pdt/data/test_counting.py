"""Counting on hand-made texts: timing classes, consistency, links, swaps, rates."""

import pytest

from trainer_pdt.data.counting import (
    StreamText,
    bootstrap_rate,
    count_document,
    is_known_value,
    reference_rate,
)
from trainer_pdt.data.schema import Document, PlanItem, Stream
from trainer_pdt.data.worlds import generate_documents


def make_document(*cues: tuple[str, int], num_streams: int = 3) -> Document:
    items = tuple(PlanItem(f"s{stream}/{cue}", cue, stream) for cue, stream in cues)
    streams = tuple(Stream(number, f"H{number}", "", "") for number in range(num_streams))
    return Document("d", "town", ("core",), "Describe.", items, streams)


def in_rounds(*parts: str) -> StreamText:
    """A stream whose round `r` wrote `parts[r]`."""
    ends, text = [], ""
    for part in parts:
        text += part
        ends.append(len(text))
    return StreamText(text, tuple(ends))


PLAN = make_document(("main crop", 0), ("flag color", 1))
OWNER = in_rounds("The main crop oats. ", "More. ", "More.")


@pytest.mark.parametrize(
    ("reader", "lag", "capacity", "timing"),
    [
        (in_rounds("It. ", "The main crop oats is near."), 1, 16, "feasible"),
        (in_rounds("The main crop oats is near."), 1, 16, "same"),
        (in_rounds("It. ", "The main crop oats is near."), 2, 16, "pending"),
        (in_rounds("a ", "b ", "c ", "The main crop oats is near."), 1, 2, "evicted"),
        (in_rounds("a ", "b ", "The main crop oats is near."), 1, 2, "feasible"),
    ],
)
def test_timing(reader, lag, capacity, timing):
    counts = count_document(PLAN, [OWNER, reader, StreamText("")], lag=lag, capacity=capacity)
    (reference,) = counts.references
    assert (reference.timing, reference.consistent, reference.source) == (timing, True, 0)


def test_late_and_never():
    reader = in_rounds("The main crop oats is near. ", "b", "c")
    late = count_document(PLAN, [in_rounds("a ", "The main crop rye."), reader, StreamText("")])
    assert [(entry.timing, entry.consistent) for entry in late.references] == [("late", False)]
    never = count_document(PLAN, [StreamText("Nothing."), reader, StreamText("")])
    assert [(entry.timing, entry.consistent) for entry in never.references] == [("never", False)]
    assert never.stated_items == frozenset()


def test_a_value_across_a_boundary_counts_for_the_round_of_its_end_at_the_owner_and_its_start_at_the_reader():
    owner = in_rounds("The main crop bar", "ley. Yes.")
    reader = in_rounds("The main crop bar", "ley is near.")
    (reference,) = count_document(PLAN, [owner, reader, StreamText("")]).references
    assert (reference.round, reference.source_round, reference.timing) == (0, 1, "late")


def test_repeats_are_not_counted_twice_and_own_facts_are_no_references():
    reader = StreamText("The main crop oats is near. The main crop oats again. The flag color red.")
    counts = count_document(PLAN, [OWNER, reader, StreamText("")])
    assert [entry.is_repeat for entry in counts.references] == [False, True]
    assert len(counts.select()) == 1
    assert counts.stated_items == {"s0/main crop", "s1/flag color"}


def test_linked_fact_and_two_hops():
    document = make_document(("main crop", 0), ("feast dish", 1))
    texts = [
        in_rounds("The main crop oats. ", "x"),
        in_rounds("a ", "The feast dish oats."),
        in_rounds("a ", "b ", "The feast dish rye is far."),
    ]
    link, two_hop = count_document(document, texts).references
    assert (link.is_link, link.hops, link.consistent, link.source, link.timing) == (True, 1, True, 0, "feasible")
    assert (two_hop.is_link, two_hop.hops, two_hop.consistent, two_hop.source) == (False, 2, False, 1)
    assert (link.source_timing, two_hop.source_timing) == (None, "feasible")


@pytest.mark.parametrize(
    ("source", "linked", "timing", "read"),
    [
        (in_rounds("The main crop oats."), in_rounds("a ", "The feast dish oats."), "feasible", "feasible"),
        (in_rounds("The main crop oats."), in_rounds("The feast dish rye."), "feasible", "same"),
        (in_rounds("a ", "The main crop oats."), in_rounds("The feast dish rye."), "feasible", "late"),
        (in_rounds("a ", "b "), in_rounds("The feast dish rye."), "feasible", "never"),
        (in_rounds("The main crop oats."), in_rounds("a "), "never", None),
    ],
)
def test_over_two_hops_it_counts_whether_the_source_could_read_what_it_states(source, linked, timing, read):
    document = make_document(("main crop", 0), ("feast dish", 1))
    reader = in_rounds("a ", "b ", "The feast dish rye is far.")
    references = count_document(document, [source, linked, reader]).references
    (two_hop,) = [entry for entry in references if entry.stream == 2]
    assert (two_hop.hops, two_hop.timing, two_hop.source_timing) == (2, timing, read)


def test_swapped_values_and_plan_adherence():
    reader = StreamText("The main crop rye is near. The park flower rose is near. The flag color zeppelin.")
    counts = count_document(PLAN, [OWNER, reader, StreamText("")], swapped_values={"main crop": "rye"})
    assert counts.references[0].follows and not counts.references[0].consistent
    assert (counts.off_plan, counts.valid, counts.mentions) == (1, 3, 4)
    assert is_known_value("main crop", "rye") and not is_known_value("main crop", "rose")


def test_generated_documents_are_fully_consistent():
    counts = []
    for document in generate_documents("test", 0, 60, with_notes=False):
        texts = [StreamText(stream.text) for stream in document.streams]
        counts.append(count_document(document, texts))
    rate = reference_rate(counts, timing=None)
    assert rate.mean == 1.0 and rate.n == sum(count.planned_references for count in counts)
    assert reference_rate(counts, timing="same").n == rate.n
    assert reference_rate(counts, timing="feasible").mean is None


def test_number_of_texts_is_checked():
    with pytest.raises(ValueError, match="`texts` has 1 entries, must be 3"):
        count_document(PLAN, [OWNER])


def test_bootstrap_covers_the_share_and_resamples_documents():
    rate = bootstrap_rate([(1, 2)] * 50)
    assert (rate.mean, rate.low, rate.high, rate.n) == (0.5, 0.5, 0.5, 100)
    mixed = bootstrap_rate([(4, 4), (0, 4)] * 20)
    assert mixed.mean == 0.5 and mixed.low < 0.4 and mixed.high > 0.6
    assert bootstrap_rate([(0, 0)]).n == 0
