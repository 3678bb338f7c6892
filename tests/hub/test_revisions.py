"""A trunk of the Hub, pinned by commit: loaded as it was then, and named in everything that is saved."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.hub.conftest import OWNER_TOKEN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commits(visit, published, hub):
    """A repository of a trunk whose main branch has moved on: the first commit and the second one."""
    hub.fork("owner/trunk", "owner/moving")
    repository = hub.repositories["model", "owner/moving"]
    first = repository.resolve("main")
    visit("change_trunk", "owner/moving", package=True, token=OWNER_TOKEN)
    assert repository.resolve("main") != first
    return first, repository.resolve("main")


@pytest.mark.parametrize("pinned", [True, False])
def test_training_remembers_the_commit_of_its_trunk(visit, hub, commits, pinned, tmp_path):
    commit = commits[0] if pinned else commits[1]
    words = {"trunk_revision": commits[0]} if pinned else {}
    value, _ = visit("start_training", "owner/moving", str(tmp_path / "run"), package=True, **words)
    assert value == {"first": pinned, "trunk_revision": commit}
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/moving", commit)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trunk_revision"] == commit
    repo = f"owner/trained-{pinned}".lower()
    visit("release", str(tmp_path / "run"), repo, "--staging_folder", str(tmp_path), package=True, token=OWNER_TOKEN)
    files = hub.files(repo)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/moving" and commit in card.text
    assert json.loads(files["adapter/adapter_config.json"])["revision"] == commit


def test_decoding_takes_the_revisions_that_are_asked_for(visit, commits, tmp_path):
    visit("start_training", "owner/moving", str(tmp_path / "run"), package=True, trunk_revision=commits[0])
    words = ("--staging_folder", str(tmp_path), "--revision", "candidate")
    visit("release", str(tmp_path / "run"), "owner/two", *words, package=True, token=OWNER_TOKEN)

    def decoded(*words):
        return visit("decode", "owner/two", str(tmp_path), "--revision", "candidate", *words, package=True)[0]

    named, first, second = decoded(), *(decoded("--trunk_revision", commit) for commit in commits)
    assert named == first != second
    value, _ = visit("error_of", "decode", "owner/two", str(tmp_path), package=True)
    assert "config.json" in value["text"], "the main branch is empty"


def test_a_folder_has_no_revisions(visit, tmp_path):
    visit("start_training", "owner/trunk", str(tmp_path / "run"), package=True, include_trunk=True)
    value, _ = visit(
        "error_of", "decode", str(tmp_path / "run"), str(tmp_path), "--trunk_revision", "main", package=True
    )
    assert value["type"] == "ValueError" and "trunk_revision='main', allowed: None, the trunk" in value["text"]
    trunk = str(tmp_path / "run" / "trunk")
    value, _ = visit("error_of", "start_training", trunk, str(tmp_path / "new"), package=True, trunk_revision="main")
    assert value["type"] == "ValueError" and "trunk_revision='main', allowed: none, the trunk" in value["text"]
