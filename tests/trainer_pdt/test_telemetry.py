"""Telemetry: JSON forms, atomic writing, manifests without secrets or machine paths."""

import dataclasses
import enum
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from trainer_pdt import telemetry


class Kind(enum.Enum):
    TRUNK = "trunk"


@dataclasses.dataclass
class Settings:
    seed: int = 1
    folder: Path = Path("build/run")
    kind: Kind = Kind.TRUNK
    hub_token: str | None = "hf_abc"
    max_new_tokens: int = 5
    eos_token: str = "<eos>"


def test_to_jsonable():
    value = {
        "settings": Settings(),
        "set": {3, 1, 2},
        "pair": (1, 2.5),
        "nan": float("nan"),
        "inf": [float("inf")],
        "tensor": torch.tensor([[1, 2]]),
        "scalar": torch.tensor(0.5),
        "numpy": numpy.float32(0.5),
        "array": numpy.arange(2),
        3: None,
        True: True,
    }
    assert json.loads(json.dumps(telemetry.to_jsonable(value))) == {
        "settings": {
            "seed": 1,
            "folder": "build/run",
            "kind": "trunk",
            "hub_token": "<hidden>",
            "max_new_tokens": 5,
            "eos_token": "<eos>",
        },
        "set": [1, 2, 3],
        "pair": [1, 2.5],
        "nan": None,
        "inf": [None],
        "tensor": [[1, 2]],
        "scalar": 0.5,
        "numpy": 0.5,
        "array": [0, 1],
        "3": None,
        "True": True,
    }
    assert telemetry.to_jsonable({"hub_token": None}) == {"hub_token": None}


@pytest.mark.parametrize("value", [object(), {1.5: 1}, {None: 1}, {"a": [print]}])
def test_to_jsonable_refuses_unknown_types(value):
    with pytest.raises(TypeError):
        telemetry.to_jsonable(value)


def test_write_json_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    assert telemetry.write_json(path, {"é": [1, float("nan")]}) == path
    telemetry.write_json(path, {"a": 2})
    assert telemetry.read_json(path) == {"a": 2}
    assert os.listdir(path.parent) == ["x.json"]
    assert path.read_text(encoding="utf-8").endswith("\n")
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = telemetry.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        telemetry.write_json(path, {"a": object()})

    def killed(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(telemetry.os, step, killed)
            with pytest.raises(KeyboardInterrupt):
                telemetry.write_json(path, {"a": 2})
    assert telemetry.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_fingerprint_ignores_order_and_sees_values():
    assert telemetry.fingerprint({"a": 1, "b": [1, 2]}) == telemetry.fingerprint({"b": (1, 2), "a": 1})
    assert telemetry.fingerprint({"a": [1, 2]}) != telemetry.fingerprint({"a": [2, 1]})
    assert len(telemetry.fingerprint(None)) == 64


def test_package_versions():
    assert telemetry.package_versions(["torch", "no-such-package-here"]) == {
        "torch": torch.__version__,
        "no-such-package-here": None,
    }


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["recipes/train.py", "--a b", "c"], "recipes/train.py '--a b' c"),
        (["t.py", "--hub_token", "hf_x", "--seed", "1"], "t.py --hub_token '<hidden>' --seed 1"),
        (["t.py", "--hub-token=hf_x"], "t.py '--hub-token=<hidden>'"),
        (["t.py", "--api_key", "--seed", "1"], "t.py --api_key --seed 1"),
        (["t.py", "--max_new_tokens", "5"], "t.py --max_new_tokens 5"),
        ([os.path.join(os.getcwd(), "recipes", "train.py"), "-x"], "recipes/train.py -x"),
        (["/somewhere/else/bin/torchrun"], "torchrun"),
    ],
)
def test_command_line(argv, expected):
    assert telemetry.command_line(argv) == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_state(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=tmp_path, check=True
        )

    git("init", "-q")
    assert telemetry.git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1", encoding="utf-8")
    git("add", "a")
    git("commit", "-q", "--no-verify", "-m", "first")
    state = telemetry.git_state(tmp_path)
    assert len(state["sha"]) == 40
    assert state["dirty"] is False
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert telemetry.git_state(tmp_path) == {"sha": state["sha"], "dirty": True}


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert telemetry.git_state(tmp_path) is None


def test_manifest_is_complete_and_repeatable(tmp_path):
    config = {"Settings": Settings()}
    manifest = telemetry.run_manifest(seed=3, config=config, argv=["t.py"], folder=tmp_path)
    assert manifest["seed"] == 3
    assert manifest["command"] == "t.py"
    assert manifest["git"] is None
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["machine"]["threads"] == torch.get_num_threads()
    assert manifest["config"]["Settings"]["hub_token"] == "<hidden>"
    assert manifest["notes_schema_version"] == "2.0"
    assert manifest["config_fingerprint"] == telemetry.fingerprint(config)
    again = telemetry.run_manifest(seed=3, config=config, argv=["t.py"], folder=tmp_path)
    assert manifest == again
    path = telemetry.write_manifest(tmp_path, manifest)
    assert path.name == "manifest.json"
    assert telemetry.read_json(path) == manifest
    assert "hf_abc" not in path.read_text(encoding="utf-8")


def test_stage_history(tmp_path):
    records = [{"name": "planner", "first_step": 0}, {"name": "notes", "first_step": 4, "losses": {"kd": 1.0}}]
    path = telemetry.write_stage_history(tmp_path, iter(records))
    assert telemetry.read_json(path) == {"schema": 1, "stages": records}
    with pytest.raises(ValueError, match=r"stages\[0\].*must hold first_step"):
        telemetry.stage_history([{"name": "a"}])
    with pytest.raises(ValueError, match=r"stages\[1\]\.first_step = 0: must be >= 4"):
        telemetry.stage_history(reversed(records))


def test_report(tmp_path):
    path = telemetry.write_report(tmp_path, {"step": 2, "gates": [torch.tensor(0.5)], "auroc": float("nan")})
    assert path.name == "training_report.json"
    assert telemetry.read_json(path) == {"schema": 1, "step": 2, "gates": [0.5], "auroc": None}


def threshold_report(value):
    return {
        "rule": "a rule",
        "threshold": {"mean": value, "low": 0.2, "high": None, "n": 3},
        "selected_point": {"threshold": value, "tp": 1},
        "points": [{"threshold": 0.02, "precision": None, "recall": 1.0, "tp": 1, "fp": 2, "fn": 0, "tn": 0}],
    }


def test_thresholds_are_written_and_read_back(tmp_path):
    assert telemetry.read_thresholds(tmp_path) == {}
    path = telemetry.write_thresholds(tmp_path, "agreement", threshold_report(0.4))
    assert path.name == "agreement_thresholds.json"
    content = telemetry.read_json(path)
    assert content["agreement_threshold"] == content["selected_point"]["threshold"] == 0.4
    assert content["threshold_interval"] == [0.2, None] and content["rule"] == "a rule"
    assert content["roc_points"][0] == threshold_report(0.4)["points"][0]
    assert telemetry.read_thresholds(tmp_path) == {"agreement_threshold": 0.4, "agreement_scaling": None}
    telemetry.write_thresholds(tmp_path, "coverage", threshold_report(1))
    telemetry.write_thresholds(tmp_path, "agreement", {**threshold_report(0.4), "agreement_scaling": [0.5, 1.0]})
    assert telemetry.read_thresholds(tmp_path) == {
        "agreement_threshold": 0.4,
        "agreement_scaling": [0.5, 1.0],
        "coverage_threshold": 1.0,
    }


def test_thresholds_that_are_none_are_refused(tmp_path):
    for bad in (float("nan"), True, "0.4", None, 1.5):
        with pytest.raises(ValueError, match=r"agreement_threshold=.*allowed: a number in \[0, 1\]"):
            telemetry.write_thresholds(tmp_path, "agreement", threshold_report(bad))
    with pytest.raises(ValueError, match="head='stream', allowed"):
        telemetry.write_thresholds(tmp_path, "stream", threshold_report(0.4))
    telemetry.write_json(tmp_path / "coverage_thresholds.json", {"schema": 1, "coverage_threshold": 7})
    with pytest.raises(ValueError, match="coverage_threshold=7, allowed"):
        telemetry.read_thresholds(tmp_path)
    telemetry.write_json(tmp_path / "coverage_thresholds.json", {"coverage_threshold": 0.5})
    with pytest.raises(ValueError, match="schema=None, allowed: 1"):
        telemetry.read_thresholds(tmp_path)
