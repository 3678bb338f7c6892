"""`data: own`: what the model writes itself, judged as evaluation judges it, written once, the same after a resume."""

import pytest
import torch

from tests.tiny_training import (
    BUS_STAGE,
    HEAD_STAGE,
    make_collator,
    make_features,
    make_maker,
    make_model,
    make_trainer,
    weights,
)
from trainer_pdt.agreement_labels import planted_labels
from trainer_pdt.curriculum import WRITING_GROUPS, Stage
from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.evaluation import modes
from trainer_pdt.evaluation.blocks import documents_from_texts, score_blocks
from trainer_pdt.losses import IGNORE_INDEX
from trainer_pdt.own_text import OwnText, writing_digest

OWN_STAGE = {**HEAD_STAGE, "name": "own", "data": "own"}


@pytest.fixture(scope="module")
def model():
    return make_model()


def own_text(folder, model):
    return OwnText(folder, model, make_maker(), make_collator(model), seed=3)


def contradicting_texts(documents):
    """The documents' own texts, in which the second stream repeats another value than its sibling states."""
    texts = []
    for document in documents:
        stream = next(stream for stream in document.streams if any(span.kind == "sibling" for span in stream.spans))
        span = next(span for span in stream.spans if span.kind == "sibling")
        pool = make_maker().values[span.cue]
        value = next(value for value in pool if value != span.value)
        sections = [stream.text for stream in document.streams]
        sections[stream.stream_id] = stream.text[: span.start] + value + stream.text[span.end :]
        texts.append(sections)
    return texts


@pytest.fixture
def documents():
    return [generate_document("train", index, WorldOptions(3)) for index in range(4)]


@pytest.fixture
def told(monkeypatch):
    """Makes the model write given texts; counts its calls."""

    def tell(texts):
        calls = []

        def write(model, tokenizer, documents, **options):
            assert not model.training and options["agreement_threshold"] is None
            calls.append([document.document_id for document in documents])
            return modes.Written([[StreamText(text) for text in texts[name]] for name in calls[-1]])

        monkeypatch.setattr("trainer_pdt.own_text.write_parallel", write)
        return calls

    return tell


def test_blocks_are_judged_as_evaluation_judges_them(model, documents, told, tmp_path):
    texts = contradicting_texts(documents)
    told({document.document_id: sections for document, sections in zip(documents, texts, strict=True)})
    batch = own_text(tmp_path, model).batch(documents, "own")
    written = documents_from_texts(documents, [[StreamText(text) for text in sections] for sections in texts])
    scores = score_blocks(model, make_maker(), written)
    exists = batch["block_exists"].nonzero().tolist()
    assert [(3 * score.document + score.stream, score.round) for score in scores] == [tuple(pair) for pair in exists]
    for name in ("judgeable", "contradicts"):
        assert [getattr(score, name) for score in scores] == [bool(batch[name][row, at]) for row, at in exists]
    assert bool((batch["judgeable"] & batch["contradicts"]).any())
    # Refused tokens are those of values that differ from what a sibling has stated by then.
    labels, refused = planted_labels(batch), batch["labels"] == IGNORE_INDEX
    tokens = refused & (batch["reference"] >= 0)
    assert bool(tokens.any()) and torch.equal(labels.refused_RT, tokens)
    blocks = torch.zeros_like(labels.refused_RV)
    for row, column in tokens.nonzero().tolist():
        blocks[row, batch["write_round"][row, column]] = True
        assert batch["source_round"][row, column] <= batch["write_round"][row, column]
    assert torch.equal(blocks, batch["contradicts"] & batch["judgeable"])


def test_the_model_writes_each_document_once(model, documents, tmp_path):
    documents = documents[:2]
    model.train()
    first = own_text(tmp_path, model).batch(documents, "own")
    assert model.training
    files = sorted(tmp_path.rglob("*.json"))
    assert [file.stem for file in files] == sorted(document.document_id for document in documents)
    stamps = [file.stat().st_mtime_ns for file in files]
    again = own_text(tmp_path, model).batch(documents, "own")
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    # It is the free-running text of decoding without the gate.
    written = modes.write_parallel(model.eval(), make_maker().tokenizer, documents, seed=3, agreement_threshold=None)
    expected = documents_from_texts(documents, written.texts)
    assert [[s.text for s in document.streams] for document in expected] == [
        [section.text for section in sections] for sections in written.texts
    ]
    given = own_text(tmp_path / "other", model)
    given._texts = lambda documents, folder: [[section.text for section in sections] for sections in written.texts]
    other = given.batch(documents, "own")
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_texts_belong_to_the_weights_that_write_and_to_the_seed(model):
    name = writing_digest(model, 0)
    assert writing_digest(make_model(), 0) == name and writing_digest(model, 1) != name
    other = make_model()
    with torch.no_grad():
        other.stack.heads.agreement.score.bias.add_(1.0)
        other.stack.heads.coverage.score.bias.add_(1.0)
    assert writing_digest(other, 0) == name
    with torch.no_grad():
        other.stack.heads.note_norm.weight.add_(1.0)
    assert writing_digest(other, 0) != name


@pytest.mark.slow
def test_a_resumed_run_trains_on_the_same_text(told, tmp_path):
    features = make_features(6)
    documents = [features.document(index) for index in range(6)]
    texts = {
        document.document_id: text for document, text in zip(documents, contradicting_texts(documents), strict=True)
    }
    calls = told(texts)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_dataset": features}
    stages = [{**BUS_STAGE, "until": 0.25}, OWN_STAGE]
    whole = make_trainer(tmp_path, stages, **options)
    whole.train()
    read = [name for names in calls for name in names]
    assert read and len(set(read)) == len(read)
    assert {file.stem for file in (tmp_path / "own_text").rglob("*.json")} == set(read)
    # Texts of the steps before the checkpoint are there; what is missing is written by weights that have not changed.
    calls.clear()
    resumed = make_trainer(tmp_path, stages, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert calls == []
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name
    assert writing_digest(resumed.model, 42) == writing_digest(whole.model, 42)


@pytest.mark.parametrize("group", WRITING_GROUPS)
def test_a_stage_on_own_text_may_not_change_what_is_written(group):
    message = rf"stages\[own\].train: '{group}' changes what is written, allowed with data='own': planner"
    with pytest.raises(ValueError, match=message):
        Stage("own", 4, (group, "agreement"), {"agree": 1.0, "lm_ce": 1.0}, data="own")


def test_where_nobody_knows_what_a_text_says_it_is_refused(tmp_path):
    features = list(make_features(4))
    with pytest.raises(ValueError, match=r"stages\[own\].data='own', allowed: with procedural worlds"):
        make_trainer(tmp_path, [OWN_STAGE], train_dataset=features)


def test_sharded_trunks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer_pdt.preconditions.is_trunk_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"stages\[own\].data='own', allowed with ZeRO-3 or FSDP2"):
        make_trainer(tmp_path, [OWN_STAGE])
