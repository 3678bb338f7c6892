"""Folders that recipes load from: missing ones, and datasets of another kind."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from trainer_pdt.arguments import DataArguments
from trainer_pdt.features import load_features
from trainer_pdt.loading import check_source, load_trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("value", ["/nowhere/model", "build/of/nobody", "./model"])
def test_a_missing_folder_is_no_malformed_repository(value):
    # The Hub said that a repository's name has to look otherwise.
    with pytest.raises(
        ValueError, match=f"model='{value}', allowed: a folder that exists, or a repository of the Hub"
    ):
        load_trained(value)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match=r"revision='v2', allowed: none, the model .* is a folder"):
        load_trained(str(tmp_path), revision="v2")


def test_folders_and_repositories_pass(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for value in (str(tmp_path), "owner/model", "gpt2"):
        check_source("trunk", value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        # A parent folder: "does not appear to have a file named generation_config.json. Checkout https://..."
        (None, "it holds none"),
        # A trunk: 25 unknown keys of PDTConfig.
        ({"model_type": "gpt_oss"}, "its config.json has model_type='gpt_oss'"),
        ("[]", "its config.json has no model_type"),
        ("{", "its config.json is no JSON"),
    ],
)
def test_a_folder_of_something_else_is_no_model(config, found, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    message = f"model='{tmp_path}', allowed: a folder with the config.json of a PDT model (model_type='pdt'); {found}."
    with pytest.raises(ValueError, match=re.escape(message)):
        load_trained(str(tmp_path))


def test_what_the_readme_saves_first_can_be_loaded(tmp_path, monkeypatch):
    # It saved no tokenizer, and the recipe that decodes failed for want of sentencepiece.
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)[1]
    exec(code, {})
    load_trained("build/adapters")
    for file in (tmp_path / "build/adapters").glob("tokenizer*"):
        file.unlink()
    message = r"model='build/adapters' holds no tokenizer, allowed: .* AutoTokenizer.from_pretrained\(TRUNK\)"
    with pytest.raises(ValueError, match=message):
        load_trained("build/adapters")


def test_a_folder_without_configuration_is_no_trunk(tmp_path):
    with pytest.raises(ValueError, match=r"trunk=.* allowed: a folder with the config.json of a model; it holds none"):
        check_source("trunk", str(tmp_path))


def test_offline_a_name_is_a_folder_or_was_downloaded_before(tmp_path, monkeypatch):
    # "couldn't connect to huggingface.co" was all that a mistyped path was told.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models--owner--model").mkdir()
    check_source("trunk", "owner/model")
    for value in ("build/nothere", "nothere"):
        message = rf"trunk='{value}', allowed: .*: there is no such folder here, and the Hub is switched off"
        with pytest.raises(ValueError, match=message):
            check_source("trunk", value)


def test_a_folder_of_something_else_is_no_dataset(tmp_path):
    # "No task.toml or instruction.md files found" was said of a folder of text.
    (tmp_path / "readme.md").write_text("text")
    message = r"dataset_path='.*', allowed: a folder with data/\*\.parquet .* it has neither"
    with pytest.raises(ValueError, match=message):
        load_features(DataArguments(dataset_path=str(tmp_path)), None, 0)


def test_a_dataset_of_something_else_is_told(tmp_path):
    # It failed for a key, at its first row.
    rows = Dataset.from_list([{"prompt": "a", "text": "b"}])
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"dataset_path=.* lacks the columns \['document_id', 'domain', 'items', "):
        load_features(DataArguments(dataset_path=str(tmp_path)), None, 0)
