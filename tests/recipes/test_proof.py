"""recipes/proof.py: what it makes and in which order, pretended; and every kind of piece with tiny numbers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import proof as recipe
from trainer_pdt import runs
from trainer_pdt.telemetry import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes/tiny/proof_smoke.yaml")


@pytest.fixture
def proof(tmp_path, monkeypatch):
    """The script, in whose runs a piece leaves its files, or fails, in no time."""
    proof = SimpleNamespace(ran=[], fails=(), loses=())

    def run(command, cwd, env, check, stdout, stderr, pass_fds):
        folder = Path(command[-1]).parent
        name = folder.relative_to(tmp_path / "out").as_posix()
        proof.ran.append(name)
        options = read_json(command[-1])
        if name in proof.fails:
            raise subprocess.CalledProcessError(1, command)
        if command[1] != runs.EVALUATE:
            (folder / "model/adapter").mkdir(parents=True, exist_ok=True)
            if name not in proof.loses:
                (folder / "model/adapter/adapter_model.safetensors").touch()
        if command[1] == runs.TRAIN:
            report = {"seconds_per_step": 1.0, "seconds": 8.0, "logs": [], "step": 4}
            for file, content in (
                ("manifest.json", {"git": None}),
                ("training_report.json", report),
                ("eval_results.json", {"eval_sibling_value_accuracy": 0.5}),
            ):
                write_json(folder / "model" / file, content)
        elif command[1] == runs.EVALUATE:
            assert Path(options["model"], "training_report.json").is_file()
            recall = {"pdt": {"mean": 1.0, "n": 2}}
            write_json(folder / "evaluation.json", {"sibling_fact_recall": recall, "seconds": 60.0, "git": []})
            write_json(folder / "documents.json", {"sibling_fact_recall/pdt": [[1, 1], [1, 1]]})

    monkeypatch.setattr(runs.subprocess, "run", run)
    monkeypatch.setattr(runs, "git_state", lambda: None)
    words = ["--config", SMOKE, "--output", str(tmp_path / "out"), "--report", str(tmp_path / "report.md")]
    proof.start = lambda *more: (proof.ran.clear(), recipe.main([*words, *more]))
    return proof


ALL = [
    *("trunk/seed_1", "trained/seed_1", "trained/seed_2", "trained_evaluated/seed_1", "trained_evaluated/seed_2"),
    *("second/seed_1", "second_evaluated/seed_1", "ablations/base/seed_1", "ablations/base/seed_2"),
]


def test_every_piece_is_made_once_after_what_it_uses(proof, tmp_path, capsys):
    proof.start()
    assert proof.ran == ALL
    said = capsys.readouterr().out
    assert "proof: trained_evaluated: 0 of 2 done" in said and f"proof: wrote {tmp_path / 'report.md'}" in said
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "2 of 2 seeds are evaluated; 1 of 31 bars are met, 30 not measured." in text
    proof.start()
    assert proof.ran == [] and "proof: trained_evaluated: 2 of 2 done, about 0 min left" in capsys.readouterr().out


def test_a_call_with_little_time_makes_one_piece_and_the_next_one_the_next(proof, tmp_path, capsys):
    made = []
    for _ in range(3):
        proof.start("--minutes", "0.01")
        made += proof.ran
    assert made == ALL[:3]
    assert "no report before a seed of trained_evaluated is evaluated" in capsys.readouterr().out
    assert not (tmp_path / "report.md").exists()


def test_a_failure_is_named_and_what_does_not_use_it_goes_on(proof, tmp_path):
    proof.fails = ("trained/seed_1", "trunk/seed_1")
    with pytest.raises(SystemExit, match="trained, seed 1") as stop:
        proof.start()
    assert "trunk, seed 1" in str(stop.value) and "train.log" in str(stop.value)
    assert proof.ran == [*ALL[:3], "trained_evaluated/seed_2", *ALL[-2:]]
    assert "1 of 2 seeds are evaluated" in (tmp_path / "report.md").read_text(encoding="utf-8")
    proof.fails = ()
    proof.start()
    assert proof.ran == ["trunk/seed_1", "trained/seed_1", "trained_evaluated/seed_1", *ALL[5:7]]


def test_report_only_makes_nothing(proof, tmp_path):
    proof.start()
    (tmp_path / "report.md").unlink()
    proof.start("--report_only")
    assert proof.ran == [] and (tmp_path / "report.md").is_file()


def test_records_finish_pieces_on_another_machine(proof, tmp_path, capsys):
    proof.start()
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    records = {path: path.read_bytes() for path in (tmp_path / "report/pieces").rglob("*.gz")}
    assert len(records) == len(ALL)
    shutil.rmtree(tmp_path / "out")
    proof.start()
    assert proof.ran == [] and "9 pieces are finished by their records" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report
    assert {path: path.read_bytes() for path in records} == records


def test_a_training_that_leaves_no_weights_has_failed(proof):
    proof.loses = ("trained/seed_1",)
    with pytest.raises(SystemExit, match=r"trained, seed 1: recipes/train.py ended, but left no \*.safetensors in"):
        proof.start()
    assert proof.ran == [name for name in ALL if name != "trained_evaluated/seed_1"]


def test_what_needs_weights_makes_them_again(proof, tmp_path):
    proof.start()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "report/pieces/second_evaluated/seed_1.json.gz").unlink()
    proof.start()
    assert proof.ran == ["trunk/seed_1", "second/seed_1", "second_evaluated/seed_1"]


def test_a_record_of_other_settings_finishes_nothing(proof, tmp_path, capsys):
    proof.start()
    capsys.readouterr()
    records = tmp_path / "report/pieces/trained_evaluated"
    shutil.copy(records / "seed_1.json.gz", records / "seed_2.json.gz")
    shutil.rmtree(tmp_path / "out/trained_evaluated/seed_2")
    proof.start()
    assert proof.ran == ["trained_evaluated/seed_2"] and "by their records" not in capsys.readouterr().out


def test_a_recipe_that_cannot_run_is_refused_before_anything_is_made(proof, monkeypatch):
    planned = recipe.plan_pieces

    def broken(*args):
        pieces = planned(*args)
        pieces["second_evaluated"][0].recipe["core_documents"] = 0
        return pieces

    monkeypatch.setattr(recipe, "plan_pieces", broken)
    with pytest.raises(ValueError, match="core_documents must be >= 2, got 0"):
        proof.start()
    assert proof.ran == []


@pytest.mark.slow
def test_smoke_makes_every_kind_of_piece(tmp_path):
    command = [sys.executable, "recipes/proof.py", "--config", SMOKE, "--output", str(tmp_path / "out")]
    command += ["--report", str(tmp_path / "report.md")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for title in ("Bars", "Sibling-fact recall", "Factors of decoding", "Rollback", "Recipes and trunks", "Values"):
        assert f"## {title}\n" in text, title
    assert "2 of 2 seeds are evaluated" in text and "exactly the contradicting blocks, stale notes" in text
    data = read_json(tmp_path / "report/proof.json")
    # The trunk repeats facts with text and without notes it cannot: nothing was learnt in four steps.
    assert data["pooled"]["sibling_fact_recall"]["full_text"]["mean"] > 0.5
    assert data["pooled"]["sibling_fact_recall"]["independent"]["mean"] < 0.5
    trunk = read_json(tmp_path / "out/trunk/seed_1/model/config.json")
    second = read_json(tmp_path / "out/second/seed_1/model/config.json")
    assert trunk["model_type"] == second["trunk_config"]["model_type"] == "qwen3"
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "0 of 2 done" not in again.stdout
