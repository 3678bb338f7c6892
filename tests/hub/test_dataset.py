"""A built dataset goes to the Hub and comes back typed and equal, with a card that the Hub has checked."""

import json

import pytest
from huggingface_hub import DatasetCard

from tests.hub.conftest import OWNER_TOKEN
from tests.tiny_training import make_features
from trainer_pdt.data.publish import DOCUMENT_FEATURES, load_published

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pushed(visit, hub, tmp_path_factory):
    """The folder of a build, what pushing printed, and what the server was asked."""
    folder = tmp_path_factory.mktemp("build")
    start = len(hub.requests)
    _, printed = visit("build_dataset", str(folder), "owner/worlds", package=True, token=OWNER_TOKEN)
    return folder / "dataset", printed, [path for _, path, _ in hub.requests[start:]]


def test_load_dataset_gives_the_same_types_and_rows(visit, pushed):
    folder, _, _ = pushed
    splits, _ = visit("read_dataset", "owner/worlds", token=OWNER_TOKEN)
    built = load_published(str(folder))
    assert splits.keys() == built.keys() == {"train", "validation", "test"}
    for name, split in splits.items():
        assert split["types"] == str(DOCUMENT_FEATURES), name
        assert split["rows"] == json.loads(json.dumps(list(built[name]))), name
    assert sum(len(split["rows"]) for split in splits.values()) == 21


def test_every_file_and_a_checked_card_are_there(hub, pushed):
    folder, printed, asked = pushed
    files = hub.files("owner/worlds", kind="dataset")
    built = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == built
    assert asked.index("/api/validate-yaml") < asked.index("/api/repos/create")
    card = DatasetCard(files["README.md"].decode())
    assert [entry["split"] for entry in card.data.configs[0]["data_files"]] == ["train", "validation", "test"]
    assert 'load_dataset("owner/worlds")' in card.text
    assert OWNER_TOKEN not in printed and not [
        name for name, content in built.items() if OWNER_TOKEN.encode() in content
    ]


def test_a_new_dataset_is_its_owners_alone(hub, pushed):
    assert hub.repositories["dataset", "owner/worlds"].private


def test_training_takes_the_repository(visit, pushed):
    # Documents themselves come with procedural worlds alone.
    value, _ = visit("features_of_dataset", "owner/worlds", package=True, token=OWNER_TOKEN)
    assert value == {"train": 5, "validation": 2, "columns": sorted(make_features(1)[0].keys() - {"document"})}


def test_a_later_build_replaces_the_rows(visit, hub, pushed, tmp_path):
    before = hub.files("owner/worlds", kind="dataset")
    options = {"sources": [{"kind": "worlds", "count": 12}], "shard_size": 4}
    visit("build_dataset", str(tmp_path), "owner/worlds", package=True, token=OWNER_TOKEN, **options)
    after = hub.files("owner/worlds", kind="dataset")
    names = {name for name in after if name.startswith("data/")}
    assert names == {f"data/{path.name}" for path in (tmp_path / "dataset" / "data").iterdir()}
    assert all(after[name] != before.get(name) for name in names)
    splits, _ = visit("read_dataset", "owner/worlds", token=OWNER_TOKEN)
    assert sum(len(split["rows"]) for split in splits.values()) == 12
