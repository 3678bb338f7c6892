"""Contradictions between sections: pairs, hand-made measures, controls, and the section of an evaluation."""

from types import SimpleNamespace

import pytest
import torch

from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.schema import Document
from trainer_pdt.evaluation.answer_tables import nli_table
from trainer_pdt.evaluation.answers import nli
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.consistency import judged_answers, nli_measures, sibling_pairs
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.features import collect_values
from trainer_pdt.nli import score_worlds

CROPS = ["main crop wheat", "main crop rye", "flag color red"]


@pytest.fixture(scope="module")
def documents():
    return held_out_documents("test", 30, 10)


@pytest.fixture(scope="module")
def features():
    values = collect_values(held_out_documents("train", 100, 100))
    return SimpleNamespace(values=values, corruption_rate=0.5, seed=0)


def texts_of(documents: list[Document]) -> list[list[StreamText]]:
    return [[StreamText(stream.text) for stream in document.streams] for document in documents]


def test_pairs_are_of_different_sections_in_both_orders():
    assert sibling_pairs(["a", "b", "a "]) == [
        *(("a", "b"), ("a", "a "), ("b", "a")),
        *(("b", "a "), ("a ", "a"), ("a ", "b")),
    ]
    assert sibling_pairs(["alone"]) == []
    assert len(sibling_pairs(["same", "same"])) == 2


def test_measures_by_hand():
    found = nli_measures(score_worlds, [CROPS, ["main crop wheat"] * 3])
    assert found["contradicting"]["mean"] == pytest.approx(2 / 12)
    assert found["violation"]["mean"] == pytest.approx(2 * 0.9 / 12)
    assert found["contradicting"]["n"] == found["violation"]["n"] == 12
    assert 0 <= found["contradicting"]["low"] <= found["contradicting"]["high"] <= 2 / 6
    assert nli_measures(score_worlds, [])["violation"] == {"mean": None, "low": None, "high": None, "n": 0}


def test_margin_and_neutral_count():
    def scorer(premises, hypotheses):
        return torch.tensor([[0.5, 0.25], [0.5, 0.0]])

    found = nli_measures(scorer, [["one", "two"]], margin=0.25)
    assert found["violation"]["mean"] == pytest.approx(0.125)
    assert found["contradicting"]["mean"] == 0.5


def test_the_scorer_sees_what_was_planted_and_nothing_else(documents, features):
    answers = judged_answers({"pdt": texts_of(documents), "ablated": []}, documents, features)
    assert list(answers) == ["pdt", "given", "planted"]
    assert answers["pdt"] == answers["given"] != answers["planted"]
    given, planted = (nli_measures(score_worlds, answers[name]) for name in ("given", "planted"))
    assert given["contradicting"]["mean"] == given["violation"]["mean"] == 0
    changed = [one != other for one, other in zip(answers["given"], answers["planted"], strict=True)]
    for index, one in enumerate(answers["planted"]):
        assert (nli_measures(score_worlds, [one])["contradicting"]["mean"] > 0) == changed[index]
    assert planted["contradicting"]["mean"] > 0.1


def section(scorer, documents, features):
    arguments = EvaluationArguments(nli_scorer="worlds")
    stub = SimpleNamespace(nli_scorer=scorer, arguments=arguments, documents=documents, features=features)
    stub.calibration = dict
    stub.comparable_modes = lambda: ["pdt"]
    stub.write = lambda mode: SimpleNamespace(texts=texts_of(documents[:2]))
    return nli(stub)


def test_section_of_an_evaluation(documents, features):
    assert section(None, documents, features) == {}
    assert EvaluationArguments().nli_scorer is None
    found = section(score_worlds, documents, features)["nli_violation"]
    assert (found["scorer"], found["margin"]) == ("worlds", 0.1)
    assert found.keys() == {"scorer", "margin", "pdt", "given", "planted"}
    table = nli_table({"nli_violation": found})
    assert [row[0] for row in table.rows] == [
        "PDT, notes on",
        "held-out documents themselves (control)",
        "the same with planted contradictions (control)",
    ]
    assert table.rows[0] == ["PDT, notes on", "0.000 (0.000 to 0.000)", "0.000 (0.000 to 0.000)", "12"]
    assert table.note.startswith("Scorer: worlds.")
    assert not nli_table({}).rows and not nli_table({"nli_violation": {"scorer": "worlds"}}).rows
