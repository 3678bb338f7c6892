"""A release reaches the Hub whole, and a stranger can check and use it."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, SpaceCard
from transformers import AutoTokenizer

from modeling_pdt import PDTForParallelDecoding
from tests.hub.conftest import OWNER_TOKEN
from tests.measured import DEMO, write_evaluation
from trainer_pdt import publishing

pytestmark = pytest.mark.slow
TRUNK = Path(__file__).resolve().parents[2] / "recipes/tiny/trunk"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's folder as the trainer leaves it."""
    folder = tmp_path_factory.mktemp("run")
    # The trunk that knows the outlines which the card's code asks for.
    model = PDTForParallelDecoding.from_trunk(str(TRUNK), num_streams=3, block_size=8)
    model.generation_config.agreement_threshold = 0.25
    model.save_pretrained(folder, include_trunk=True)
    AutoTokenizer.from_pretrained(TRUNK).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def evaluation(folder, tmp_path_factory):
    """Of that model."""
    return write_evaluation(tmp_path_factory.mktemp("evaluation") / "evaluation.json", folder)


def test_publish_and_use(visit, hub, folder, evaluation, tmp_path):
    words = ("--include_trunk", "--evaluation", evaluation, "--staging_folder", str(tmp_path), "--private")
    visit("release", folder, "owner/dry", *words, "--dry-run", package=True, token=OWNER_TOKEN)
    assert ("model", "owner/dry") not in hub.repositories
    start = len(hub.requests)
    url, printed = visit("release", folder, "owner/release", *words, package=True, token=OWNER_TOKEN)
    asked = [path for _, path, _ in hub.requests[start:]]
    assert asked.index("/api/validate-yaml") < asked.index("/api/repos/create")
    assert url in printed and OWNER_TOKEN not in printed and hub.repositories["model", "owner/release"].private
    files = hub.files("owner/release")
    staged = tmp_path / "owner--release"
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == {
        path.relative_to(staged).as_posix(): path.read_bytes() for path in staged.rglob("*") if path.is_file()
    }
    for line in files["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest
    card = ModelCard(files["README.md"].decode())
    expected = publishing.measured(json.loads(DEMO.read_text()))
    assert publishing.measured(json.loads(files["evaluation.json"])) == expected
    figures = {kind: numbers["value"] for kind, _, numbers in expected}
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == figures
    assert len(figures) == 10 and json.loads(files["provenance.json"])["metrics"].keys() == figures.keys()
    value, printed = visit("decode_release", "owner/release", token=OWNER_TOKEN)
    assert "Do you wish to run" not in printed
    assert value == {"streams": 3, "threshold": 0.25, "same": True}


def test_a_branch(visit, hub, folder, tmp_path):
    words = ("--include_trunk", "--staging_folder", str(tmp_path), "--revision", "candidate")
    visit("release", folder, "owner/branched", *words, package=True, token=OWNER_TOKEN)
    assert "config.json" in hub.files("owner/branched", "candidate")
    assert hub.files("owner/branched") == {}


def test_nothing_is_uploaded_without_the_owner(visit, hub, folder, tmp_path):
    value, _ = visit(
        "error_of",
        "release",
        folder,
        "owner/stolen",
        "--include_trunk",
        "--staging_folder",
        str(tmp_path),
        package=True,
    )
    assert "401" in value["text"] and ("model", "owner/stolen") not in hub.repositories


def test_a_space_reaches_the_hub(visit, hub, tmp_path):
    words = ("--model", "owner/release", "--repo_id", "owner/demo", "--evaluation", str(DEMO))
    words += ("--staging_folder", str(tmp_path))
    visit("space", *words, "--dry-run", package=True, token=OWNER_TOKEN)
    assert ("space", "owner/demo") not in hub.repositories
    start = len(hub.requests)
    url, printed = visit("space", *words, package=True, token=OWNER_TOKEN)
    asked = [path for _, path, _ in hub.requests[start:]]
    assert asked.index("/api/validate-yaml") < asked.index("/api/repos/create")
    assert url in printed and OWNER_TOKEN not in printed
    files = hub.files("owner/demo", kind="space")
    assert {"app.py", "README.md", "requirements.txt", "pdt_space/style.css", "modeling_pdt/snc.py"} <= set(files)
    assert SpaceCard(files["README.md"].decode()).data.models == ["owner/release"]
