"""A Space's folder: the card from telemetry, requirements as tested, and all that the page needs to run."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import SpaceCard

from tests.space.conftest import ROOT
from trainer_pdt.publishing import release_files
from trainer_pdt.space import SpaceArguments, pinned, stage_space

EVALUATION = ROOT / "docs/benchmarks/demo/evaluation.json"


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    where = tmp_path_factory.mktemp("staging")
    return stage_space(SpaceArguments("me/pdt", "me/demo", str(EVALUATION), staging_folder=str(where)), ROOT)


def test_the_card_says_what_was_measured(staged):
    card = SpaceCard.load(staged / "README.md")
    assert card.data.models == ["me/pdt"] and card.data.sdk == "gradio" and card.data.license == "apache-2.0"
    assert card.data.app_file == "app.py" and (staged / "app.py").is_file()
    assert card.data.sdk_version == pinned("gradio", ROOT / "constraints.txt")
    assert len(card.data.short_description) <= 60
    assert re.search(r"\| sibling-fact recall \| 0\.\d+ \| 0\.\d+ to 0\.\d+ \| \d+ \|", card.content)
    assert "None" not in card.content


def test_without_telemetry_there_are_no_figures(tmp_path):
    folder = stage_space(SpaceArguments("me/pdt", "me/demo", staging_folder=str(tmp_path)), ROOT)
    assert "Measured" not in SpaceCard.load(folder / "README.md").content


def test_requirements_are_the_tested_versions():
    pins = set((ROOT / "constraints.txt").read_text().splitlines())
    assert set((ROOT / "hub_cards/space/requirements.txt").read_text().splitlines()) <= pins


def test_only_repositories_are_published(tmp_path):
    with pytest.raises(ValueError, match="model='build/demo/model', allowed: owner/name"):
        SpaceArguments("build/demo/model", "me/demo")
    with pytest.raises(ValueError, match="repo_id='demo', allowed: owner/name"):
        SpaceArguments("me/pdt", "demo")
    with pytest.raises(ValueError, match="has no line gradio==VERSION"):
        (tmp_path / "constraints.txt").write_text("torch==2\n")
        pinned("gradio", tmp_path / "constraints.txt")


def test_a_dry_run_shows_everything(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("push_space", ROOT / "recipes/push_space.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    words = ["--model", "me/pdt", "--repo_id", "me/demo", "--staging_folder", str(tmp_path), "--dry-run"]
    assert recipe.main(words) is None
    shown = capsys.readouterr().out
    assert "pdt_space/style.css" in shown and "title: Parallel Decoder Transformer" in shown and "dry run" in shown


@pytest.mark.slow
def test_the_folder_runs_by_itself(staged, model_folder):
    """In a process that has neither this repository nor its packages on its path."""
    assert not [name for name in release_files(staged) if "__pycache__" in name]
    code = (
        "import sys, modeling_pdt, trainer_pdt\n"
        "from pdt_space.session import ModelShelf, Wish, answer\n"
        "from pdt_space.view import stage\n"
        "assert 'demo' in modeling_pdt.__file__ and 'demo' in trainer_pdt.__file__, modeling_pdt.__file__\n"
        "wish = Wish('Describe the town of Velmar.', plan='none', max_new_tokens=10)\n"
        "*_, boards = answer(ModelShelf().get(sys.argv[1]), wish)\n"
        "assert stage(boards).count('class=\"pdt-column\"') == 3 and boards[0].done\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(model_folder)]
    done = subprocess.run(command, cwd=staged, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
