"""The benchmark of a training step: sides, interleaving, memory and what it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from trainer_pdt.parser import RecipeParser
from trainer_pdt.training_benchmark import (
    BASELINE,
    StepBenchmarkArguments,
    Workload,
    interleaved,
    make_side,
    markdown_table,
    summarise,
)

ROOT = Path(__file__).resolve().parents[2]
TRUNK = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1216,
}
SIDES = {
    "two_branches": {"losses": {"lm_ce": 1.0, "kd": 1.0}, "kd_top_k": 8},
    "text_teacher": {"losses": {"lm_ce": 1.0, "kd": 1.0}, "kd_top_k": 8, "teacher_kind": "text"},
}


@pytest.fixture
def arguments(tmp_path):
    choices = {"documents": 1, "batches": 2, "rounds": 2, "warmup": 0, "output": str(tmp_path / "step.json")}
    tokenizer = str(ROOT / "recipes/tiny/trunk")
    return StepBenchmarkArguments(trunk_config=TRUNK, sides=SIDES, tokenizer=tokenizer, **choices)


@pytest.mark.parametrize("name", [BASELINE, "lora", *SIDES])
def test_every_side_learns_from_the_same_rows_without_touching_the_trunk(arguments, name):
    workload = Workload(arguments)
    side = make_side(workload, name)
    before = [parameter.detach().clone() for parameter in workload.trunk().parameters()]
    losses = [float(side.step(0)) for _ in range(30)]
    assert losses[-1] < losses[0]
    after = [parameter for parameter in side.trunk.parameters() if not parameter.requires_grad]
    assert all(any(torch.equal(old, new) for new in after) for old in before)
    reference = make_side(workload, BASELINE).batches
    for mine, his in zip(side.batches, reference, strict=True):
        # Padded on other sides.
        assert torch.equal(*(batch["input_ids"][batch["attention_mask"].bool()] for batch in (mine, his)))
        assert torch.equal(*(batch["labels"][batch["labels"] != -100] for batch in (mine, his)))


def test_rounds_are_interleaved_and_every_side_goes_first_in_turn():
    calls = []
    steps = {name: lambda index, name=name: calls.append((index, name)) for name in "abc"}
    seconds = interleaved(steps, 2, 1, torch.device("cpu"))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert [name for _, name in calls] == [*"abc", *"bca", *"cab"]
    assert [index for index, _ in calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_summary_holds_ratios_increments_and_bars(arguments):
    seconds = {BASELINE: [1.0, 2.0], "lora": [1.5, 3.0], "two_branches": [1.3, 2.6], "text_teacher": [1.8, 3.6]}
    memory = {BASELINE: 100, "lora": 110, "two_branches": 130, "text_teacher": 140}
    sides, bars = summarise(arguments, seconds, memory)
    assert sides["two_branches"]["ratio"] == pytest.approx({"mean": 1.3, "low": 1.3, "high": 1.3, "n": 2})
    assert sides["text_teacher"]["increment"]["mean"] == pytest.approx(0.5)
    assert "increment" not in sides["two_branches"]
    assert [bar["met"] for bar in bars] == [True, False]
    table = markdown_table({"command": "x", "settings": {}, "sides": sides, "bars": bars})
    assert "| two_branches | 1.950 | 1.300 (1.300 to 1.300, n=2) |" in table and "missed" in table


@pytest.mark.parametrize(
    "changes",
    [{"documents": 0}, {"rounds": 1}, {"sides": {}}, {"sides": {"lora": {"losses": {}}}}, {"trunk_config": {}}],
)
def test_bad_arguments_name_field_and_allowed_values(arguments, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}.*allowed"):
        StepBenchmarkArguments(**{**vars(arguments), **changes})


def test_the_shipped_recipe_parses():
    (shipped,) = RecipeParser(StepBenchmarkArguments).parse(["--config", str(ROOT / "recipes/benchmarks/step.yaml")])
    assert shipped.trunk_config["hidden_size"] >= 512
    assert shipped.sides["two_branches"]["kd_top_k"] == 64


@pytest.mark.slow
def test_the_recipe_writes_json_and_table(arguments, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import benchmark

    values = {key: value for key, value in vars(arguments).items() if key != "sides"} | {
        "sides": {"two": SIDES["two_branches"]}
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "step", "--config", str(recipe)])
    report = benchmark.main()
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["bars"] == report["bars"]
    assert all(side["peak_bytes"] > 0 for side in written["sides"].values())
    assert (tmp_path / "step.md").read_text().startswith("#")
