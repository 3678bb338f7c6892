"""Sections of an evaluation: registry, resuming, what is kept by document; measurements on documents of their own."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modeling_pdt.sampling import keyed_uniform
from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.evaluation import further, oracle, sections
from trainer_pdt.evaluation.arguments import (
    FURTHER_SECTIONS,
    STANDARD_SECTIONS,
    SUITES,
    EvaluationArguments,
)
from trainer_pdt.evaluation.documents import two_hop_documents
from trainer_pdt.evaluation.modes import Written
from trainer_pdt.evaluation.oracle import ChosenBlocks, first_contradiction, write_oracle
from trainer_pdt.evaluation.scoring import count_written
from trainer_pdt.evaluation.sections import SECTIONS, run_sections, take_documents
from trainer_pdt.telemetry import read_json


def written_of(documents, **changes):
    """Documents as their own texts, in rounds of 40 characters."""
    texts = []
    for document in documents:
        ends = [tuple(range(40, len(stream.text) + 40, 40)) for stream in document.streams]
        texts.append([StreamText(s.text, end) for s, end in zip(document.streams, ends, strict=True)])
    return Written(texts, [[] for _ in texts], changes.get("events", [[] for _ in texts]))


class Writes:
    """In place of `Writers`: the documents' own texts; keeps what was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, write, documents, batch_size, **options):
        self.calls.append((write.__name__, len(documents), options))
        return written_of(documents)


def make_evaluation(tmp_path=None, **arguments):
    """What sections share, without a model that could write."""
    generation = SimpleNamespace(agreement_threshold=0.25, agreement_scaling=[0.5, 1.0], coverage_threshold=0.5)
    return SimpleNamespace(
        arguments=EvaluationArguments(output_folder=str(tmp_path), **arguments),
        model=SimpleNamespace(
            config=SimpleNamespace(block_size=12, notes_per_block=4, commit_horizon=12),
            generation_config=generation,
            pdt_parameters=lambda: {"a": torch.ones(2)},
        ),
        lag=1,
        capacity=16,
        writers=Writes(),
        common=lambda: {"batch_size": 8, "seed": 0},
        calibration=lambda: {},
        adopted=[],
    )


def test_every_section_has_a_name_and_a_measurement():
    assert tuple(SECTIONS) == (*SUITES["full"], *FURTHER_SECTIONS)
    assert EvaluationArguments().sections == list(STANDARD_SECTIONS)


def test_a_suite_chooses_the_sections():
    full = EvaluationArguments(suite="full")
    assert full.sections == list(SUITES["full"]) and set(STANDARD_SECTIONS) < set(full.sections)
    assert full.nli_scorer == "worlds" and EvaluationArguments(suite="full", nli_scorer="a/b").nli_scorer == "a/b"
    assert EvaluationArguments(sections=["nli"], nli_scorer="worlds", resume=True).sections == ["nli"]


CURVES = {"sections": ["curves"], "section_documents": {"curves": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sections": ["recalls"]}, "did you mean 'recall'"),
        ({"sections": []}, "one or more different ones"),
        ({"sections": ["two_hop"]}, r"a number of documents for each of \['two_hop'\]"),
        ({"section_documents": {"two_hop": 5}}, "none of the further ones"),
        ({"sections": ["two_hop"], "section_documents": {"two_hop": 1}}, "section_documents.two_hop=1"),
        ({"suite": "ful"}, "did you mean 'full'"),
        ({"suite": "full", "sections": ["recall"]}, "none with suite='full'"),
        ({"curves": {"bus_lag": [1]}}, "values with the section 'curves'"),
        (CURVES, "values with the section 'curves'"),
        ({**CURVES, "curves": {"lag": [1]}}, "did you mean 'bus_lag'"),
        ({**CURVES, "curves": {"num_streams": [7]}}, "at least 2 and at most 6"),
        ({**CURVES, "curves": {"bus_lag": []}}, "one or more different values"),
        ({**CURVES, "curves": {"agreement_threshold": [1.5]}}, "at most 1.0"),
    ],
)
def test_impossible_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**changes)


def test_sections_are_kept_for_the_same_arguments_and_adapters(tmp_path, monkeypatch):
    ran, seconds, states, code = [], [], [], ["first"]
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(sections, "git_state", lambda: code[0])
    monkeypatch.setattr(sections, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    made = {
        "recall": lambda evaluation: ran.append("recall") or {"sibling_fact_recall": {"pdt": 1.0}},
        "calibration": lambda evaluation: ran.append("calibration") or {"coverage": {"threshold": {"mean": 0.4}}},
        "text": lambda evaluation: ran.append("text") or {"pdt": 0.5},
    }
    monkeypatch.setattr(sections, "SECTIONS", made)

    def run(adapters=1.0, **changes):
        ran.clear()
        evaluation = make_evaluation(tmp_path, sections=list(made), **{"resume": True, **changes})
        evaluation.model.pdt_parameters = lambda: {"a": torch.full((2,), adapters)}
        evaluation.adopt_calibration = evaluation.adopted.append
        report = run_sections(evaluation)
        seconds.append(report.pop("seconds"))
        states.append(report.pop("git"))
        assert report == {
            "sibling_fact_recall": {"pdt": 1.0},
            "calibration": {"coverage": {"threshold": {"mean": 0.4}}},
            "text_ce": {"pdt": 0.5},
        }
        return list(ran), evaluation.adopted

    assert run() == (["recall", "calibration", "text"], [])
    assert run() == ([], [{"coverage": {"threshold": {"mean": 0.4}}}])
    (tmp_path / "sections/text.json").unlink()
    code[0] = "second"
    assert run(threads=1)[0] == ["text"]
    assert states == [["first"], ["first"], ["first", "second"]]
    assert run(threads=1, suite="standard", judge={"model": "m"}, bert_score={})[0] == []
    assert run(eval_seed=3)[0] == list(made)
    assert run(eval_seed=3, adapters=2.0)[0] == list(made)
    # Ten for each section, in whichever call it was measured.
    assert set(seconds) == {30.0}
    before = read_json(tmp_path / "sections/text.json")
    assert run(resume=False)[0] == list(made)
    assert read_json(tmp_path / "sections/text.json") == before


def test_what_was_counted_by_document_is_taken_out():
    report = {
        "recall": {"pdt": {"mean": 0.5, "n": 2, "clusters": ((1, 2),)}, "none": {"mean": None}},
        "agreement": {"auroc": 0.5, "decisions": {"planted": [[(0.5, True)]]}},
        "points": {"0.5": {"rate": {"mean": 0.1, "clusters": ((0, 1),)}}},
    }
    figures, documents = take_documents(report)
    assert figures == {
        "recall": {"pdt": {"mean": 0.5, "n": 2}, "none": {"mean": None}},
        "agreement": {"auroc": 0.5},
        "points": {"0.5": {"rate": {"mean": 0.1}}},
    }
    assert documents == {
        "recall/pdt": ((1, 2),),
        "agreement/decisions/planted": [[(0.5, True)]],
        "points/0.5/rate": ((0, 1),),
    }


def test_two_hop_documents_have_a_repeated_linked_fact():
    documents = two_hop_documents(3)
    assert len({document.document_id for document in documents}) == 3
    for document in documents:
        assert any(span.hops == 2 for stream in document.streams for span in stream.spans)


def test_further_sections_compare_with_what_could_be_reached():
    names = FURTHER_SECTIONS[:2]
    evaluation = make_evaluation(sections=list(names), section_documents=dict.fromkeys(names, 24))
    text = further.note_text(evaluation)
    assert set(text) == {"pdt", "sequential", "full_text", "note_text"}
    slots = [options.get("slots") for name, _, options in evaluation.writers.calls if name == "write_full_text"]
    assert slots == [None, 4]
    hops = further.two_hop(evaluation)
    assert set(hops) == {"linked", "repeated", "guessed"}
    assert all(set(found) == {"pdt", "ablated", "sequential"} for found in hops.values())
    assert hops["linked"]["pdt"]["n"] > 0 and hops["repeated"]["pdt"]["mean"] == 1.0
    documents = two_hop_documents(24)
    second = [
        entry.source_timing
        for count in count_written(documents, written_of(documents).texts, evaluation.lag, evaluation.capacity)
        for entry in count.select("feasible", lambda entry: entry.hops == 2)
    ]
    assert 0 < hops["repeated"]["pdt"]["n"] == second.count("feasible") < len(second)
    assert hops["guessed"]["pdt"]["n"] == len(second) - second.count("feasible")
    parallel = [options for name, _, options in evaluation.writers.calls if name == "write_parallel"]
    assert parallel and all(options["agreement_threshold"] is None for options in parallel)


def test_curves_vary_one_factor_at_a_time():
    wanted = {"bus_lag": [1, 2], "num_streams": [2, 4], "block_size": [24], "bus_capacity": [1]}
    wanted["agreement_threshold"] = [0.5]
    evaluation = make_evaluation(sections=["curves"], section_documents={"curves": 8}, curves=wanted)
    found = further.curves(evaluation)
    assert {factor: list(points) for factor, points in found.items()} == {
        factor: [str(value) for value in values] for factor, values in wanted.items()
    }
    # Counted with the point's own lag and capacity, on the same texts.
    assert found["bus_lag"]["2"]["classes"]["pending"]["n"] > 0 == found["bus_lag"]["1"]["classes"]["pending"]["n"]
    assert found["bus_capacity"]["1"]["classes"]["evicted"]["n"] > 0
    assert set(found["num_streams"]["4"]) == {"pdt", "ablated", "sequential", "classes", "chance"}
    assert "blocks_rolled" in found["agreement_threshold"]["0.5"]
    calls = [(name, options) for name, _, options in evaluation.writers.calls]
    assert ("write_in_blocks", {"seed": 0, "agreement_threshold": None, "block_size": 24}) in calls
    assert ("write_parallel", {"seed": 0, "agreement_threshold": 0.5, "agreement_scaling": [0.5, 1.0]}) in calls
    json.dumps(found)


def test_a_block_beyond_the_commit_horizon_is_allowed_for_the_call(monkeypatch):
    model, seen = make_evaluation().model, []
    monkeypatch.setattr(further, "write_parallel", lambda m, *rest, **options: seen.append(m.config.commit_horizon))
    further.write_in_blocks(model, None, [], block_size=24)
    further.write_in_blocks(model, None, [], block_size=6)
    assert seen == [24, 12] and model.config.commit_horizon == 12


def test_chosen_blocks_are_withdrawn_once():
    gate = ChosenBlocks([[(1, 0)], [(0, 2)]], num_streams=2)
    rows, rounds = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 2])
    attempts = torch.tensor([0, 0, 0, 0, 1])
    assert gate.agreement(torch.rand(5), rows, rounds, attempts).tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="must have 3 entries"):
        gate.check(3)


def test_the_first_contradiction_is_the_earliest_that_can_be_known():
    document = next(d for d in generate_documents("test", 0, 40, with_notes=False) if "core" in d.split_tags)
    (counts,) = count_written([document], written_of([document]).texts, 1, 16)
    entry = next(r for r in counts.references if r.timing == "feasible")

    def wrong(*places):
        made = [replace(entry, stream=s, round=r, value="otherwise", timing=t) for s, r, t in places]
        return replace(counts, references=tuple(made))

    assert first_contradiction(counts, []) is None
    several = wrong((1, 3, "feasible"), (2, 1, "late"), (0, 2, "same"), (2, 2, "pending"))
    assert first_contradiction(several, []) == (0, 2)
    assert first_contradiction(several, [(0, 2)]) == (2, 2)
    assert first_contradiction(several, [(0, 2), (2, 2), (1, 3)]) is None


def test_the_oracle_rewrites_one_block_after_the_other_until_none_is_left(monkeypatch):
    """A pretended decoder: a section's rounds are wrong or right by chance, and another attempt draws again."""
    documents = list(generate_documents("test", 0, 6, with_notes=False))
    passes = []

    def write(model, tokenizer, some, interventions, batch_size, **options):
        (gate,) = interventions
        passes.append((len(some), options))
        texts = [[(d, chosen)] for d, chosen in zip(some, gate.blocks, strict=True)]
        return Written(texts, [[]] * len(some), [[]] * len(some))

    def count(some, texts, lag, capacity):
        assert (lag, capacity) == (1, 16)
        return [(documents.index(d), chosen) for [(d, chosen)] in texts]

    def first(counts, known):
        index, chosen = counts
        assert frozenset(known) == chosen
        zeros = torch.zeros(3, dtype=torch.long)
        draws = keyed_uniform(zeros + index, torch.arange(3), zeros, zeros)
        wrong = [(0, place) for place in range(3) if draws[place] < 0.5 and (0, place) not in known]
        return wrong[0] if wrong else None

    monkeypatch.setattr(oracle, "write_parallel", write)
    monkeypatch.setattr(oracle, "count_written", count)
    monkeypatch.setattr(oracle, "first_contradiction", first)
    written = write_oracle(None, None, documents, lag=1, capacity=16, batch_size=4, retry_policy="stale")
    assert [texts[0][0] for texts in written.texts] == documents
    expected = [len(texts[0][1]) for texts in written.texts]
    assert max(expected) >= 2 and sum(size for size, _ in passes) == len(documents) + sum(expected)
    assert all(options == {"retry_policy": "stale", "agreement_threshold": 0.5} for _, options in passes)


def test_rollback_has_its_controls():
    evaluation = make_evaluation(sections=["rollback_controls"], section_documents={"rollback_controls": 4})
    found = oracle.rollback_controls(evaluation)["rollback"]
    assert list(found) == ["none", "head", "head_stale", "random", "oracle", "oracle_stale"]
    calls = {name: options for name, (_, _, options) in zip(found, evaluation.writers.calls, strict=True)}
    assert calls["none"]["agreement_threshold"] is None and calls["head"]["agreement_threshold"] == 0.25
    assert calls["head"]["agreement_scaling"] == calls["head_stale"]["agreement_scaling"] == [0.5, 1.0]
    assert calls["head_stale"]["retry_policy"] == calls["oracle_stale"]["retry_policy"] == "stale"
    assert calls["random"]["rate"] == 0.0
    evaluation.model.generation_config.agreement_threshold = None
    with pytest.raises(ValueError, match="agreement_threshold is None"):
        oracle.rollback_controls(evaluation)
