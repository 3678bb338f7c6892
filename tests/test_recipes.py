"""Every YAML under recipes/ parses, with the reader that the recipes use."""

from pathlib import Path

import pytest
import yaml

from trainer_pdt.parser import load_yaml

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
    kinds = {"cpu": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert content["distributed_type"] == kinds[path.stem]
    assert content["num_processes"] >= 1
    if content["distributed_type"] == "DEEPSPEED":
        assert content["deepspeed_config"]["zero_stage"] == int(path.stem[-1])


def test_launchers_exist():
    assert {path.stem for path in LAUNCHERS} >= {"cpu", "ddp", "zero2", "zero3"}
