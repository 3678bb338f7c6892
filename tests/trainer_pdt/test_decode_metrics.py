"""Measures of decoding runs against hand-computed values, from our manifests and from the original's."""

import json

import pytest

from recipes import analyze
from trainer_pdt.decode_metrics import (
    aggregate,
    compare_texts,
    correlation,
    coverage,
    quantile,
    redundancy,
    rollbacks,
    rouge_l,
    run_metrics,
    series,
    speed,
    tf_idf,
)
from trainer_pdt.decode_report import labels
from trainer_pdt.decode_runs import DecodeRun, check_comparable, read_run


def make_run(**changes):
    values = {
        "name": "run.json",
        "plan_vocab_size": 512,
        "plan_hash_buckets": 512,
        "plan_hash_salt": "salt",
        "sections": {"0/a": "barley grows here", "0/b": "the river runs"},
        "merged": ["barley grows here the river runs"],
        "committed": {"0/a": 30, "0/b": 50},
        "seconds": {"total": 4.0, "prefill": 1.0, "exchange": 0.5},
        "rounds_s": [1.0, 3.0, 2.0],
        "judged": [("0/a", 0.9, False), ("0/b", 0.1, True), ("0/b", 0.5, False), ("0/a", 0.3, True)],
        "rollbacks": {"0/a": [4], "0/b": [16]},
        "forced": 1,
        "waits": 3,
        "calls": 60,
        **changes,
    }
    return DecodeRun(**values)


def test_speed():
    measured = speed(make_run())
    assert measured == {
        "alpha": 2.0,
        "beta": 0.2,
        "tokens_per_second": 20.0,
        "tokens": 80,
        "seconds": 4.0,
        "prefill_share": 0.25,
        "exchange_share": 0.125,
        "calls": 60,
    }


def test_rollbacks():
    measured = rollbacks(make_run())
    assert (measured["events"], measured["tokens"], measured["forced"], measured["per_block"]) == (2, 20, 1, 0.5)
    assert measured["waits"] == 3
    assert measured["by_stream"] == {"0/a": 1, "0/b": 1}
    assert measured["length_up_to"] == {"1": 0, "2": 0, "4": 1, "8": 0, "16": 1, "over 16": 0}
    assert (measured["length_p50"], measured["length_p95"]) == (10, pytest.approx(15.4))
    assert measured["agreement_correlation"] == pytest.approx(-0.8451542547)
    assert rollbacks(make_run(rollbacks={"0/a": [17]}))["length_up_to"]["over 16"] == 1


def test_a_series_is_described_by_stream():
    measured = series({"a": [0.8, 0.9, 0.1, 0.5], "b": [0.2, 0.2]})
    assert (measured["n"], measured["min"], measured["max"]) == (6, 0.1, 0.9)
    assert measured["mean"] == pytest.approx(0.45)
    assert measured["share_high"] == pytest.approx(1 / 3) and measured["share_low"] == pytest.approx(0.5)
    assert (measured["dwell_high"], measured["dwell_low"], measured["dwell_mid"]) == (2, 1.5, 1)
    # Up, down, up again: two changes of direction at the two inner blocks of `a`; `b` stands still.
    assert (measured["oscillations"], measured["oscillation_rate"]) == (2, 1.0)
    assert measured["entropy"] == pytest.approx(2.2516291673878226)
    assert series({"a": [1.0, 1.0]})["entropy"] == 0
    assert series({}) is None


def test_coverage_with_and_without_reference_notes():
    items = {"0/a": [("main crop", 0.9), ("river name", 0.6), ("mayor", 0.2)], "0/b": [("old bridge", 0.7)]}
    run = make_run(coverage=items)
    measured = coverage(run, 0.5, 0.2)
    assert measured == {
        "by_stream": {
            "0/a": {"covered": 1, "partial": 1, "missing": 1},
            "0/b": {"covered": 1, "partial": 0, "missing": 0},
        }
    }
    run.reference_notes = {"0/a": ["The CROP is barley", "its mayor is old"]}
    measured = coverage(run, 0.5, 0.2)
    assert [measured[f"{kind}s"] for kind in ("true_positive", "false_positive", "false_negative")] == [1, 1, 1]
    assert measured["precision"]["mean"] == measured["recall"]["mean"] == measured["f1"] == 0.5
    assert measured["precision"]["low"] == pytest.approx(0.0945, abs=1e-4) and measured["precision"]["n"] == 2


def test_texts():
    assert rouge_l("a b c d", "a c d e") == 0.75
    assert rouge_l("", "") == 1 and rouge_l("a", "") == 0
    first, second = tf_idf(["a b", "a b"])
    assert sum(value * second[word] for word, value in first.items()) == pytest.approx(1)
    assert redundancy(make_run(sections={"0/a": "x y z", "0/b": "x y z", "1/a": "w"})) == pytest.approx(0.3)
    assert redundancy(make_run(sections={"0/a": "x"})) is None
    compared = compare_texts(make_run(), make_run(seconds={"total": 8.0}, committed={"0/a": 40}))
    assert compared == {"speedup": 4.0, "rouge_l": 1.0, "tf_idf_cosine": pytest.approx(1.0), "tokens_more": 1.0}
    with pytest.raises(ValueError, match=r"run\.json has 1 answers, run\.json 2: they cannot be paired"):
        compare_texts(make_run(), make_run(merged=["a", "b"]))


def test_small_statistics():
    assert quantile([], 0.5) is None and quantile([3], 0.9) == 3 and quantile([1, 2, 3, 4], 0.5) == 2.5
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation([1, 1], [1, 2]) is None


def test_runs_are_aggregated_where_they_have_a_number():
    runs = [run_metrics(make_run()), run_metrics(make_run(calls=80, margins=[1.0]))]
    measured = aggregate(runs)
    assert measured["speed.calls"] == {"mean": 70.0, "min": 60.0, "max": 80.0, "n": 2}
    assert measured["margin.p50"]["n"] == 1
    assert not [name for name in measured if "by_stream" in name]


@pytest.mark.parametrize(
    ("field", "value"), [("plan_vocab_size", 1024), ("plan_hash_buckets", 1024), ("plan_hash_salt", "pepper")]
)
def test_other_plan_buckets_are_not_compared(field, value):
    check_comparable([make_run(), make_run()])
    with pytest.raises(ValueError, match=rf"two\.json cannot be compared with run\.json: {field} is {value!r}"):
        check_comparable([make_run(), make_run(), make_run(name="two.json", **{field: value})])


def test_short_names_are_unique():
    names = ["runs/a/m.json", "runs/b/m.json", "other.json"]
    assert labels([make_run(name=name) for name in names]) == ["a/m.json", "b/m.json", "other.json"]


@pytest.fixture
def original():
    def step(stream, agreement=None, emitted=False, back=False):
        return {"stream": stream, "notes_emitted": emitted, "rollback_performed": back, "agreement": agreement}

    item = {"index": 0, "probability": 0.8, "status": "covered", "plan_item_id": "p0", "text": "main crop"}
    return {
        "timings": {
            "bootstrap": 0.5,
            "total": 2.0,
            "stride_durations": [0.5, 0.7],
            "sync_overhead_s": 0.2,
            "per_token": [{"step": 0, "stream": "intro", "duration_s": 0.1, "top2_margin": 1.5}],
        },
        "instrumented_layers": [14, 15],
        "config": {"stride_B": 4, "tau": 0.15},
        "streams": {
            "intro": {"text": "one", "token_ids": [1, 2, 3], "gate": 0.5, "coverage": {"plan_items": [item]}},
            "core": {"text": "two", "token_ids": [4], "gate": 0.5, "coverage": None},
        },
        "rollbacks": [{"stream": "core", "tokens_removed": [7, 8], "remaining_tokens": [4]}],
        "events": [step("intro", 0.9), step("intro", 0.9, True), step("core", 0.1, True, True)],
        "steps": 6,
        "plan_vocab_size": 65536,
        "plan_hash_buckets": 65536,
        "plan_hash_salt": "parallel-decoder-v1",
        "gate_trace": [{"step": 0, "stream": "intro", "value": 0.4}],
    }


def test_an_original_manifest_is_read(original, tmp_path):
    path = tmp_path / "original.json"
    path.write_text(json.dumps(original))
    run = read_run(path)
    assert run.original and run.layers == [14, 15] and run.calls == 6
    assert run.judged == [("0/intro", 0.9, False), ("0/core", 0.1, True)]
    assert run.rollbacks == {"0/intro": [], "0/core": [2]}
    measured = run_metrics(run)
    assert measured["speed"]["alpha"] == 0.6 and measured["speed"]["beta"] == pytest.approx(1 / 3)
    assert measured["margin"]["p50"] == 1.5 and measured["gate"]["mean"] == 0.4
    assert measured["coverage"]["by_stream"]["0/intro"]["covered"] == 1
    del original["timings"]
    path.write_text(json.dumps(original))
    with pytest.raises(ValueError, match="manifest must have 'schema_version'"):
        read_run(path)


def test_the_recipe_writes_a_report(original, tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(original))
    words = ["--manifests", *map(str, files), "--baseline", str(files[0]), "--output_folder", str(tmp_path / "report")]
    report = analyze.main(words)
    assert report["baseline"]["b.json"]["speedup"] == 1.0 and report["aggregate"]["speed.calls"]["n"] == 2
    page = (tmp_path / "report/analysis.md").read_text()
    assert "| speed.alpha | 0.6 | 0.6 |" in page and "written by the original system" in page
    assert (tmp_path / "report/blocks_0.png").stat().st_size > 1000 and "blocks_1.png" in page
    with pytest.raises(
        ValueError, match=r"partial_band must be in \[0, 0\.10\] with coverage_threshold=0\.9, got 0\.2"
    ):
        analyze.main([*words, "--coverage_threshold", "0.9"])
