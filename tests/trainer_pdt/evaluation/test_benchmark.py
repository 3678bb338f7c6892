"""Wall-clock ratios, arguments of the evaluation, and its sections on a tiny random model."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, GptOssForCausalLM

from modeling_pdt import PDTForParallelDecoding
from trainer_pdt.calibration import Judgements, expected_calibration_error, fit_scaling
from trainer_pdt.data.counting import StreamText
from trainer_pdt.data.schema import Document
from trainer_pdt.data.worlds import generate_documents
from trainer_pdt.data.worlds_lexicon import CUES
from trainer_pdt.evaluation import suite
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.bars import check_bars
from trainer_pdt.evaluation.benchmark import overhead_vs_shared_prefill, parallel_vs_single, ratio_summary, timed
from trainer_pdt.evaluation.blocks import BlockScore, block_decisions
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.evaluation.given_text import text
from trainer_pdt.evaluation.heads import agreement, coverage, flagged, thinned
from trainer_pdt.evaluation.modes import PARALLEL_MODES, calibrated_gate
from trainer_pdt.evaluation.suite import Evaluation
from trainer_pdt.trunk import TrunkArguments, trunk_config

TRUNK = Path(__file__).parents[3] / "recipes/tiny/trunk"
SECTION_TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRUNK)


@pytest.fixture
def model(tokenizer):
    sizes = TrunkArguments(hidden_size=32, num_layers=3, num_kv_heads=2, head_dim=8, intermediate_size=32)
    return PDTForParallelDecoding.from_trunk(
        GptOssForCausalLM(trunk_config(sizes, tokenizer)),
        notes_dim=16,
        notes_per_block=2,
        adapter_bottleneck=4,
        trained_parts=["snc", "agreement", "coverage"],
        agreement_threshold=0.2,
    ).eval()


@pytest.fixture
def short(model, monkeypatch):
    """Sections of `SECTION_TOKENS` at most, whatever is asked for; returns the calls' keyword arguments."""
    calls, generate = [], model.generate

    def spy(input_ids, **options):
        calls.append(options)
        return generate(input_ids, **{**options, "max_new_tokens": min(options["max_new_tokens"], SECTION_TOKENS)})

    monkeypatch.setattr(model, "generate", spy)
    return calls


@pytest.fixture
def evaluation(model, tokenizer, monkeypatch):
    monkeypatch.setattr(suite, "VALUE_DOCUMENTS", 60)
    arguments = EvaluationArguments(
        core_documents=20, hard_documents=3, calibration_documents=8, speed_documents=2, decode_batch=8
    )
    return Evaluation(model, tokenizer, arguments)


def test_timed_returns_seconds_and_result():
    seconds, result = timed(lambda: "done")
    assert seconds >= 0 and result == "done"


def test_ratio_summary():
    pairs = [(4.0, 1.0), (2.0, 2.0), (1.0, 2.0), (6.0, 2.0), (4.0, 2.0)]
    assert ratio_summary(pairs) == {"mean": 2.0, "low": 0.75, "high": 3.5, "n": 5}
    assert ratio_summary([(3.0, 2.0)]) == {"mean": 1.5, "low": 1.5, "high": 1.5, "n": 1}


def test_parallel_vs_single_compares_the_same_number_of_tokens(model, tokenizer, short):
    documents = list(generate_documents("test", 0, 3, with_notes=False))
    model.generation_config.plan = "trunk"
    result = parallel_vs_single(model, tokenizer, documents)
    assert result["n"] == 2 and result["mean"] > 0
    assert result["single_s"] > 0 and result["parallel_s"] > 0
    parallel, single = short[2::2], short[3::2]
    assert [call["num_streams"] for call in parallel] == [3, 3]
    assert [call["num_streams"] for call in single] == [1, 1]
    assert all(call["eos_token_id"] is None and call["agreement_threshold"] is None for call in single)
    assert "agreement_threshold" not in parallel[0]
    assert all(0 < call["max_new_tokens"] <= 3 * SECTION_TOKENS for call in single)
    # Retries aside, a call consumes one token of every stream.
    assert 1 / 3 <= result["critical_path_tokens"] <= 1


def test_overhead_vs_shared_prefill_writes_rows_of_one_length(model, tokenizer, short, monkeypatch):
    lengths, generate = [], model.trunk.generate

    def spy(**options):
        rows = generate(**options)
        if rows.shape[0] > 1:
            lengths.append((rows.shape[0], rows.shape[1] - options["input_ids"].shape[1]))
        return rows

    monkeypatch.setattr(model.trunk, "generate", spy)
    documents = list(generate_documents("test", 0, 3, with_notes=False))
    result = overhead_vs_shared_prefill(model, tokenizer, documents, tokens=6)
    assert result["n"] == 2 and result["mean"] > 0
    assert lengths == [(3, 6)] * 3
    assert all(call["max_new_tokens"] == 6 and call["max_retries"] == 0 for call in short)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("core_documents", 1, 2),
        ("calibration_documents", 0, 2),
        ("speed_documents", 1, 2),
        ("decode_batch", 1, 2),
        ("hard_documents", -1, 0),
        ("control_factor", 0, 1),
        ("threads", 0, 1),
        ("workers", 0, 1),
    ],
)
def test_arguments_out_of_range(name, value, least):
    with pytest.raises(ValueError, match=rf"{name} must be >= {least}, got {value}\."):
        EvaluationArguments(**{name: value})
    assert getattr(EvaluationArguments(**{name: least}), name) == least


def test_held_out_documents_are_core_then_hard():
    documents = held_out_documents("test", 3, 2, heldout_wordings=True)
    assert [document.split_tags[0] for document in documents] == ["core"] * 3 + ["hard"] * 2
    assert all("heldout_wordings" in document.split_tags for document in documents)
    assert len({document.document_id for document in documents}) == 5
    assert documents[:2] == held_out_documents("test", 2, 0, heldout_wordings=True)
    assert isinstance(documents[0], Document)


def test_planted_contradictions_know_hard_facts(evaluation):
    hard = {span.cue for d in evaluation.documents if "hard" in d.split_tags for s in d.streams for span in s.spans}
    core = {span.cue for d in held_out_documents("train", 300, 0) for s in d.streams for span in s.spans}
    assert hard - core
    assert hard <= set(evaluation.features.values)


def test_thinned_keeps_both_ends():
    points = [[index / 10, 1.0] for index in range(11)]
    assert thinned(points, 4) == [points[0], points[3], points[6], points[9], points[10]]
    assert thinned(points, 11) == points
    assert thinned([], 4) == []


def test_flagged_shares_of_sound_and_of_contradicting_blocks():
    decisions = [[(0.1, True), (0.6, True), (0.2, False)], [(0.7, True)], [], [(0.5, True), (0.9, False)]]
    shares = flagged(decisions, 0.5)
    assert (shares["false_rollback"]["mean"], shares["false_rollback"]["n"]) == (0.25, 4)
    assert shares["false_rollback"]["clusters"] == ((1, 2), (0, 1), (0, 0), (0, 1))
    assert (shares["repaired"]["mean"], shares["repaired"]["n"]) == (0.5, 2)
    assert flagged([[]], 0.5)["repaired"]["mean"] is None


def test_a_mode_is_written_once_with_the_gate_off(evaluation, short):
    written = evaluation.write("pdt")
    calls = len(short)
    assert calls == 3 and all(call["agreement_threshold"] is None for call in short)
    assert evaluation.write("pdt") is written
    assert len(short) == calls
    assert [len(written.texts), len(evaluation.counts["pdt"])] == [23, 23]
    evaluation.model.generation_config.agreement_threshold = 0.3
    evaluation.write("pdt_gate")
    assert short[-1]["agreement_threshold"] == 0.3


def test_controls_with_a_bar_on_an_intervals_end_get_more_documents(evaluation, short):
    assert evaluation.arguments.control_factor == 2
    for mode, documents in (("zero_notes", 46), ("self_only", 23)):
        evaluation.write(mode)
        assert len(evaluation.counts[mode]) == len(evaluation.written[mode].texts) == documents


@pytest.mark.slow
def test_every_section_of_an_untrained_model_is_plain_json(evaluation, short):
    """Recall is left without a number where nothing was repeated; bars are checked on what there is."""
    evaluation.documents = [d for d in evaluation.documents if d.domain == evaluation.documents[-1].domain][-3:]
    evaluation.control_documents = [*evaluation.documents, evaluation.documents[0]]
    evaluation.arguments.core_documents, evaluation.arguments.hard_documents = 2, 1
    report = evaluation.recall()
    recall = report["sibling_fact_recall"]
    assert set(PARALLEL_MODES) | {"independent", "sequential", "full_text", "swapped_own"} <= set(recall)
    assert any(CUES[cue].value_type == "year" for cue in report["chance"]["by_cue"])
    own, alone = report["plan"], report["plan"]["independent"]
    assert alone.keys() == report["plan"]["sequential"].keys() == own.keys() - {"independent", "sequential"}
    # Each against the documents that it wrote.
    assert len(alone["owned_stated_relative"]["clusters"]) == 4 and len(own["owned_stated"]["clusters"]) == 3
    report["coverage"] = coverage(evaluation)
    report["text_ce"] = text(evaluation)
    report["teacher_forced"] = evaluation.teacher_forced()
    assert {"mask_ablation", "kd_ce_ratio_mix_0.35", "coverage_recall"} <= report["teacher_forced"].keys()
    assert report["text_ce"]["kl"] >= 0 and report["text_ce"]["tokens"] > 0
    evaluation.model.generation_config.agreement_threshold = 0.5
    report["rollback"] = evaluation.rollback()
    assert set(report["rollback"]) == {"none", "head", "head_stale", "random"}
    report["examples"] = evaluation.examples()
    assert [len(example["streams"]) for example in report["examples"]] == [3, 3, 3]
    report["bars"] = check_bars(report)
    assert "text KL to the trunk" in {bar["name"] for bar in report["bars"]}
    json.dumps(report)


def test_agreement_section_calibrates_on_clean_text(evaluation, monkeypatch):
    """With the worlds' own sections in place of a model's text the labels are known."""

    def write(model, tokenizer, documents, **options):
        texts = [[StreamText(stream.text) for stream in document.streams] for document in documents]
        return SimpleNamespace(texts=texts, events=[[] for _ in texts], results=[])

    monkeypatch.setattr(suite, "write_parallel", write)
    result = agreement(evaluation)
    assert evaluation.model.generation_config.agreement_threshold == result["threshold"]
    assert 0 < result["positives"] < result["blocks"]
    assert (result["positives_generated"], result["auroc_generated"], result["roc_generated"]) == (0, None, [])
    assert result["roc"][0] == [0.0, 0.0] and result["roc"][-1] == [1.0, 1.0]
    assert 0 <= result["auroc"]["low"] <= result["auroc"]["mean"] <= 1
    assert 0 <= result["controls"]["logp_gap"]["mean"] <= 1
    assert [len(rows) for rows in result["decisions"].values()] == [23] * 10
    assert result["repaired"]["mean"] is None and 0 <= result["false_rollback"]["mean"] <= 1
    json.dumps(result)
    calibration = evaluation.calibration()
    assert set(calibration) == {"agreement", "agreement_judgeable", "agreement_planted"}
    assert calibration["agreement"]["threshold"]["mean"] == result["threshold"]
    assert calibration["agreement"]["wanted"] == 0 < calibration["agreement_planted"]["wanted"]
    assert calibration["agreement_planted"]["selected_point"]["threshold"] == result["threshold"]


def test_agreements_are_scaled_by_judgeable_blocks(evaluation, monkeypatch):
    """The head's own logits are what is scaled, whatever an earlier calibration left."""
    rng, config = random.Random(0), evaluation.model.generation_config
    events = [[] for _ in range(8)]
    written = SimpleNamespace(texts=[[StreamText("So it is.")] * 3] * 8, events=events, results=[])
    monkeypatch.setattr(suite, "write_parallel", lambda *_, **options: written)
    blocks = []
    for document in range(8):
        for round_number in range(40):
            # Half as likely to be wrong as the head says, and blocks that repeat nothing never are.
            disagreement, judgeable = rng.random(), rng.random() < 0.5
            wrong = judgeable and rng.random() < disagreement / 2
            blocks.append(BlockScore(document, 0, round_number, wrong, judgeable, disagreement, 0.5, 0.0))
    seen = []

    def score(documents, view="clean"):
        seen.append(config.agreement_scaling)
        return blocks

    monkeypatch.setattr(evaluation, "score", score)
    config.agreement_scaling = [3.0, 1.0]
    report = evaluation.calibration()
    assert seen == [None, report["agreement"]["agreement_scaling"]] and config.agreement_scaling == seen[1]
    decided = block_decisions(blocks, 8, lambda block: 1 - block.disagreement)
    judgements = Judgements.of(decided, finds=False)
    assert config.agreement_scaling == fit_scaling(judgements)
    before = float(expected_calibration_error(judgements, judgements.weights(0)))
    assert report["agreement_judgeable"]["expected_calibration_error"]["mean"] < 0.07 < before
    assert 0.02 < report["agreement"]["false_positive_rate"]["mean"] <= 0.03


def test_thresholds_are_set_on_the_kinds_of_documents_that_are_judged(evaluation, monkeypatch):
    def write(model, tokenizer, documents, **options):
        raise InterruptedError([document.document_id.split("-")[:2] for document in documents])

    monkeypatch.setattr(suite, "write_parallel", write)
    with pytest.raises(InterruptedError) as stopped:
        evaluation.calibration()
    assert stopped.value.args[0] == [["validation", "core"]] * 7 + [["validation", "hard"]]


@pytest.mark.parametrize(
    ("evaluated", "calibrated", "kinds"), [((300, 150), 600, (400, 200)), ((2, 0), 5, (5, 0)), ((2, 6), 2, (0, 2))]
)
def test_calibration_has_the_evaluations_share_of_hard_documents(evaluated, calibrated, kinds):
    core, hard = evaluated
    arguments = EvaluationArguments(core_documents=core, hard_documents=hard, calibration_documents=calibrated)
    assert arguments.calibration_kinds() == kinds


def test_a_head_without_judgements_keeps_its_threshold(evaluation, monkeypatch, caplog):
    def write(model, tokenizer, documents, **options):
        texts = [[StreamText("So it is.") for _ in document.streams] for document in documents]
        return SimpleNamespace(texts=texts, events=[[] for _ in texts], results=[])

    monkeypatch.setattr(suite, "write_parallel", write)
    monkeypatch.setattr(suite.block_scores, "agreement_decisions", lambda scores: [])
    config = evaluation.model.generation_config
    config.agreement_threshold = None
    assert evaluation.calibration() == {}
    assert (config.agreement_threshold, config.coverage_threshold) == (None, 0.5)
    assert "agreement_threshold by: it stays None" in caplog.text
    assert "coverage_threshold by: it stays 0.5" in caplog.text
    with pytest.raises(ValueError, match="agreement_threshold is None"):
        agreement(evaluation)


def test_an_earlier_calibration_is_taken_over(evaluation):
    agreement = {"threshold": {"mean": 0.125}, "agreement_scaling": [0.5, 1.0]}
    calibration = {"agreement": agreement, "coverage": {"threshold": {"mean": 0.75}}}
    evaluation.adopt_calibration(calibration)
    assert evaluation.calibration() is calibration
    config = evaluation.model.generation_config
    assert (config.agreement_threshold, config.coverage_threshold) == (0.125, 0.75)
    assert calibrated_gate(evaluation.model) == {"agreement_threshold": 0.125, "agreement_scaling": [0.5, 1.0]}


def test_text_is_counted_by_document(evaluation):
    evaluation.documents = evaluation.documents[:3]
    whole = text(evaluation)
    assert whole["divergence"]["n"] == whole["tokens"] and whole["kl"] == pytest.approx(whole["divergence"]["mean"])
    assert whole["excess"]["mean"] == pytest.approx(whole["pdt"] - whole["trunk"], abs=1e-6)
    evaluation.documents = evaluation.documents[1:2]
    alone = text(evaluation)
    for name in ("divergence", "excess"):
        assert alone[name]["clusters"][0] == pytest.approx(whole[name]["clusters"][1], abs=1e-3)
