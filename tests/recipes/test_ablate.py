"""recipes/ablate.py: what it trains, keeps and repeats; trainings are pretended."""

import fcntl
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import ablate as recipe
from trainer_pdt import ablation, runs
from trainer_pdt.telemetry import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--config", str(ROOT / "recipes/tiny/ablations.yaml"), "--variants", "base,with_use"]


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """The script, in whose runs a training writes its files, or fails, in no time."""
    ablate = SimpleNamespace(ran=[], fails=(), folder=tmp_path / "out")

    def run(command, cwd, env, check, stdout, stderr, pass_fds):
        options = read_json(command[-1])
        folder = Path(options["output_dir"])
        name = f"{folder.parents[1].name}/{options['seed']}"
        ablate.ran.append(name)
        assert command[1:3] == ["recipes/train.py", "--config"] and env["OMP_NUM_THREADS"] == "1" and check
        assert len(pass_fds) == 1
        if name in ablate.fails:
            raise subprocess.CalledProcessError(1, command)
        finish(folder, options["max_steps"], 0.5 + options["seed"] / 100)

    monkeypatch.setattr(runs.subprocess, "run", run)
    monkeypatch.setattr(runs, "write_training_report", lambda folder: None)
    ablate.start = lambda *words: (ablate.ran.clear(), recipe.main([*OPTIONS, "--output", str(ablate.folder), *words]))
    return ablate


def finish(folder, step, accuracy):
    """What a training leaves behind, as far as it is read."""
    write_json(folder / "trainer_state.json", {"global_step": step})
    (folder / "training_args.bin").touch()
    (folder / "adapter_model.safetensors").touch()
    write_json(folder / "manifest.json", {"git": {"sha": "a" * 40, "dirty": False}})
    write_json(folder / "training_report.json", {"seconds_per_step": 0.25})
    write_json(
        folder / "eval_results.json", {"epoch": 1.0, "eval_sibling_value_accuracy": accuracy, "eval_runtime": 1}
    )


ALL = ["base/1", "base/2", "with_use/1", "with_use/2"]


def test_everything_is_trained_once_and_reported(ablate, capsys):
    ablate.start()
    assert ablate.ran == ALL
    report = read_json(ablate.folder / "ablations.json")
    assert report["code"] == ["a" * 12] and list(report["cases"]) == ["base", "with_use"]
    assert report["cases"]["base"]["measures"]["sibling_value_accuracy"]["values"] == [0.51, 0.52]
    assert "| with_use | base | +0.000 |" in (ablate.folder / "ablations.md").read_text(encoding="utf-8")
    ablate.start()
    assert ablate.ran == [] and "4 of 4 runs are kept, 0 to do" in capsys.readouterr().out


def test_a_change_repeats_what_it_concerns(ablate):
    ablate.start()
    (ablate.folder / "base/seed_1/model/checkpoint-3").mkdir()
    ablate.start("--options", '{"threads": 1, "learning_rate": 0.1}')
    assert ablate.ran == ALL and not (ablate.folder / "base/seed_1/model/checkpoint-3").exists()


@pytest.mark.parametrize("left", ["finished", "result gone", "a checkpoint"])
def test_another_trunk_under_the_same_path_repeats_everything(ablate, monkeypatch, left):
    monkeypatch.setattr(ablation, "weights_of", lambda recipe, root: "before")
    ablate.start()
    for name in ALL:
        case, _, seed = name.partition("/")
        folder = ablate.folder / case / f"seed_{seed}"
        if left != "finished":
            (folder / "result.json").unlink()
        if left == "a checkpoint":
            write_json(folder / "model/trainer_state.json", {"global_step": 3})
        (folder / "model/checkpoint-3").mkdir()
    monkeypatch.setattr(ablation, "weights_of", lambda recipe, root: "after")
    ablate.start()
    assert ablate.ran == ALL and not list(ablate.folder.rglob("checkpoint-3"))


def test_a_failure_is_named_and_tried_again_and_the_rest_goes_on(ablate):
    ablate.fails = ("with_use/1",)
    with pytest.raises(SystemExit, match="with_use, seed 1") as stop:
        ablate.start("--jobs", "2")
    assert "train.log" in str(stop.value)
    assert sorted(ablate.ran) == ALL and list(read_json(ablate.folder / "ablations.json")["cases"]) == ["base"]
    ablate.fails = ()
    ablate.start()
    assert ablate.ran == ["with_use/1"]
    assert list(read_json(ablate.folder / "ablations.json")["cases"]) == ["base", "with_use"]


def test_a_training_that_ended_after_a_kill_is_only_read(ablate):
    ablate.start()
    (ablate.folder / "base/seed_1/result.json").unlink()
    ablate.start()
    assert ablate.ran == [] and (ablate.folder / "base/seed_1/result.json").is_file()


def test_an_unfinished_training_is_continued_in_its_folder(ablate):
    ablate.start()
    model = ablate.folder / "base/seed_1/model"
    (model.parent / "result.json").unlink()
    write_json(model / "trainer_state.json", {"global_step": 3})
    (model / "checkpoint-3").mkdir()
    ablate.start()
    assert ablate.ran == ["base/1"] and (model / "checkpoint-3").is_dir()


def test_a_folder_at_work_is_waited_for(ablate):
    ablate.start()
    folder = ablate.folder / "base/seed_1"
    kept = read_json(folder / "result.json")
    (folder / "result.json").unlink()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=ablate.start, daemon=True)
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and not (folder / "result.json").exists()
        write_json(folder / "result.json", kept)
    thread.join(60.0)
    assert not thread.is_alive() and ablate.ran == []


def test_report_only_trains_nothing_and_says_what_is_missing(ablate, tmp_path):
    with pytest.raises(ValueError, match="must hold 'base'"):
        ablate.start("--report_only")
    assert ablate.ran == []
    ablate.start()
    (ablate.folder / "ablations.md").unlink()
    ablate.start("--report_only", "--report_folder", str(tmp_path / "report"))
    assert ablate.ran == [] and (tmp_path / "report/ablations.md").is_file()
    assert not (ablate.folder / "ablations.md").exists()
