"""Calibration: rules, curves, calibration error, intervals; files written, read back and used by generation."""

import math
import random

import pytest
import torch

from modeling_pdt import PDTGenerationConfig
from tests.tiny_training import make_model
from trainer_pdt.calibration import (
    THRESHOLDS,
    Judgements,
    apply_thresholds,
    assess,
    auroc,
    average_precision,
    calibrate,
    confusion,
    expected_calibration_error,
    fit_scaling,
    ratios,
    save_calibration,
    scaled,
    threshold_by_f1,
    threshold_by_false_alarms,
)
from trainer_pdt.evaluation import scoring
from trainer_pdt.telemetry import read_json


def judged(rows, finds=True):
    """Judgements of one document per `(probability, truth)`."""
    return Judgements.of([[row] for row in rows], finds)


def random_rows(count=200, documents=20, seed=0):
    """Documents with probabilities that mean what they say, rounded so that some are equal."""
    rng = random.Random(seed)
    flat = [round(rng.random(), 2) for _ in range(count)]
    rows = [(p, rng.random() < p) for p in flat]
    return [rows[start::documents] for start in range(documents)]


def once(judgements):
    return judgements.weights(0)


@pytest.mark.parametrize(("allowed", "flagged"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.14, 2), (0.5, 10)])
def test_threshold_is_the_highest_with_few_enough_false_alarms(allowed, flagged):
    clean = [(number + 1) / 32 for number in range(20)]
    judgements = judged([(p, True) for p in clean[::-1]] + [(0.001, False)] * 9, finds=False)
    threshold = float(threshold_by_false_alarms(judgements, once(judgements), allowed))
    assert sum(value < threshold for value in clean) == flagged <= allowed * 20
    assert threshold == clean[flagged]


def test_threshold_of_ties_flags_none_of_them():
    judgements = judged([(p, True) for p in [0.5] * 10 + [0.75] * 10], finds=False)
    assert float(threshold_by_false_alarms(judgements, once(judgements), 0.3)) == 0.5


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_threshold_stays_inside_the_open_range(probability):
    judgements = judged([(probability, True)], finds=False)
    assert 0 < float(threshold_by_false_alarms(judgements, once(judgements))) < 1


def test_rules_need_their_class():
    wrong, sound = judged([(0.5, False)], finds=False), judged([(0.5, True)], finds=False)
    with pytest.raises(ValueError, match="no clean judgeable block"):
        threshold_by_false_alarms(wrong, once(wrong))
    for allowed in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"allowed .*\[0, 1\).*{allowed}"):
            threshold_by_false_alarms(sound, once(sound), allowed)
    with pytest.raises(ValueError, match="no item was ever covered"):
        threshold_by_f1(judged([(0.5, False)]), torch.ones(1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="judgements is empty"):
        assess(judged([]), 0.5)


def test_f1_rule_is_that_of_scoring():
    documents = random_rows()
    judgements = Judgements.of(documents, finds=True)
    expected = scoring.best_f1_threshold(scoring.precision_recall_curve(documents))
    assert float(threshold_by_f1(judgements, once(judgements))) == expected


@pytest.mark.parametrize("finds", [True, False])
def test_confusion_counts_what_is_flagged(finds):
    rows = [(0.1, False), (0.4, True), (0.4, False), (0.6, True), (0.9, True)]
    judgements = judged(rows, finds)
    counts = {name: value[0, 0].item() for name, value in confusion(judgements, [0.4], once(judgements)).items()}
    # Covered items are flagged at or above the threshold, contradictions strictly below, as decoding does.
    assert counts == ({"tp": 3, "fp": 1, "fn": 0, "tn": 1} if finds else {"tp": 1, "fp": 0, "fn": 1, "tn": 3})
    rates = ratios({name: torch.tensor(float(value)) for name, value in counts.items()})
    assert rates["precision"] == (0.75 if finds else 1) and rates["recall"] == (1 if finds else 0.5)
    assert rates["f1"] == pytest.approx(6 / 7 if finds else 2 / 3)
    assert rates["false_positive_rate"] == (0.5 if finds else 0)


def share_in_order(probabilities, truths):
    """Share of pairs of a true and a false event in which the true one has the higher probability, ties half."""
    true, false = (
        [p for p, truth in zip(probabilities, truths, strict=True) if truth is kind] for kind in (True, False)
    )
    return sum((high > low) + (high == low) / 2 for high in true for low in false) / (len(true) * len(false))


def test_areas_are_those_of_pairs_and_ranks():
    documents = random_rows()
    probabilities, truths = zip(*[row for rows in documents for row in rows], strict=True)
    for finds in (True, False):
        judgements = Judgements.of(documents, finds)
        assert float(auroc(judgements, once(judgements))) == pytest.approx(share_in_order(probabilities, truths))
    by_hand = judged([(0.9, True), (0.8, False), (0.7, True), (0.1, False)])
    assert float(average_precision(by_hand, once(by_hand))) == pytest.approx((1 + 2 / 3) / 2)
    opposite = judged([(0.1, False), (0.2, True), (0.3, False), (0.9, True)], finds=False)
    assert float(average_precision(opposite, once(opposite))) == pytest.approx((1 + 2 / 3) / 2)


def test_calibration_error_by_hand():
    # Bin 0.2: mean probability 0.25, nothing true; bin 0.9: mean 0.95, all true.
    judgements = judged([(0.2, False), (0.3 - 1e-9, False), (0.9, True), (1.0, True)])
    assert float(expected_calibration_error(judgements, once(judgements))) == pytest.approx((0.25 + 0.05) / 2)


def drawn_by(slope, intercept, count=4000, seed=1):
    """Judgements whose events happen as often as scaled probabilities say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, generator=generator, dtype=torch.float64)
    truths = torch.rand(count, generator=generator) < (slope * logits + intercept).sigmoid()
    return judged(list(zip(logits.sigmoid().tolist(), truths.tolist(), strict=True)), finds=False)


def test_scaling_finds_what_the_head_is_wrong_by():
    judgements = drawn_by(0.6, 0.9)
    scaling = fit_scaling(judgements)
    assert scaling == pytest.approx([0.6, 0.9], abs=0.1)
    mended = scaled(judgements, scaling)
    errors = [float(expected_calibration_error(some, once(some))) for some in (judgements, mended)]
    assert errors[0] > 0.1 and errors[1] < 0.03
    assert torch.equal(mended.probability_N.argsort(), judgements.probability_N.argsort())
    assert fit_scaling(mended) == pytest.approx([1.0, 0.0], abs=1e-3)


def test_scaling_stays_finite_and_needs_both_classes():
    slope, intercept = fit_scaling(judged([(0.1, False), (0.2, False), (0.8, True), (0.9, True)]))
    assert 0 < slope < 10 and abs(intercept) < 10
    certain = scaled(judged([(0.0, False), (1.0, True)]), [2.0, 0.0])
    assert certain.probability_N.tolist() == pytest.approx([0, 1]) and bool(certain.probability_N.isfinite().all())
    assert fit_scaling(judged([(0.5, True), (0.7, True)])) is None
    assert fit_scaling(judged([(0.1, True), (0.2, True), (0.8, False), (0.9, False)])) is None
    judgements = judged([(0.5, True)])
    assert scaled(judgements, None) is judgements


def test_weights_count_documents_as_often_as_they_were_drawn():
    documents = [[(0.2, True)], [(0.4, True), (0.6, False)], [(0.8, True)]]
    judgements = Judgements.of(documents, finds=True)
    weights = judgements.weights(50, seed=3)
    assert weights[0].tolist() == [1, 1, 1, 1]
    assert torch.equal(weights[:, 1], weights[:, 2])
    assert (weights[1:, [0, 1, 3]].sum(dim=1) == 3).all() and weights[1:].unique().numel() > 2
    assert torch.equal(weights, judgements.weights(50, seed=3))
    for row in weights:
        again = Judgements.of(
            [rows for rows, n in zip(documents, row[[0, 1, 3]], strict=True) for _ in range(int(n))], True
        )
        if 0 < int(again.truth_N.sum()) < again.truth_N.numel():
            assert float(auroc(judgements, row[None])) == pytest.approx(float(auroc(again, once(again))))
        error = expected_calibration_error(judgements, row[None])
        assert float(error) == pytest.approx(float(expected_calibration_error(again, once(again))))


@pytest.mark.parametrize(("rule", "finds"), [("false_alarms", False), ("best_f1", True)])
def test_report_holds_curves_errors_and_intervals(rule, finds):
    judgements = Judgements.of(random_rows(), finds)
    report = calibrate(judgements, rule)
    for name in ("threshold", "auroc", "average_precision", "expected_calibration_error", "precision", "recall", "f1"):
        value = report[name]
        assert value["low"] <= value["mean"] <= value["high"] and value["low"] < value["high"], name
        assert value["n"] == 200
    assert report["selected_point"]["threshold"] == report["threshold"]["mean"]
    assert report["selected_point"]["f1"] == pytest.approx(report["f1"]["mean"])
    assert [point["threshold"] for point in report["points"]] == list(THRESHOLDS)
    for point in report["points"]:
        assert point["tp"] + point["fn"] == report["wanted"] and sum(point[k] for k in ("tp", "fp", "fn", "tn")) == 200
    assert sum(entry["count"] for entry in report["reliability"]) == 200 and report["documents"] == 20
    if rule == "false_alarms":
        assert report["false_positive_rate"]["mean"] <= 0.05
    assert calibrate(judgements, rule) == report


def test_one_class_leaves_its_figures_out():
    report = calibrate(judged([(0.5, True), (0.7, True)], finds=False), "false_alarms")
    for name in ("auroc", "average_precision", "recall"):
        assert report[name] == {"mean": None, "low": None, "high": None, "n": 2}
    assert report["threshold"]["mean"] == 0.5 and not any(
        isinstance(value, float) and math.isnan(value) for point in report["points"] for value in point.values()
    )


def test_thresholds_are_read_back_by_generation(tmp_path):
    model = make_model()
    documents = random_rows()
    calibration = {
        "agreement": {
            **calibrate(Judgements.of(documents, finds=False), "false_alarms", samples=20),
            "agreement_scaling": [0.5, 0.25],
        },
        "coverage": calibrate(Judgements.of(documents, finds=True), "best_f1", samples=20),
    }
    paths = save_calibration(model, calibration, tmp_path)
    assert [path.name for path in paths] == ["agreement_thresholds.json", "coverage_thresholds.json"]
    loaded = PDTGenerationConfig.from_pretrained(tmp_path)
    fresh = apply_thresholds(PDTGenerationConfig(), tmp_path)
    for head in ("agreement", "coverage"):
        value = calibration[head]["threshold"]["mean"]
        assert read_json(tmp_path / f"{head}_thresholds.json")[f"{head}_threshold"] == value
        for config in (model.generation_config, loaded, fresh):
            assert getattr(config, f"{head}_threshold") == value
    assert all(config.agreement_scaling == [0.5, 0.25] for config in (model.generation_config, loaded, fresh))


def test_a_missing_report_leaves_its_threshold(tmp_path):
    model = make_model()
    agreement = calibrate(judged([(0.25, True)], finds=False), "false_alarms", samples=2)
    model.generation_config.agreement_scaling = [2.0, 0.0]
    assert len(save_calibration(model, {"agreement": agreement}, tmp_path)) == 1
    assert model.generation_config.agreement_scaling is None
    assert model.generation_config.agreement_threshold == 0.25
    assert model.generation_config.coverage_threshold == 0.5
