"""What a training is refused for before its first step."""

import pytest

from tests.tiny_training import BUS_STAGE, make_features, make_trainer


def without_repeats(features):
    """Features of documents in which no section repeats a sibling's fact."""
    rows = [dict(row) for row in features]
    for row in rows:
        row["clean"] = {**row["clean"], "source_token": [[] for _ in row["clean"]["source_token"]]}
    return rows


def test_repeated_facts_alone_need_documents_that_repeat_some(tmp_path):
    features = list(make_features(4))
    silent = without_repeats(features)
    make_trainer(tmp_path / "a", [BUS_STAGE], train_dataset=[*silent, *features], other_weight=0.0)
    make_trainer(tmp_path / "b", [BUS_STAGE], train_dataset=silent, other_weight=1.0)
    message = (
        r"other_weight=0\.0, allowed where none of the first 4 documents repeats a sibling's fact: a number above 0"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "c", [BUS_STAGE], train_dataset=silent, other_weight=0.0)
