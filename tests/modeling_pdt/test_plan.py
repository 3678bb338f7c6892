"""Outlines, plan entries and planner buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_pdt.plan import PlanEntry, StreamPlan, check_plan_entries, format_outline, parse_outline, plan_bucket

WORDS = st.text("abcdefgh XYZ'-", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(st.builds(StreamPlan, WORDS, st.lists(WORDS, max_size=3).map(tuple)), min_size=1, max_size=5))
def test_an_outline_reads_back(streams):
    assert parse_outline(format_outline(streams) + "## Header\n1. not: this") == streams


def test_only_numbered_lines_before_the_empty_line_count():
    text = "Sure!\n 1. Farming: main crop;; soil ;\n2. Places\n- three: no\n\n3. Late: item"
    assert parse_outline(text) == [StreamPlan("Farming", ("main crop", "soil")), StreamPlan("Places", ())]
    assert parse_outline("") == []


@given(WORDS, st.integers(0, 5), st.integers(2, 600))
def test_buckets_are_stable_and_in_range(text, stream, size):
    bucket = plan_bucket(text, stream, "salt", size)
    assert 1 <= bucket < size
    assert bucket == plan_bucket(f" {text.upper()} ", stream, "salt", size)


def test_buckets_depend_on_owner_and_salt():
    buckets = {plan_bucket("mayor", stream, salt, 2**16) for stream in (0, 1) for salt in ("a", "b")}
    assert len(buckets) == 4


def test_entries_are_checked():
    entries = check_plan_entries([{"text": " mayor ", "stream": 2}, {"text": "river"}], 3)
    assert entries == [PlanEntry("mayor", 2), PlanEntry("river", None)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mayor", r"a plan_texts entry must be \{'text': str, 'stream': int\}, got 'mayor'"),
        ({"stream": 1}, "a plan_texts entry must be"),
        ({"text": "  "}, "a plan_texts entry must be"),
        ({"text": "mayor", "owner": 1}, "a plan_texts entry must be"),
        ({"text": "mayor", "stream": 3}, r"plan_texts: stream must be in \[0, 2\], got 3"),
        ({"text": "mayor", "stream": -1}, r"plan_texts: stream must be in \[0, 2\], got -1"),
        ({"text": "mayor", "stream": "1"}, r"plan_texts: stream must be in \[0, 2\], got '1'"),
    ],
)
def test_bad_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        check_plan_entries([entry], 3)
