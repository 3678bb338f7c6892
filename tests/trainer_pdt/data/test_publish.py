"""Published documents come back equal, from memory and from disk."""

import pytest
from datasets import Dataset, load_from_disk

from trainer_pdt.data.publish import DOCUMENT_FEATURES, document_from_row, documents_to_dataset, load_published
from trainer_pdt.data.worlds import generate_documents


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"num_streams": 6}])
def test_round_trip(options, tmp_path):
    documents = list(generate_documents("train", 0, 15, **options))
    dataset = documents_to_dataset(documents)
    assert dataset.features == DOCUMENT_FEATURES
    assert [document_from_row(row) for row in dataset] == documents
    dataset.save_to_disk(str(tmp_path / "data"))
    assert [document_from_row(row) for row in load_from_disk(str(tmp_path / "data"))] == documents


def test_folders_of_one_name_keep_their_own_rows(tmp_path):
    for number in range(2):
        folder = tmp_path / str(number) / "dataset" / "data"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            rows = documents_to_dataset(generate_documents("train", number, 2))
            rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    for number in range(2):
        splits = load_published(str(tmp_path / str(number) / "dataset"), str(tmp_path / "cache"))
        expected = list(generate_documents("train", number, 2))
        assert set(splits) == {"train", "validation"}
        assert [document_from_row(row) for row in splits["train"]] == expected


def test_wrong_type_is_refused():
    row = next(generate_documents("train", 0, 1)).to_dict()
    row["streams"][0]["stream_id"] = "first"
    with pytest.raises((ValueError, TypeError)):
        Dataset.from_list([row], features=DOCUMENT_FEATURES)
