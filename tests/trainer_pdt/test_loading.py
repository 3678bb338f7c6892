"""Folders that recipes load from: missing ones, and datasets of another kind."""

import pytest
from datasets import Dataset, DatasetDict

from trainer_pdt.arguments import DataArguments
from trainer_pdt.features import load_features
from trainer_pdt.loading import check_source, load_trained


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


def test_folders_and_repositories_pass(tmp_path):
    for value in (str(tmp_path), "owner/model", "gpt2"):
        check_source("trunk", value)


def test_a_dataset_of_something_else_is_told(tmp_path):
    # It failed for a key, at its first row.
    rows = Dataset.from_list([{"prompt": "a", "text": "b"}])
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"dataset_path=.* lacks the columns \['document_id', 'domain', 'items', "):
        load_features(DataArguments(dataset_path=str(tmp_path)), None, 0)
