"""NLI scorers: hand-made worlds, a tiny classifier from a folder, and models that cannot tell contradictions."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.losses import nli_violation
from trainer_pdt.nli import ModelScorer, label_columns, load_nli_scorer, score_worlds, stated_values

TRUNK = Path(__file__).parents[2] / "recipes/tiny/trunk"
LABELS = {0: "Entailment", 1: "NEUTRAL", 2: "contradiction"}
CONTRADICTS, NEUTRAL, ENTAILED = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


def config(labels, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(vocab_size=2048, max_position_embeddings=64, id2label=labels, **sizes, **options)


def save(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TRUNK, padding_side="right").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(LABELS, num_labels=3))
    torch.nn.init.normal_(model.classifier.weight)
    return save(tmp_path / "nli", model)


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("Its main crop wheat is good.", "They praise the main crop rye.", CONTRADICTS),
        ("Its main crop wheat is good.", "They praise the main crop wheat.", ENTAILED),
        ("Its main crop wheat is good.", "They praise the flag color red.", NEUTRAL),
        ("Its main crop wheat is good.", "So it is.", NEUTRAL),
        # A linked fact counts as its source, on either side; a person's name is its two words.
        ("Its feast dish wheat is good.", "They praise the main crop rye.", CONTRADICTS),
        ("Its main crop wheat is good.", "They praise the feast dish wheat.", ENTAILED),
        ("The chief farmer Anna Abbott sings.", "The chief farmer Anna Barlow sings.", CONTRADICTS),
        # One value that differs is enough, wherever it stands.
        ("Its main crop wheat, flag color red.", "A flag color blue, a main crop wheat.", CONTRADICTS),
        ("Its main crop wheat, its main crop rye.", "They praise the main crop wheat.", CONTRADICTS),
    ],
)
def test_worlds_by_hand(premise, hypothesis, expected):
    assert score_worlds([premise], [hypothesis]).tolist() == [expected]
    assert score_worlds([hypothesis], [premise]).tolist() == [expected]


def test_worlds_scores_by_pair():
    scores = score_worlds(["main crop rye", "main crop rye"], ["main crop rye", "main crop oats"])
    assert scores.tolist() == [ENTAILED, CONTRADICTS]
    assert score_worlds([], []).shape == (0, 2)
    assert stated_values("feast dish rye, main crop rye") == {"main crop": {"rye"}}


@pytest.mark.parametrize("hard", [False, True])
def test_documents_of_the_worlds_agree_with_themselves(hard):
    for index in range(60):
        document = generate_document("test", index, WorldOptions(4, hard=hard), with_notes=False)
        texts = [stream.text for stream in document.streams]
        for text in texts:
            assert not nli_violation(score_worlds, [text] * len(texts), texts).any()


def test_a_classifier_from_a_folder(folder):
    scorer = load_nli_scorer(folder)
    premises, hypotheses = ["one", "two words", "three longer words"], ["here", "there", "nowhere at all"]
    scores = scorer(premises, hypotheses)
    assert scores.shape == (3, 2) and bool((scores > 0).all()) and bool((scores.sum(dim=1) < 1).all())
    encoded = scorer.tokenizer("two words", "there", return_tensors="pt")
    with torch.no_grad():
        expected = scorer.model(**encoded).logits[0].softmax(dim=-1)
    # Contradiction first: columns are found by name.
    assert scores[1].tolist() == pytest.approx([float(expected[2]), float(expected[1])], abs=1e-5)
    alone = ModelScorer(scorer.model, scorer.tokenizer, batch_size=1)(premises, hypotheses)
    assert torch.allclose(alone, scores, atol=1e-5)
    assert scorer([], []).shape == (0, 2)
    assert nli_violation(scorer, premises, hypotheses).shape == (3,)


def test_the_classifier_loads_in_another_dtype(folder):
    scorer = load_nli_scorer(folder, dtype=torch.bfloat16)
    assert scorer.model.dtype == torch.bfloat16
    assert scorer(["one"], ["two"]).dtype == torch.float32


def test_long_pairs_are_cut_and_counted(folder, caplog):
    scorer = load_nli_scorer(folder)
    assert scorer.max_length == 64
    scores = scorer(["word " * 100, "short"], ["here", "there"])
    assert scores.shape == (2, 2)
    assert "1 of 2 pairs are longer than 64 tokens" in caplog.text


def test_neutral_is_zero_where_the_model_has_none(tmp_path):
    labels = {0: "contradiction", 1: "no_contradiction"}
    scorer = load_nli_scorer(save(tmp_path, BertForSequenceClassification(config(labels))))
    scores = scorer(["one"], ["two"])
    assert float(scores[0, 0]) > 0 == float(scores[0, 1])


@pytest.mark.parametrize("labels", [{0: "entailment", 1: "not_entailment"}, {0: "LABEL_0", 1: "LABEL_1"}])
def test_models_without_the_label_are_refused(tmp_path, labels):
    folder = save(tmp_path, BertForSequenceClassification(config(labels)))
    with pytest.raises(ValueError, match=r"has the labels \['.*'\], allowed: a model with one called 'contradiction'"):
        load_nli_scorer(folder)


def test_models_without_a_trained_classifier_are_refused(tmp_path):
    folder = save(tmp_path, BertModel(config(LABELS, num_labels=3)))
    with pytest.raises(ValueError, match=r"lacks the weights \['classifier.bias', 'classifier.weight'\]"):
        load_nli_scorer(folder)


def test_worlds_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worlds").mkdir()
    assert load_nli_scorer("worlds") is score_worlds
    with pytest.raises(ValueError, match=r"takes no \['dtype'\]"):
        load_nli_scorer("worlds", dtype=torch.float32)


def test_columns_and_batches():
    assert label_columns(LABELS, "model") == (2, 1)
    assert label_columns({0: "contradiction", 1: "entailment"}, "model") == (0, None)
    with pytest.raises(ValueError, match="batch_size=0, allowed: at least 1"):
        ModelScorer(BertForSequenceClassification(config(LABELS)), AutoTokenizer.from_pretrained(TRUNK), batch_size=0)
