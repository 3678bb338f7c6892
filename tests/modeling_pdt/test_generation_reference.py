"""`generate` writes what the slow reference decoder writes, whatever the choices of the call are."""

from dataclasses import replace

import pytest

from tests.decoding_cases import MID, TOP, Case
from tests.decoding_comparison import compare, differences, drawn_cases, drawn_references
from tests.decoding_faults import FAULTS
from tests.decoding_reference import Choices

# Faults that the calls of `few` show.
SOON = ("lag_off_by_one", "rollback_keeps_one_token_too_many", "note_of_the_wrong_producer")
SOON_TOP = ("writer_misses_the_last_token",)


def few(models):
    """Three short calls, and their reference decoders."""
    return drawn_references(3, seed=0, longest=8, models=models)


def cases_until_noticed(name, pairs):
    """
    How many calls it takes until one differs from its reference, made without the fault; `None` if none does, or if
    the reference goes wrong in the same way.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        FAULTS[name].plant(monkeypatch)
        for number, (case, reference) in enumerate(pairs, start=1):
            if differences(case, reference):
                return number if differences(case, case.reference()) else None
    return None


@pytest.mark.parametrize("models", [MID, TOP], ids=["mid", "top"])
def test_a_few_calls(models):
    assert [differences(case, reference) for case, reference in few(models)] == [[], [], []]


@pytest.mark.parametrize("name", [*SOON, *SOON_TOP])
def test_a_few_planted_faults(name):
    assert cases_until_noticed(name, few(FAULTS[name].models))


def test_rounds_are_kept_by_the_attention_that_they_got():
    """With rewritten blocks, whose reading must not count; two streams and two prompts."""
    choices = Choices(max_new_tokens=8, block_size=1, bus_capacity=2, retention="scored", retention_score="attention")
    choices = replace(choices, agreement_threshold=0.6)
    prompts, headers = [[5, 6, 7], [8, 9, 10, 11]], [["4 5", ""], ["9", "11 12"]]
    case = Case("llama", choices, prompts, [1, 0], headers)
    reference = case.reference()
    assert differences(case, reference) == [] and any(row.retries for row in reference.rows)
    assert case.sections() != replace(case, choices=replace(choices, retention_score="novelty")).sections()


def test_the_gate_is_clamped_while_the_best_covered_item_changes():
    guard = {"window": 2, "max_switches": 0, "clamp": 4.0}
    choices = Choices(max_new_tokens=8, block_size=2, agreement_threshold=0.6, flicker_guard=guard)
    items = [[("57 27", None), ("51 59", 0), ("29 5 19", 1)]]
    case = Case("gpt_oss", choices, [[5, 6, 7]], [0], [["35 34", ""]], items=items)
    assert differences(case, case.reference()) == []
    commits = case.decode().trace.of_kind("commit")
    assert {event["switches"] for event in commits if event["flickers"]} == {1}
    assert case.sections() != replace(case, choices=replace(choices, flicker_guard=None)).sections()


@pytest.mark.slow
@pytest.mark.parametrize("models", [MID, TOP], ids=["mid", "top"])
def test_forty_calls(models):
    assert compare(40, seed=1, models=models) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault(name, record_property):
    number = cases_until_noticed(name, drawn_references(60, seed=2, models=FAULTS[name].models))
    record_property("cases", number)
    assert number


@pytest.mark.slow
def test_notes_change_what_is_written():
    """Else a fault in what is read could not show."""
    several = [case for case in drawn_cases(40, seed=3) if case.choices.num_streams > 1 and case.choices.logit_blend]
    changed = [case.sections() != case.without_notes().sections() for case in several]
    assert sum(changed) > 0.8 * len(several)


@pytest.mark.soak
@pytest.mark.parametrize("piece", range(10))
def test_five_hundred_calls(piece, record_property):
    ties = compare(50, seed=100 + piece)
    record_property("ties", ties)
    assert ties <= 1
