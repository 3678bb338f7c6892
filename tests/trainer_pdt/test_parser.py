"""RecipeParser: merging, types, errors with names, and the two foreign base classes."""

import dataclasses
import enum
from typing import Any, Literal, Optional

import pytest
from peft import PeftConfig
from transformers import TrainingArguments

from trainer_pdt.parser import RecipeParser, load_yaml


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Data:
    dataset_path: str
    count: int = 3
    ratio: float = 0.5
    shuffle: bool = False
    mode: Literal["fast", "slow"] = "fast"
    names: list[str] | None = None
    pair: tuple[int, float] = (1, 2.0)
    limit: Optional[float] = None  # noqa: UP045 - the old spelling must parse too
    colour: Colour = Colour.RED
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list, metadata={"help": "what to train when"})
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    lag: int | float = 1


@dataclasses.dataclass
class Loss:
    loss_kd: float = 1.0
    loss_cov: float = 0.1


@dataclasses.dataclass
class Training(TrainingArguments):
    gate_lr_scale: float = dataclasses.field(default=10.0, metadata={"help": "multiplier of the gate's rate"})


@dataclasses.dataclass
class Adapter(PeftConfig):
    notes_dim: int = dataclasses.field(default=8, metadata={"help": "width of a note"})
    snc_init: Literal["trunk_space", "zero"] = "trunk_space"


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_merge_left_to_right_and_the_command_line_wins(tmp_path):
    first = write(tmp_path, "a.yaml", "dataset_path: a\ncount: 1\nratio: 0.1\nloss_kd: 2\n")
    second = write(tmp_path, "b.yaml", "count: 2\nratio: 0.2\n")
    data, loss = RecipeParser(Data, Loss).parse(["--config", first, "--config", second, "--ratio", "0.3"])
    assert (data.dataset_path, data.count, data.ratio, loss.loss_kd) == ("a", 2, 0.3, 2.0)
    assert isinstance(loss.loss_kd, float)
    swapped, _ = RecipeParser(Data, Loss).parse([f"--config={second}", f"--config={first}"])
    assert (swapped.count, swapped.ratio) == (1, 0.1)
    both, _ = RecipeParser(Data, Loss).parse(["--config", first, second])
    assert both.count == 2


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "+2e-4", "0.0002", "20e-5"])
def test_exponents_are_floats_everywhere(tmp_path, text):
    path = write(tmp_path, "a.yaml", f"dataset_path: a\nratio: {text}\nstages: [{{lr: {text}, names: [x, {text}]}}]\n")
    (data,) = RecipeParser(Data).parse(["--config", path])
    assert data.ratio == pytest.approx(2e-4)
    assert data.stages[0]["lr"] == pytest.approx(2e-4)
    assert data.stages[0]["names"][1] == pytest.approx(2e-4)
    (data,) = RecipeParser(Data).parse(["--dataset_path", "a", "--ratio", text])
    assert data.ratio == pytest.approx(2e-4)


def test_words_that_only_look_like_numbers_or_booleans_stay_words(tmp_path):
    path = write(tmp_path, "a.yaml", "stages: [{a: no, b: on, c: e5, d: 1.2.3, e: true, f: -.5, g: 12}]\n")
    assert load_yaml(path)["stages"] == [
        {"a": "no", "b": "on", "c": "e5", "d": "1.2.3", "e": True, "f": -0.5, "g": 12}
    ]


def test_lists_of_mappings_pass(tmp_path):
    text = "dataset_path: a\nstages:\n  - {name: planner, until: 4, train: [planner], losses: {planner: 1e-1}}\n"
    (data,) = RecipeParser(Data).parse(["--config", write(tmp_path, "a.yaml", text)])
    assert data.stages == [{"name": "planner", "until": 4, "train": ["planner"], "losses": {"planner": 0.1}}]


def test_command_line_forms():
    args = ["--dataset-path=x", "--shuffle", "--names", "a", "5", "--pair", "[2, 3]", "--limit", "-1.5", "--mode=slow"]
    args += ["--stages", "[{name: s, until: 1}]", "--weights", "{kd: 1e-2}", "--count", "1e3", "--colour", "red"]
    (data,) = RecipeParser(Data).parse(args)
    assert data == Data("x", 1000, 0.5, True, "slow", ["a", "5"], (2, 3.0), -1.5, Colour.RED,
                        [{"name": "s", "until": 1}], {"kd": 0.01})  # fmt: skip
    assert isinstance(data.count, int)
    assert isinstance(data.pair[1], float)


def test_text_fields_keep_their_words():
    (data,) = RecipeParser(Data).parse(["--dataset_path", "2026", "--names", "one"])
    assert (data.dataset_path, data.names) == ("2026", ["one"])
    (data,) = RecipeParser(Data).parse(["--dataset_path", "null", "--limit", "null", "--count", "1", "--count", "2"])
    assert (data.dataset_path, data.limit, data.count) == ("null", None, 2)


def test_the_values_own_type_wins_in_a_union():
    parser = RecipeParser(Data)
    assert [type(parser.parse_values({"dataset_path": "a", "lag": lag})[0].lag) for lag in (2, 0.25)] == [int, float]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "four", "int"),
        ("count", 1.5, "int"),
        ("count", True, "int"),
        ("count", None, "int"),
        ("ratio", "high", "float"),
        ("ratio", False, "float"),
        ("shuffle", "no", "bool"),
        ("shuffle", 1, "bool"),
        ("dataset_path", 5, "str"),
        ("mode", "medium", "one of 'fast', 'slow'"),
        ("colour", "blue", "one of 'red'"),
        ("names", "one", "list"),
        ("names", [1], "str"),
        ("pair", [1], "list of 2 values"),
        ("stages", [1], "mapping"),
        ("stages", {"a": 1}, "list"),
        ("weights", {"kd": "much"}, "float"),
        ("limit", "none", "float or null"),
    ],
)
def test_type_errors_name_field_value_and_type(key, value, expected):
    with pytest.raises(ValueError) as error:
        RecipeParser(Data).parse_values({"dataset_path": "a", key: value})
    assert f"`{key}` = {value!r}" in str(error.value)
    assert expected in str(error.value)


def test_type_errors_name_the_source(tmp_path):
    path = write(tmp_path, "bad.yaml", "dataset_path: a\ncount: many\n")
    with pytest.raises(ValueError, match=r"`count` = 'many' \(.*bad\.yaml\): must be int"):
        RecipeParser(Data).parse(["--config", path])
    with pytest.raises(ValueError, match=r"`count` = 'many' \(command line\)"):
        RecipeParser(Data).parse(["--count", "many", "--dataset_path", "a"])
    with pytest.raises(ValueError, match=r"`count` = True"):
        RecipeParser(Data).parse(["--dataset_path", "a", "--count"])


def test_unknown_keys_fail_with_a_suggestion(tmp_path):
    path = write(tmp_path, "a.yaml", "dataset_path: a\nlos_kd: 1\n")
    with pytest.raises(ValueError, match=r"unknown field `los_kd` \(.*a\.yaml\); did you mean `loss_kd`\?"):
        RecipeParser(Data, Loss).parse(["--config", path])
    with pytest.raises(ValueError, match=r"unknown field `configs` \(command line\); did you mean `config`\?"):
        RecipeParser(Data).parse(["--configs", path])
    with pytest.raises(ValueError, match=r"unknown field `zzzzzz` \(command line\)$"):
        RecipeParser(Data).parse(["--zzzzzz", "1"])


def test_missing_required_fields_are_named():
    with pytest.raises(ValueError, match=r"required and not set: `dataset_path` \(Data\)"):
        RecipeParser(Data, Loss).parse([])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_yaml(tmp_path / "absent.yaml")
    assert load_yaml(write(tmp_path, "empty.yaml", "# nothing\n")) == {}
    for text in ("- a\n- b\n", "1: a\n"):
        with pytest.raises(ValueError, match="top level must be a mapping"):
            load_yaml(write(tmp_path, "list.yaml", text))
    with pytest.raises(ValueError, match=r"bad\.yaml is not a valid recipe"):
        load_yaml(write(tmp_path, "bad.yaml", "a: [1\n"))
    with pytest.raises(ValueError, match="`a` is set twice"):
        load_yaml(write(tmp_path, "twice.yaml", "a: 1\na: 2\n"))
    with pytest.raises(ValueError, match="not a valid recipe"):
        load_yaml(write(tmp_path, "unsafe.yaml", "a: !!python/object/apply:os.getcwd []\n"))
    with pytest.raises(ValueError, match=r"unexpected 'a\.yaml'"):
        RecipeParser(Data).parse(["a.yaml"])


def test_field_names_are_unique():
    @dataclasses.dataclass
    class Twin:
        count: int = 1

    with pytest.raises(ValueError, match="`count` is a field of Data and of Twin"):
        RecipeParser(Data, Twin)


def test_training_arguments_and_peft_config(tmp_path):
    text = f"output_dir: {tmp_path}\nlearning_rate: 2e-4\nmax_steps: 4\neval_strategy: no\nlr_scheduler_type: cosine\n"
    text += "report_to: none\nuse_cpu: true\nnotes_dim: 16\nsnc_init: zero\nlr_scheduler_kwargs: {num_cycles: 0.5}\n"
    path = write(tmp_path, "a.yaml", text + "gate_lr_scale: 5\n")
    adapter, training = RecipeParser(Adapter, Training).parse(["--config", path, "--save_steps", "0.5", "--seed=7"])
    assert (adapter.notes_dim, adapter.snc_init) == (16, "zero")
    assert (training.learning_rate, training.max_steps, training.gate_lr_scale) == (2e-4, 4, 5.0)
    assert (training.save_steps, training.seed, training.eval_strategy.value) == (0.5, 7, "no")
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.5}
    assert training.lr_scheduler_type.value == "cosine"


def test_help_lists_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        RecipeParser(Data, Training).parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--dataset_path (required)" in text
    assert "--stages (default []) what to train when" in text
    assert "--gate_lr_scale (default 10.0) multiplier of the gate's rate" in text
