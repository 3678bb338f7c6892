"""Every YAML under recipes/ parses, with the reader that the recipes use."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from trainer_pdt.parser import RecipeParser, load_yaml
from trainer_pdt.trunk import TrunkArguments

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for suffix in ("*.yaml", "*.yml") for path in (ROOT / "recipes").rglob(suffix))
RECIPES = [path for path in FILES if path.parent.name != "accelerate_configs"]
LAUNCHERS = [path for path in FILES if path.parent.name == "accelerate_configs"]


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_yaml_parses_to_a_mapping(path):
    content = load_yaml(path)
    assert content
    assert all(isinstance(key, str) for key in content)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_hold_no_machine_paths(path):
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if ": /" in line]


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_launchers_are_complete(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    kinds = {"cpu": "NO", "ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}
    assert content["distributed_type"] == kinds.get(path.stem, "DEEPSPEED")
    assert content["num_processes"] >= 1
    if content["distributed_type"] == "DEEPSPEED":
        assert content["deepspeed_config"]["zero_stage"] == int(path.stem[-1])


def test_launchers_exist():
    assert {path.stem for path in LAUNCHERS} == {"cpu", "ddp", "fsdp2", "multi_node", "zero2", "zero3"}


def test_the_trunk_recipe_names_fields_only():
    path = ROOT / "recipes/tiny/trunk.yaml"
    values = {key: value for key, value in load_yaml(path).items() if key != "threads"}
    arguments, training = RecipeParser(TrunkArguments, TrainingArguments).parse_values(values)
    assert training.max_steps > arguments.card_steps


SCRIPTS = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
CALLS = [[name] for name in SCRIPTS] + [["benchmark", kind] for kind in ("data", "decode", "step")]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_says_what_every_option_is(call, monkeypatch, capsys):
    # The options of a tiny trunk had names and defaults only, the benchmarks took --help for one of them.
    # Every script was called SCRIPT.
    monkeypatch.setattr(sys, "argv", [f"recipes/{call[0]}.py", *call[1:], "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"recipes.{call[0]}").main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: {' '.join([f'{call[0]}.py', *call[1:]])} ")
    assert not re.findall(r"^  --\w+ \((?:required|default [^)]*)\)$", text, re.MULTILINE)


def run_training(folder, *options):
    """Six steps of the shipped recipe in a process of its own, through accelerate."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "recipes/accelerate_configs/cpu.yaml", "recipes/train.py"]
    smoke = load_yaml(ROOT / "recipes/tiny/smoke.yaml")["train_options"]
    overrides = folder.parent / "overrides.yaml"
    overrides.write_text(yaml.safe_dump({**smoke, "max_steps": 6, "save_steps": 2, "output_dir": str(folder)}))
    recipe = ["--config", "recipes/tiny/train.yaml", str(overrides)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, *recipe, "--threads", "1", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_training_again_in_its_folder_continues_or_refuses(tmp_path):
    folder = tmp_path / "run"
    stages = json.dumps(
        [
            {"name": "bus", "until": 4, "train": ["snc", "writer"], "losses": {"lm_ce": 1.0}},
            {"name": "gate", "until": 6, "train": ["agreement"], "losses": {"agree": 1.0}, "data": "corrupted"},
        ]
    )
    done = run_training(folder, "--stages", stages)
    assert done.returncode == 0, done.stderr[-3000:]
    final = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())

    refused = run_training(folder, "--stages", stages, "--learning_rate", "0.5")
    assert refused.returncode != 0
    assert "training.learning_rate: 0.003 -> 0.5" in refused.stderr
    assert json.loads((folder / "manifest.json").read_text()) == manifest

    shutil.rmtree(folder / "checkpoint-6")
    again = run_training(folder, "--stages", stages)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == final
    continued = json.loads((folder / "manifest.json").read_text())["continued"]
    assert [entry["checkpoint"] for entry in continued] == ["checkpoint-4"]
