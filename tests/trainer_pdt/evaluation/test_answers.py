"""Sections on whole answers: consistency with its controls, likeness to sequential ones, and how modes are written."""

import inspect
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trainer_pdt.evaluation.test_sections import written_of
from trainer_pdt.evaluation import suite
from trainer_pdt.evaluation.answer_tables import consistency_table, similarity_table
from trainer_pdt.evaluation.answers import answer_similarity, consistency, nli, similarity
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.bert_score import check_bert_score
from trainer_pdt.evaluation.consistency import check_control, standard_control, stated_facts
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.evaluation.suite import Evaluation
from trainer_pdt.features import collect_values
from trainer_pdt.metrics import load_metric
from trainer_pdt.nli import score_worlds

ROOT = Path(__file__).parents[3]


@pytest.fixture
def evaluation():
    """An evaluation in which every mode writes the documents' own texts."""
    made = Evaluation.__new__(Evaluation)
    made.documents, made.control_documents = held_out_documents("test", 20, 1), held_out_documents("test", 24, 2)
    made.model = SimpleNamespace(
        generation_config=SimpleNamespace(agreement_threshold=0.25, agreement_scaling=[0.5, 1.0]),
        config=SimpleNamespace(block_size=12),
    )
    made.arguments = EvaluationArguments(suite="full")
    made.features = SimpleNamespace(
        values=collect_values(held_out_documents("train", 60, 0)), corruption_rate=0.5, seed=0
    )
    made.nli_scorer, made.lag, made.capacity = score_worlds, 1, 16
    made.written, made.counts, made._calibration, made.calls = {}, {}, {}, []

    def writers(write, documents, batch_size, **options):
        made.calls.append((write.__name__, options))
        return written_of(documents)

    made.writers = writers
    return made


def test_every_mode_is_written_its_own_way(evaluation):
    gate_off = {"agreement_threshold": None, "seed": 0}
    expected = {
        "pdt": ("write_parallel", {**gate_off, "interventions": []}),
        "pdt_gate": ("write_parallel", {**gate_off, "agreement_threshold": 0.25, "agreement_scaling": [0.5, 1.0]}),
        "independent": ("write_parallel", {**gate_off, "trunk_only": True}),
        "sequential": ("write_sequential", {"seed": 0}),
        "sequential_again": ("write_sequential", {"seed": suite.OTHER_DRAWS}),
        "full_text": ("write_full_text", {"seed": 0, "block_size": 12}),
    }
    for mode, call in expected.items():
        evaluation.write(mode)
        assert evaluation.calls[-1] == call
    evaluation.write("ablated")
    assert [type(one).__name__ for one in evaluation.calls[-1][1]["interventions"]] == ["Ablate"]
    evaluation.write("pdt_gate_stale", agreement_threshold=0.5, retry_policy="stale")
    assert evaluation.calls[-1][1] == {"agreement_threshold": 0.5, "retry_policy": "stale", "seed": 0}


def test_sections_are_held_against_each_other_with_controls(evaluation):
    found = consistency(evaluation)
    assert list(found) == ["pdt", "pdt_gate", "independent", "sequential", "full_text", "given", "planted"]
    assert found["given"]["attribute_consistency"]["mean"] == 1 > found["planted"]["attribute_consistency"]["high"]
    assert found["pdt"] == found["given"] and found["given"]["attribute_consistency"]["n"] > 10
    assert 0 <= found["given"]["redundancy"]["mean"] <= 0.3
    judged = nli(evaluation)["nli_violation"]
    assert judged["pdt_gate"]["contradicting"]["mean"] == 0 < judged["planted"]["contradicting"]["low"]
    assert len(evaluation.calls) == 5
    rows = consistency_table({"consistency": found}).rows
    assert rows[0][0] == "PDT, notes on" and rows[-1][1] != "1.000 (1.000 to 1.000)" == rows[0][1]
    evaluation.model.generation_config.agreement_threshold = None
    assert "pdt_gate" not in consistency(evaluation)


def test_answers_are_set_beside_sequential_ones(evaluation):
    found = similarity(evaluation)
    assert list(found) == ["pdt", "pdt_gate", "independent", "sequential", "full_text"]
    assert ("write_sequential", {"seed": suite.OTHER_DRAWS}) in evaluation.calls
    assert [found["pdt"][name]["mean"] for name in ("rouge_l", "tf_idf_cosine")] == pytest.approx([1, 1])
    assert found["pdt"]["words_more"]["mean"] == found["independent"]["words_more"]["mean"] == 0
    # Controls write more documents, and hard ones of their own: pairs are made of those that both have written.
    assert (found["pdt"]["rouge_l"]["n"], found["independent"]["rouge_l"]["n"]) == (21, 20)
    rows = similarity_table({"similarity": found}).rows
    assert "sequential (control)" in [row[0] for row in rows]
    assert answer_similarity(["a b"], [""])["words_more"]["mean"] is None


def test_facts_of_a_section():
    facts = stated_facts("Its feast dish wheat is good. They praise the flag color red.")
    assert [(fact.predicate, fact.object) for fact in facts] == [("main crop", "wheat"), ("flag color", "red")]


def test_a_blind_scorer_is_refused_before_anything_is_written(monkeypatch):
    assert check_control(score_worlds, standard_control())["given"]["violation"]["mean"] == 0
    monkeypatch.setattr(suite, "load_nli_scorer", lambda name: lambda one, other: score_worlds(one, one))
    with pytest.raises(ValueError, match="does not see the contradictions of the control"):
        Evaluation(None, None, EvaluationArguments(nli_scorer="blind"))


class Scorer:
    """In place of the library's: F1 is the share of words of the answer that the reference has."""

    made = []

    def __init__(self, **options):
        self.made.append(options)

    def score(self, answers, references):
        f1 = torch.tensor(
            [len(set(a.split()) & set(r.split())) / len(a.split()) for a, r in zip(answers, references, strict=True)]
        )
        return f1 * 0, f1 * 0, f1


def test_bert_score_is_taken_from_its_library(monkeypatch):
    options = {"model_type": "a/b", "num_layers": 4}
    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=Scorer, __spec__=object()))
    found = answer_similarity(["a b", "c d"], ["a x", "c d"], options)
    assert found["bert_score_f1"]["mean"] == 0.75 and Scorer.made == [options]
    assert [row[3] for row in similarity_table({"similarity": {"pdt": found}}).rows] == ["0.750 (0.500 to 1.000)"]
    assert "bert_score_f1" not in answer_similarity(["a"], ["a"], {})
    assert EvaluationArguments(bert_score=options).bert_score == options
    with pytest.raises(ValueError, match="with `model_type` or `lang`"):
        EvaluationArguments(bert_score={"num_layers": 4})
    found = load_metric("text_similarity").compute(predictions=["a b"], references=["a x"], bert_score=options)
    assert found["bert_score_f1"]["mean"] == 0.5


@pytest.mark.skipif(find_spec("bert_score") is not None, reason="the library is installed")
def test_without_the_library_bert_score_says_how_to_get_it():
    with pytest.raises(ImportError, match='pip install "bert-score>='):
        EvaluationArguments(bert_score={"lang": "en"})
    (bound,) = re.findall(r'"bertscore": \["(.*?)"\]', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert bound in inspect.getsource(check_bert_score)
