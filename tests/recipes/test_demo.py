"""recipes/demo.py: what it runs, what it keeps, what it refuses; and the whole chain with tiny numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import demo as recipe
from trainer_pdt.parser import RecipeParser, load_yaml
from trainer_pdt.telemetry import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
TRUNK = ROOT / "recipes/tiny/trunk/model.safetensors"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The script in an empty repository with a recipe and a trunk; commands are recorded, not run."""
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk/model.safetensors").touch()
    stages = [{"name": "bus", "until": 1.0, "train": ["snc"], "losses": {"lm_ce": 1.0}}]
    write_json(tmp_path / "train.yaml", {"trunk": "trunk", "max_steps": 3, "stages": stages})
    config = {"demo_folder": "build/demo", "train_config": "train.yaml", "decode_prompts": ["One.", "It's two."]}
    write_json(tmp_path / "recipes/tiny/demo.yaml", {**config, "expected_minutes": {"train": 2.5, "report": 0.5}})
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    demo = SimpleNamespace(ran=[], fails=())

    def run(command, cwd, env, check):
        assert cwd == tmp_path and env["OMP_NUM_THREADS"] == "2"
        demo.ran.append(command)
        return subprocess.CompletedProcess(command, 3 if any(word in command for word in demo.fails) else 0)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    return demo


def start(demo, monkeypatch, *words):
    demo.ran.clear()
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    recipe.main()
    return [
        next(word for word in command if word.startswith(("recipes/", "trainer")) and "yaml" not in word)
        for command in demo.ran
    ]


ALL = ["recipes/train.py", "recipes/evaluate.py", *["recipes/decode.py"] * 2, "trainer_pdt.evaluation.report"]


def test_parts_run_in_order_and_say_so(demo, monkeypatch, capsys, tmp_path):
    assert start(demo, monkeypatch) == ALL
    text = capsys.readouterr().out
    assert text.index("expected in all: 3 minutes on 2 cores") < text.index("demo: train: python -m accelerate")
    assert "--prompt 'It'\"'\"'s two.'" in text and "open build/demo/index.html" in text
    assert read_json(tmp_path / "build/demo/train_overrides.json") == {"output_dir": "build/demo/model", "threads": 2}
    assert list(read_json(tmp_path / "build/demo/demo.json")["parts"]) == ["train", "evaluate", "decode", "report"]


def test_resume_keeps_finished_parts_and_repeats_what_follows_a_change(demo, monkeypatch, capsys):
    demo.fails = ("recipes/evaluate.py",)
    with pytest.raises(SystemExit, match="add --resume"):
        start(demo, monkeypatch)
    assert "demo: evaluate failed with exit status 3: python recipes/evaluate.py" in capsys.readouterr().err
    demo.fails = ()
    assert start(demo, monkeypatch, "--resume") == ALL[1:]
    assert start(demo, monkeypatch, "--resume") == []
    changed = json.dumps({"seed": 5})
    assert start(demo, monkeypatch, "--resume", "--decode_options", changed) == ALL[2:]
    assert start(demo, monkeypatch) == ALL


def test_resume_goes_on_where_training_ended_without_its_mark(demo, monkeypatch, tmp_path):
    demo.fails = ("recipes/train.py",)
    with pytest.raises(SystemExit, match="add --resume"):
        start(demo, monkeypatch)
    demo.fails = ()
    model = tmp_path / "build/demo/model"
    write_json(model / "trainer_state.json", {"global_step": 2})
    (model / "training_args.bin").touch()
    assert start(demo, monkeypatch, "--resume")[:2] == ALL[:2]
    state = read_json(tmp_path / "build/demo/demo.json")
    write_json(tmp_path / "build/demo/demo.json", {**state, "parts": {}})
    write_json(model / "trainer_state.json", {"global_step": 3})
    assert start(demo, monkeypatch, "--resume") == ["trainer_pdt.training_report", *ALL[1:]]
    assert start(demo, monkeypatch, "--resume") == []


def test_resume_refuses_other_training_settings(demo, monkeypatch, tmp_path):
    start(demo, monkeypatch)
    with pytest.raises(SystemExit, match="was made with other settings"):
        start(demo, monkeypatch, "--resume", "--train_options", json.dumps({"max_steps": 4}))
    assert (tmp_path / "build/demo/demo.json").is_file()


def test_foreign_folder_is_left_alone(demo, monkeypatch, tmp_path):
    (tmp_path / "build/demo").mkdir(parents=True)
    (tmp_path / "build/demo/thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="build/demo holds other files"):
        start(demo, monkeypatch)
    assert (tmp_path / "build/demo/thesis.txt").read_text() == "mine"


def test_missing_trunk_says_how_to_make_it(demo, monkeypatch, tmp_path):
    (tmp_path / "trunk/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="no trunk in trunk; `make trunk` trains it"):
        start(demo, monkeypatch)
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("train_options", {"max_stepz": 3}, "unknown field `max_stepz`"),
        ("train_options", {"train_documents": 0}, "train_documents=0, allowed"),
        ("train_options", {"stages": []}, "stages is empty"),
        ("evaluate_options", {"foo": 1}, "unknown field `foo`"),
        ("decode_options", {"foo": 1}, "unknown field `foo`"),
        ("decode_options", {"temperature": -1}, "temperature=-1"),
    ],
)
def test_options_are_read_before_anything_is_made(demo, monkeypatch, tmp_path, option, value, message):
    # Wrong options of a later part were found when the folder was emptied and the training done.
    start(demo, monkeypatch)
    demo.ran.clear()
    result = tmp_path / "build/demo/result.txt"
    result.write_text("kept")
    with pytest.raises(ValueError, match=message):
        start(demo, monkeypatch, f"--{option}", json.dumps(value))
    assert demo.ran == [] and result.read_text() == "kept"


def test_words_of_options():
    options = {"plan": "trunk", "names": ["a", "b"], "rate": 0.5, "on": True, "stages": [{"until": 3}]}
    assert recipe.as_words(options) == [
        *("--plan", "trunk", "--names", "a", "b", "--rate", "0.5", "--on", "true", "--stages", '{"until": 3}'),
    ]


@pytest.mark.parametrize("name", ["demo.yaml", "smoke.yaml"])
def test_shipped_recipes_fill_the_arguments(name):
    (arguments,) = RecipeParser(recipe.DemoArguments).parse(["--config", str(ROOT / "recipes/tiny" / name)])
    assert set(arguments.expected_minutes) == set(recipe.SAYS)
    known = load_yaml(ROOT / arguments.train_config).keys()
    assert not arguments.train_options.keys() - known - {"stages"}
    assert round(sum(arguments.expected_minutes.values()), 1) <= (15 if name == "demo.yaml" else 2)


@pytest.mark.slow
@pytest.mark.skipif(not TRUNK.is_file(), reason="the shipped trunk is missing: make trunk")
def test_smoke_runs_the_whole_chain():
    folder = ROOT / "build/test_smoke"
    done = subprocess.run(
        [
            sys.executable,
            "recipes/demo.py",
            "--config",
            "recipes/tiny/smoke.yaml",
            "--demo_folder",
            "build/test_smoke",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    evaluation = read_json(folder / "evaluation.json")
    wanted = {
        "sibling_fact_recall": {"pdt", "independent", "ablated", "swapped_follow", "sequential", "full_text"},
        "coverage": {"precision", "recall"},
        "agreement": {"auroc", "repaired", "false_rollback"},
        "text_ce": {"pdt", "trunk"},
        "speed": {"parallel_vs_single", "overhead_vs_shared_prefill"},
        "nli_violation": {"pdt", "given", "planted"},
        "consistency": {"pdt", "sequential", "planted"},
        "similarity": {"pdt", "sequential"},
        "dependency_ce": {"dependency", "dependency_gain", "non_dependency"},
        "note_usage": {"gate", "notes", "source"},
    }
    for section, keys in wanted.items():
        assert keys <= evaluation[section].keys()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "Sibling-fact recall" in page and "Decoded answers" in page and "data:image/png" in page
    assert read_json(folder / "decode/prompt_1.json")["merged"]
    assert {path.name for path in (folder / "plots").iterdir()} >= {"recall.png", "learning.png", "dependency.png"}
