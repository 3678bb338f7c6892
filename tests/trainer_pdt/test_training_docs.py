"""docs/training.md: its commands parse and name files that exist, and its remedies name options that exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from modeling_pdt import PDTAdapterConfig
from tests.trainer_pdt.test_evaluation_pass import defined_names
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.callbacks import ReportCallback
from trainer_pdt.curriculum import LOSS_NAMES, PARAMETER_GROUPS, Stage
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/training.md").read_text(encoding="utf-8")
OWNERS = (PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
CPU = ["--use_cpu"]


def commands():
    """Command lines of the shell blocks, `$RUN` filled in, continued lines joined."""
    found, variables = [], {}
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            name, is_set, value = line.partition('="')
            if is_set and name.isidentifier():
                variables[f"${name}"] = value.rstrip('"')
            elif line.strip():
                for variable, content in variables.items():
                    line = line.replace(variable, content)
                found.append(shlex.split(line, comments=True))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_name_files_that_exist(words):
    assert [word for word in words if word.endswith((".yaml", ".py"))]
    assert not [word for word in words if word.endswith((".yaml", ".py")) and not (ROOT / word).is_file()]


@pytest.mark.parametrize("words", [c for c in commands() if "recipes/train.py" in c], ids=" ".join)
def test_training_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = words[words.index("recipes/train.py") + 1 :]
    # A machine without GPU parses as one with them.
    *_, curriculum, training = RecipeParser(*OWNERS).parse([word for word in options if word != "--use_cpu"] + CPU)
    assert curriculum.build(training.max_steps).stages


def known_words():
    """Options, stage fields, losses, groups, measures and keys of the report."""
    fields = {f.name for owner in (*OWNERS, Stage, EvaluationArguments) for f in dataclasses.fields(owner)}
    report = set(re.findall(r'"(\w+)":', Path(ReportCallback.write.__code__.co_filename).read_text(encoding="utf-8")))
    logged = {"grad_norm", "nli_violation", "auroc", "reference_classes", "loss_kd", "loss_use", "loss_lm_ce"}
    return fields | set(LOSS_NAMES) | set(PARAMETER_GROUPS) | defined_names() | report | logged


def test_symptoms_name_what_exists():
    rows = [line for line in TEXT.split("## Symptoms")[1].split("## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 20 and all(row.count("|") == 4 for row in rows)
    words = {re.split(r"[: =]", word)[0] for row in rows[2:] for word in re.findall("`([^`]+)`", row)}
    names = {word.removesuffix("_mix_1").removesuffix("_ablated") for word in words if re.fullmatch(r"\w+", word)}
    assert names <= known_words()
    files = {word for word in words if word.startswith("recipes/")}
    assert files and not [word for word in files if not (ROOT / word).is_file()]
