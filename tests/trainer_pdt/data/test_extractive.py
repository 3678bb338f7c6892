"""The extractive teacher: what its rules find, who owns it, and what it refuses."""

import pickle
from itertools import pairwise

import pytest

from trainer_pdt.data.extractive import ExtractiveTeacher, group_evenly
from trainer_pdt.data.installed import installed_documents
from trainer_pdt.data.statements import KINDS, find_statements, find_whole, split_sentences, whole_value
from trainer_pdt.data.teachers import Rejection, SourceDocument

TOWN = SourceDocument(
    "town",
    "places",
    "Velmar",
    (
        (
            "History",
            "Velmar was founded in 1790 by Anna de Vries. The capital of the region is Ostrava. It kept its walls, "
            "and nobody has ever torn one stone of them down since.",
        ),
        (
            "People",
            "The town has 1,200 inhabitants today. Many of them are proud of what Anna de Vries began, and they say "
            "so each spring when the market opens its doors again.",
        ),
        (
            "Nature",
            "The river is 12 km long. Since 1790, when the town was founded, its banks have been wooded, and the old "
            "path to Ostrava follows them through the valley.",
        ),
    ),
)


@pytest.mark.parametrize(
    ("text", "kind", "cue", "value"),
    [
        ("License: MIT", "field", "license", "MIT"),
        ("The capital of the region is Ostrava.", "attribute", "capital of the region", "Ostrava"),
        ("Fisher is a package for arrays.", "definition", "meaning of Fisher", "package"),
        ("It needs Python 3.9 or later.", "version", "Python version", "3.9"),
        ("It was founded in 1790.", "date", "founded in", "1790"),
        ("She left on 3 March 1901 at last.", "date", "left on", "3 March 1901"),
        ("A lake with a depth of 12 m is near.", "quantity", "depth in m", "12 m"),
        ("They keep 1,200 records.", "quantity", "number of records", "1,200 records"),
        ("It was written by Anna de Vries.", "name", "written by", "Anna de Vries"),
        ("The result is stored in my_table after this.", "identifier", "stored in", "my_table"),
    ],
)
def test_one_statement_per_rule(text, kind, cue, value):
    (found,) = find_statements(text)
    assert (found.kind, found.cue, found.value) == (kind, cue, value)
    assert text[found.start : found.end] == value


@pytest.mark.parametrize("text", ["", "It is 1 of them.", "See https://example.org/My_File.", "However, it rains."])
def test_no_statement(text):
    assert find_statements(text) == []


def test_every_kind_has_a_rule():
    text = "License: MIT\nThe head of it is Ann.\nFisher is a package.\nPython 3.9, in 1790, 12 km, at Foo Bar, x_y."
    assert {statement.kind for statement in find_statements(text)} == set(KINDS)


def test_sentences_end_where_readers_see_it():
    text = "Dr. Lee left, e.g. Monday. She came back! Then\nnew line."
    assert [sentence for _, sentence in split_sentences(text)] == [
        "Dr. Lee left, e.g. Monday.",
        "She came back!",
        "Then",
        "new line.",
    ]
    assert all(text[start:].startswith(sentence) for start, sentence in split_sentences(text))


@pytest.mark.parametrize(
    ("value", "text", "place"),
    [
        ("Arno", "Arno", 0),
        ("Arno", "Arnold met Arno.", 11),
        ("Arno", "_Arno Arno7 éArno", -1),
        ("7 %", "17 % or 7 %!", 8),
        ("aa", "aaa aa", 4),
        ("C++", "C+++ C++", 0),
    ],
)
def test_a_value_is_found_where_it_is_no_part_of_a_word(value, text, place):
    assert find_whole(value, text) == place
    found = whole_value(value).search(text)
    assert (found.start() if found else -1) == place


@pytest.mark.parametrize(
    ("weights", "count", "groups"),
    [([5, 5, 5], 3, [(0, 0), (1, 1), (2, 2)]), ([9, 2, 2, 8], 2, [(0, 1), (2, 3)]), ([1, 1, 10], 2, [(0, 1), (2, 2)])],
)
def test_groups_are_even(weights, count, groups):
    assert group_evenly(weights, count) == groups


def test_groups_have_a_range():
    with pytest.raises(ValueError, match="count is 3, must be 1 to 2"):
        group_evenly([1, 2], 3)


def test_first_section_owns_what_later_ones_repeat():
    teacher = ExtractiveTeacher()
    plan = teacher.plan(TOWN)
    assert [stream.header for stream in plan.streams] == ["History", "People", "Nature"]
    told = [(n, s.kind, s.cue, s.value, s.owner) for n, x in enumerate(teacher.notes(TOWN, plan)) for s in x.spans]
    assert told == [
        (0, "own", "founded in", "1790", 0),
        (0, "own", "founded by", "Anna de Vries", 0),
        (0, "own", "capital of the region", "Ostrava", 0),
        (1, "own", "number of inhabitants", "1,200 inhabitants", 1),
        (1, "sibling", "founded by", "Anna de Vries", 0),
        (2, "own", "river in km", "12 km", 2),
        (2, "sibling", "founded in", "1790", 0),
        (2, "sibling", "capital of the region", "Ostrava", 0),
    ]


def test_plans_never_hold_a_value():
    teacher = ExtractiveTeacher()
    plan = teacher.plan(TOWN)
    texts = [plan.prompt, *(i.text for i in plan.items), *(f"{s.header} {s.summary}" for s in plan.streams)]
    values = {span.value for section in teacher.notes(TOWN, plan) for span in section.spans}
    assert not [(value, text) for value in values for text in texts if value in text]
    assert plan.streams[0].summary == "Velmar was founded in ... by ...."


def test_notes_follow_the_plan_that_they_get():
    teacher = ExtractiveTeacher()
    plan = teacher.plan(TOWN)
    fewer = type(plan)(plan.prompt, plan.items[1:], plan.streams)
    left = {span.item_id for section in teacher.notes(TOWN, fewer) for span in section.spans}
    assert left == {item.item_id for item in plan.items[1:]}


def document(*texts, title="Things"):
    return SourceDocument("d", "x", title, tuple((f"Part {n}", text) for n, text in enumerate(texts)))


@pytest.mark.parametrize(
    ("source", "reason", "choices"),
    [
        (document("It was founded in 1790."), "too_few_sections", {}),
        (document("Short in 1790.", "Short in 1791."), "too_short", {}),
        (document("plain words " * 20, "plain words " * 20), "too_few_facts", {}),
        (document("founded in 1790 " + "x " * 20, "lost in 1791 " + "x " * 20), "too_few_repeats", {"min_repeats": 1}),
    ],
)
def test_rejections_have_reasons(source, reason, choices):
    with pytest.raises(Rejection) as caught:
        ExtractiveTeacher(**choices).plan(source)
    assert caught.value.reason == reason


def test_long_sections_end_with_a_sentence():
    source = document("It was founded in 1790. " + "More of it. " * 30, "It was sold in 1800. " + "More of it. " * 30)
    plan = ExtractiveTeacher(max_section_words=40).plan(source)
    texts = [source.text[s.start : s.end] for s in plan.streams]
    assert [len(text.split()) for text in texts] == [38, 38]
    assert all(text.endswith(".") for text in texts)


@pytest.mark.parametrize(("field", "value"), [("max_streams", 9), ("max_items", 0), ("min_section_words", 500)])
def test_fields_have_ranges(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, must be"):
        ExtractiveTeacher(**{field: value})


def test_fingerprint_names_every_choice():
    assert pickle.loads(pickle.dumps(ExtractiveTeacher())) == ExtractiveTeacher()
    assert ExtractiveTeacher(max_items=3).fingerprint("plans") != ExtractiveTeacher().fingerprint("plans")


def check(count):
    """Documents by outcome; every accepted one is consistent with its text."""
    teacher, outcomes = ExtractiveTeacher(), {}
    for source in installed_documents(count):
        try:
            plan = teacher.plan(source)
        except Rejection as rejection:
            outcomes.setdefault(rejection.reason, []).append(source.document_id)
            continue
        outcomes.setdefault("accepted", []).append(source.document_id)
        sections = teacher.notes(source, plan)
        own = [span.item_id for section in sections for span in section.spans if span.kind == "own"]
        assert sorted(own) == sorted(item.item_id for item in plan.items)
        assert 2 <= len(plan.streams) <= 8
        for stream, section in zip(plan.streams, sections, strict=True):
            text = source.text[stream.start : stream.end]
            assert all(text[span.start : span.end] == span.value for span in section.spans)
            assert all(a.end <= b.start for a, b in pairwise(section.spans))
            assert {fact.subj_id for fact in section.facts} <= {entity.id for entity in section.entities} | {"e0"}
    return outcomes


def test_documents_of_this_environment():
    outcomes = check(25)
    assert sum(map(len, outcomes.values())) == 25
    assert len(outcomes["accepted"]) >= 8


@pytest.mark.slow
def test_two_hundred_documents_of_this_environment():
    outcomes = check(240)
    documents = [document_id for found in outcomes.values() for document_id in found]
    assert len(documents) == len(set(documents)) >= 200
    assert len(outcomes["accepted"]) >= 60
