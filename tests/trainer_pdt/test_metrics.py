"""Modules for `evaluate`: loaded from folders and from the package, equal to the functions they wrap, by hand."""

import re
import shutil
from functools import cache
from pathlib import Path

import evaluate
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tests.trainer_pdt.test_decode_metrics import make_run
from trainer_pdt.calibration import Judgements, assess, calibrate
from trainer_pdt.data.counting import StreamText, count_document, reference_rate
from trainer_pdt.data.publish import documents_to_dataset
from trainer_pdt.decode_metrics import compare_texts
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.metrics import METRICS, load_metric
from trainer_pdt.nli import score_worlds

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "trainer_pdt/metrics"
PROBABILITIES = [0.9, 0.8, 0.7, 0.4, 0.3, 0.2]
TRUTHS = [True, True, False, True, False, False]
DOCUMENTS = ["a", "b", "a", "b", "a", "b"]
WHEAT, RYE, RED = "main crop wheat", "main crop rye", "flag color red"
metric = cache(load_metric)


def test_every_folder_is_a_module():
    assert sorted(METRICS) == sorted(path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").is_file())
    with pytest.raises(ValueError, match="name='bleu', allowed: agreement, "):
        load_metric("bleu")


@pytest.mark.parametrize("name", METRICS)
def test_modules_load_from_any_folder(name, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path / name)
    module = evaluate.load(str(tmp_path / name))
    assert module.name == metric(name).name == name
    assert set(module.features) <= {"predictions", "references"}
    for part in ("Args:", "predictions", "Returns:"):
        assert part in module.compute.__doc__


def test_the_example_of_the_docs_runs(capsys):
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/metrics.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1.0 0.")
    table = text.split("## As `evaluate` modules")[1]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(METRICS)


def test_coverage_by_hand():
    judged = {"predictions": PROBABILITIES, "references": TRUTHS, "samples": 20}
    found = metric("coverage").compute(**judged, documents=DOCUMENTS, threshold=0.5)
    assert found["precision"]["mean"] == found["recall"]["mean"] == found["f1"]["mean"] == pytest.approx(2 / 3)
    assert found["average_precision"]["mean"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert len(found["points"]) == 49 and found["documents"] == 2
    by_document = [[(0.9, True), (0.7, False), (0.3, False)], [(0.8, True), (0.4, True), (0.2, False)]]
    assert found == assess(Judgements.of(by_document, finds=True), 0.5, samples=20)
    alone = metric("coverage").compute(**judged)
    assert alone["documents"] == len(TRUTHS) and alone["threshold"]["mean"] == 0.32


def test_agreement_by_hand():
    judged = {"predictions": PROBABILITIES, "references": TRUTHS, "samples": 20}
    found = metric("agreement").compute(**judged, threshold=0.5)
    # Withdrawn below 0.5: two contradictions and one sound block of three each.
    assert found["recall"]["mean"] == pytest.approx(2 / 3) and found["false_positive_rate"]["mean"] == pytest.approx(
        1 / 3
    )
    assert found["auroc"]["mean"] == pytest.approx(8 / 9)
    assert found["roc"][0] == [0, 0] and found["roc"][-1] == [1, 1] and [0, pytest.approx(2 / 3)] in found["roc"]
    chosen = metric("agreement").compute(**judged, rule="judgeable_false_alarms")
    judgements = Judgements.of([[pair] for pair in zip(PROBABILITIES, TRUTHS, strict=True)], finds=False)
    expected = calibrate(judgements, "judgeable_false_alarms", samples=20)
    assert {name: value for name, value in chosen.items() if name != "roc"} == expected
    assert chosen["threshold"]["mean"] == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": [0.5, 1.5], "references": [True, False]}, "not a number from 0 to 1"),
        ({"predictions": [0.5, float("nan")], "references": [True, False]}, "not a number from 0 to 1"),
        (
            {"predictions": [0.5], "references": [True], "documents": [1, 2]},
            "1 probabilities, 1 truths and 2 documents",
        ),
        ({"predictions": [0.5], "references": [True], "rule": "best"}, "rule='best', allowed: .*'best_f1'"),
    ],
)
def test_judgements_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        metric("agreement").compute(**options)


def test_sibling_fact_recall_counts_as_the_evaluation():
    documents = held_out_documents("test", 6, 2)
    rows = documents_to_dataset(documents).to_list()
    # Every section in rounds of 40 characters.
    texts = [
        [StreamText(s.text, tuple(range(40, len(s.text) + 40, 40))) for s in document.streams]
        for document in documents
    ]
    streams = [[{"text": text.text, "round_ends": list(text.round_ends)} for text in row] for row in texts]
    found = metric("sibling_fact_recall").compute(predictions=streams, references=rows, lag=2)
    counts = [count_document(document, text, lag=2) for document, text in zip(documents, texts, strict=True)]
    rate = reference_rate(counts)
    assert found["sibling_fact_recall"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": rate.n} and rate.n > 5
    assert found["classes"]["feasible"] == found["sibling_fact_recall"] and found["classes"]["pending"]["n"] > 0
    assert found["plan"]["mentions_on_plan"]["mean"] == 1
    # Another value in one section is one reference less, or the statement that others are held against.
    cue, value = next((span.cue, span.value) for span in documents[0].streams[0].spans if span.kind == "own")
    streams[0][0]["text"] = streams[0][0]["text"].replace(f"{cue} {value}", f"{cue} {'x' * len(value)}")
    changed = metric("sibling_fact_recall").compute(predictions=streams, references=rows, lag=2)
    assert changed["plan"]["valid_values"]["mean"] < 1


def test_contradiction_counts_pairs_and_judges_the_control_first():
    found = metric("contradiction").compute(predictions=[[WHEAT, RYE, RED]], scorer="worlds")
    assert found["contradicting"] == {"mean": pytest.approx(2 / 6), "low": 1 / 3, "high": 1 / 3, "n": 6}
    assert found["violation"]["mean"] == pytest.approx(2 * 0.9 / 6)
    assert found["control"]["given"]["violation"]["high"] == 0 < found["control"]["planted"]["violation"]["low"]
    own = {"given": [[WHEAT, WHEAT]], "planted": [[WHEAT, RYE]]}
    found = metric("contradiction").compute(predictions=[[RED, RED]], scorer=score_worlds, margin=0.5, control=own)
    assert found["violation"]["mean"] == 0 and found["control"]["planted"]["violation"]["mean"] == 0.5


def test_a_scorer_that_sees_nothing_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    blind = BertForSequenceClassification(BertConfig(vocab_size=2048, id2label=labels, num_labels=3, **sizes))
    torch.nn.init.zeros_(blind.classifier.weight)
    blind.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/trunk", padding_side="right").save_pretrained(tmp_path)
    own = {"given": [[WHEAT, WHEAT]], "planted": [[WHEAT, RYE]]}
    for control in (own, {"given": own["planted"], "planted": own["given"]}):
        with pytest.raises(ValueError, match=r"does not see the contradictions of the control: violation is 0\.000"):
            metric("contradiction").compute(predictions=[[RED]], scorer=str(tmp_path), control=control)
    with pytest.raises(ValueError, match=r"violation is 0\.000 .* with and 0\.900"):
        swapped = {"given": own["planted"], "planted": own["given"]}
        metric("contradiction").compute(predictions=[[RED]], scorer="worlds", control=swapped)
    with pytest.raises(ValueError, match="control has no two sections"):
        metric("contradiction").compute(
            predictions=[[RED]], scorer="worlds", control={"given": [], "planted": [[RED]]}
        )


def test_redundancy_by_hand():
    found = metric("redundancy").compute(predictions=[["x y z", "x y z", "w"], ["alone"]])
    assert found["redundancy"] == {
        "mean": pytest.approx(0.3 / 3),
        "low": pytest.approx(0.1),
        "high": pytest.approx(0.1),
        "n": 3,
    }
    assert metric("redundancy").compute(predictions=[["alone"]])["redundancy"]["mean"] is None


def fact(subject, predicate, value):
    return {"subj_id": subject, "predicate": predicate, "object": value}


def test_attribute_consistency_by_hand():
    first = [fact("E1", "crop", "wheat"), fact("E1", "river", "Ana"), fact("E1", "mayor", "Abel")]
    second = [fact("E1", "Crop", "Wheat "), fact("E1", "river", "Ola"), fact("E2", "mayor", "Bert")]
    # crop: alike; river: not; mayor: of two subjects. The third section contradicts itself on a shared attribute.
    third = [fact("E1", "mayor", "Abel"), fact("E1", "mayor", "Carl")]
    found = metric("attribute_consistency").compute(predictions=[[first, second]])["attribute_consistency"]
    assert (found["mean"], found["n"]) == (0.5, 2)
    found = metric("attribute_consistency").compute(predictions=[[first, second, third], [first], []])
    assert found["attribute_consistency"]["mean"] == pytest.approx(1 / 3)


def test_notes_of_a_published_dataset_are_consistent():
    rows = documents_to_dataset(held_out_documents("test", 8, 0, with_notes=True)).to_list()
    keys = ("subj_id", "predicate", "object")
    facts = [[[{k: f[k] for k in keys} for f in s["notes"]["facts"]] for s in row["streams"]] for row in rows]
    found = metric("attribute_consistency").compute(predictions=facts)["attribute_consistency"]
    assert found["mean"] == 1 and found["n"] > 5


def test_text_similarity_as_runs_are_compared():
    texts, others = ["a b c d", "", "one two"], ["a c d e", "", "one"]
    module = metric("text_similarity")
    for text, other in zip(texts, others, strict=True):
        module.add_batch(predictions=[text], references=[other])
    found = module.compute()
    assert found["rouge_l"]["mean"] == pytest.approx((0.75 + 1 + 2 / 3) / 3) and found["rouge_l"]["n"] == 3
    assert (found["words_more"]["mean"], found["words_more"]["n"]) == (0.5, 2)
    compared = compare_texts(make_run(merged=texts), make_run(merged=others))
    assert {name: found[name]["mean"] for name in ("rouge_l", "tf_idf_cosine")} == pytest.approx(
        {name: compared[name] for name in ("rouge_l", "tf_idf_cosine")}
    )


def test_dependency_ce_by_hand():
    losses, depends = [[1.0, 0.5], [2.0]], [[True, False], [True]]
    found = metric("dependency_ce").compute(predictions=losses, references=depends)
    assert found["dependency"]["notes"]["mean"] == 1.5 and found["dependency_gain"] == {}
    conditions = {"no_notes": [[3.0, 0.5], [2.5]]}
    found = metric("dependency_ce").compute(predictions=losses, references=depends, conditions=conditions)
    assert found["dependency_gain"]["no_notes"] == {"mean": 1.25, "low": 0.5, "high": 2.0, "n": 2}
    assert found["non_dependency_gain"]["no_notes"]["mean"] == 0


def test_note_usage_by_hand():
    notes = [{"stream": 1, "round": 0, "weight": 0.3}, {"stream": 2, "round": 0, "weight": 0.1}]
    block = {"stream": 0, "round": 1, "gate": 0.5, "sink": 0.4, "plan": 0.2, "notes": notes}
    repeats = {"stream": 0, "round": 1, "source": 1, "source_round": 0}
    found = metric("note_usage").compute(predictions=[[block], []], references=[[repeats], []])
    assert found["notes"]["mean"] == pytest.approx(0.4) and found["source"]["mean"] == pytest.approx(0.75)
    assert found["source_even"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
