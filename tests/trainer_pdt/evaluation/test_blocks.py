"""Block scores: labels of planted and of written contradictions, controls, and what calibration takes from them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GptOssForCausalLM

from modeling_pdt import PDTForParallelDecoding
from trainer_pdt import FeatureMaker
from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.schema import Document, PlanItem, Stream
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.data.worlds_lexicon import CUES
from trainer_pdt.data.worlds_parser import parse_section
from trainer_pdt.evaluation import blocks as blocks_module
from trainer_pdt.evaluation.blocks import (
    BlockScore,
    agreement_decisions,
    block_decisions,
    document_from_texts,
    score_blocks,
)
from trainer_pdt.features import collect_values, plant_contradictions
from trainer_pdt.trunk import TrunkArguments, trunk_config

TRUNK = Path(__file__).parents[3] / "recipes/tiny/trunk"
BLOCK = 12
RAW, TROPHY, FRUIT = "raw metal", "trophy metal", "snack fruit"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = TrunkArguments(
        hidden_size=32, num_layers=3, num_kv_heads=2, head_dim=8, intermediate_size=32, initializer_range=0.1
    )
    model = PDTForParallelDecoding.from_trunk(
        GptOssForCausalLM(trunk_config(sizes, tokenizer)),
        notes_dim=16,
        notes_per_block=2,
        adapter_bottleneck=4,
        block_size=BLOCK,
    )
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    """Four documents; the third links a fact of one stream to another's."""
    return list(generate_documents("test", 0, 4, with_notes=False))


@pytest.fixture(scope="module")
def features(model, tokenizer):
    values = collect_values(generate_documents("train", 0, 200, with_notes=False))
    config = model.config
    return FeatureMaker(tokenizer, config.num_plan_slots, config.plan_vocab_size, config.plan_hash_salt, values, 0.7)


def make_document():
    """Stream 0 owns a metal, stream 1 one that must equal it, stream 2 a fruit; no text yet."""
    assert CUES[TROPHY].source == RAW
    cues = (RAW, TROPHY, FRUIT)
    items = tuple(PlanItem(f"s{stream}/{cue}", cue, stream) for stream, cue in enumerate(cues))
    streams = tuple(Stream(stream, f"Part {stream}", "", "") for stream in range(3))
    return Document("test-0", "factory", ("core",), "Describe it in three parts.", items, streams)


def says(cue, value):
    return f"The {cue} {value} comes first."


def written(*texts):
    return document_from_texts(make_document(), [StreamText(text) for text in texts])


def expected_labels(document, tokenizer, block_size, capacity):
    """`{(stream, round): contradicts}` of the judgeable blocks, from the text alone."""
    owners = {item.item_id.split("/", 1)[1]: item.stream for item in document.items}
    first, repeated = {}, []
    for stream in document.streams:
        offsets = tokenizer(stream.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for mention in parse_section(stream.text):
            tokens = [i for i, (a, b) in enumerate(offsets) if a < mention.end and b > mention.start]
            rounds, owner = {token // block_size for token in tokens}, owners[mention.cue]
            if owner == stream.stream_id:
                first.setdefault(mention.cue, (mention.value, tokens[-1] // block_size))
            source = mention.cue if owner != stream.stream_id else CUES[mention.cue].source
            if owners.get(source, stream.stream_id) != stream.stream_id:
                repeated += [(stream.stream_id, number, source, mention.value) for number in rounds]
    labels = {}
    for stream, number, source, value in repeated:
        if source in first and number - capacity < first[source][1] <= number:
            key = stream, number
            labels[key] = labels.get(key, False) or value != first[source][0]
    return labels


def found_labels(scores, document):
    return {(s.stream, s.round): s.contradicts for s in scores if s.judgeable and s.document == document}


def test_document_from_texts_keeps_plan_and_takes_the_parsers_spans():
    texts = [
        f"{says(RAW, 'iron')} {says(FRUIT, 'figs')}",
        says(TROPHY, "tin"),
        "The main crop rye. " + says(FRUIT, "figs"),
    ]
    document = written(*texts)
    assert document == replace(make_document(), streams=document.streams)
    assert [stream.text for stream in document.streams] == texts
    spans = [[(s.kind, s.cue, s.value, s.item_id, s.owner) for s in stream.spans] for stream in document.streams]
    assert spans == [
        [("own", RAW, "iron", f"s0/{RAW}", 0), ("sibling", FRUIT, "figs", f"s2/{FRUIT}", 2)],
        [("sibling", TROPHY, "tin", f"s1/{TROPHY}", 1)],
        [("own", FRUIT, "figs", f"s2/{FRUIT}", 2)],
    ]
    assert all(s.text[span.start : span.end] == span.value for s in document.streams for span in s.spans)


def test_a_linked_cue_whose_source_is_not_in_the_plan_is_an_own_fact():
    document = make_document()
    document = replace(document, items=document.items[1:])
    linked = document_from_texts(document, [StreamText(text) for text in ("", says(TROPHY, "tin"), "")])
    assert [span.kind for span in linked.streams[1].spans] == ["own"]


def test_document_from_texts_rebuilds_the_worlds_spans(documents):
    for document in documents:
        rebuilt = document_from_texts(document, [StreamText(stream.text) for stream in document.streams])
        for before, after in zip(document.streams, rebuilt.streams, strict=True):
            assert [replace(span, hops=1) for span in before.spans] == list(after.spans)


def test_every_block_of_clean_documents_is_scored_and_none_contradicts(model, tokenizer, features, documents):
    scores = score_blocks(model, features, documents, batch_size=3)
    blocks = [
        (index, stream.stream_id, number)
        for index, document in enumerate(documents)
        for stream in document.streams
        for number in range(-(-(len(tokenizer(stream.text, add_special_tokens=False)["input_ids"]) + 1) // BLOCK))
    ]
    assert [(s.document, s.stream, s.round) for s in scores] == blocks
    assert not any(score.contradicts for score in scores)
    for index, document in enumerate(documents):
        expected = expected_labels(document, tokenizer, BLOCK, model.config.bus_capacity)
        assert expected and found_labels(scores, index) == expected
    assert all(0 < value < 1 for s in scores for value in (s.disagreement, s.zeroed))
    assert all(torch.isfinite(torch.tensor(score.logp_gap)) for score in scores)


def test_labels_of_corrupted_documents_are_those_planted(model, tokenizer, features, documents):
    scores = score_blocks(model, features, documents, "corrupted")
    for index, document in enumerate(documents):
        rng = random.Random(f"{features.seed}/{document.document_id}")
        corrupted, planted = plant_contradictions(document, features.values, features.corruption_rate, rng)
        assert planted
        expected = expected_labels(corrupted, tokenizer, BLOCK, model.config.bus_capacity)
        assert found_labels(scores, index) == expected
    assert any(score.contradicts for score in scores)


def test_labels_of_written_documents_compare_with_what_was_written(model, features):
    said = says(RAW, "iron")
    filler = "Old people tell long stories, and few object. " * 2
    document = written(said, f"{said} {filler}{says(FRUIT, 'plums')}", f"{says(FRUIT, 'figs')} {says(RAW, 'tin')}")
    expected = expected_labels(document, features.tokenizer, BLOCK, model.config.bus_capacity)
    assert sorted(expected.values()) == [False, True, True]
    assert found_labels(score_blocks(model, features, [document]), 0) == expected


@pytest.mark.parametrize(("value", "contradicts"), [("iron", False), ("tin", True)])
def test_a_linked_fact_is_judged_by_its_source(model, features, value, contradicts):
    document = written(says(RAW, "iron"), says(TROPHY, value), f"{says(FRUIT, 'figs')} {says(TROPHY, value)}")
    expected = expected_labels(document, features.tokenizer, BLOCK, model.config.bus_capacity)
    assert expected[1, 0] is contradicts
    assert found_labels(score_blocks(model, features, [document]), 0) == expected


def test_a_linked_fact_without_a_source_is_not_judgeable(model, features):
    """Another section's fact of the same value is not its source."""
    document = written("So it is.", says(TROPHY, "tin"), says(FRUIT, "tin"))
    assert found_labels(score_blocks(model, features, [document]), 0) == {}


def test_a_repeated_fact_before_its_statement_is_not_judgeable(model, features):
    filler = "Old people tell long stories. " * 4
    document = written(filler + says(RAW, "iron"), says(RAW, "tin"), "So it is.")
    assert found_labels(score_blocks(model, features, [document]), 0) == {}


def test_zeroed_notes_are_another_bus(model, features, documents):
    scores = score_blocks(model, features, documents[:2])
    assert all(score.zeroed != score.disagreement for score in scores)


def test_agreements_are_scaled_as_in_decoding(model, features, documents, monkeypatch):
    def agreements():
        scores = score_blocks(model, features, documents[:2])
        return 1 - torch.tensor([[score.disagreement, score.zeroed] for score in scores], dtype=torch.float64)

    plain = agreements()
    monkeypatch.setattr(model.generation_config, "agreement_scaling", [0.5, 1.0])
    assert torch.allclose(agreements(), (0.5 * plain.logit() + 1).sigmoid(), atol=1e-5)


def test_the_gap_is_what_fresh_notes_take(model, features, documents, monkeypatch):
    scores = score_blocks(model, features, documents[:1])
    assert any(abs(score.logp_gap) > 1e-4 for score in scores)
    monkeypatch.setattr(blocks_module, "silence", lambda rollout: rollout)
    assert [score.logp_gap for score in score_blocks(model, features, documents[:1])] == [0.0] * len(scores)


def test_scores_do_not_depend_on_the_batch(model, features, documents):
    together, apart = score_blocks(model, features, documents), score_blocks(model, features, documents, batch_size=1)
    for one, other in zip(together, apart, strict=True):
        assert (one.document, one.stream, one.round) == (other.document, other.stream, other.round)
        assert one.disagreement == pytest.approx(other.disagreement, abs=1e-5)
        assert one.logp_gap == pytest.approx(other.logp_gap, abs=1e-4)


def make_scores(agreements, contradicts=False, can_judge=True):
    return [BlockScore(0, 0, 0, contradicts, can_judge, 1 - value, 0.5, 0.0) for value in agreements]


def test_block_decisions_keep_documents_without_a_block():
    scores = make_scores([0.25], contradicts=True) + make_scores([0.5], can_judge=False) + make_scores([0.75])
    decisions = block_decisions(scores, 2, lambda score: 1 - score.disagreement)
    assert decisions == [[(0.25, False), (0.75, True)], []]
    every = block_decisions(scores, 2, lambda score: float(score.judgeable), only_judgeable=False)
    assert every == [[(1.0, False), (0.0, True), (1.0, True)], []]


def test_decisions_of_agreement_by_document_hold_every_block():
    scores = [BlockScore(document, 0, 0, wrong, judge, 0.25, 0.5, 0.0) for document, wrong, judge in (
        (0, False, True), (0, True, True), (1, True, False), (2, True, True),
    )]  # fmt: skip
    assert agreement_decisions(scores) == [[(0.75, True), (0.75, False)], [(0.75, True)], [(0.75, False)]]
