"""Recipes that build datasets: every one names fields that exist, and the teachers run through all stages."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.chat_server import KINDS, chat_server, toy_document
from tests.data_builds import OPTIONS, make_builder
from trainer_pdt.arguments import DataArguments
from trainer_pdt.collator import PDTDataCollator
from trainer_pdt.data.pipeline import make_teacher
from trainer_pdt.data.sources import make_source
from trainer_pdt.data.storage import read_json
from trainer_pdt.features import FeatureMaker, load_features
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[2]
# Toy documents are near duplicates of each other.
UNLIKE = {"near_duplicates": "keep", "near_duplicate_similarity": 1.0}
QUICK = tuple(kind for kind in KINDS if kind != "timeout")
RECIPES = sorted([*(ROOT / "recipes").rglob("data.yaml"), *(ROOT / "recipes/data").glob("*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_name_fields_sources_and_teachers_that_exist(path):
    build, *_ = RecipeParser(*OPTIONS).parse(["--config", str(path)])
    assert make_teacher(build.teacher, build.teacher_options).fingerprint("plans")
    assert [make_source(options) for options in build.sources]


def test_there_is_a_recipe_per_teacher():
    teachers = {RecipeParser(*OPTIONS).parse(["--config", str(path)])[0].teacher for path in RECIPES}
    assert teachers == {"procedural", "extractive", "chat"}


def check_training_input(folder):
    """The exported dataset becomes a batch with repeated facts and coverage."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/trunk")
    maker = FeatureMaker(tokenizer, 8, 512, "parallel-decoder-v1")
    data = DataArguments(str(folder / "dataset"), 100, 100, max_row_tokens=4096)
    train, _ = load_features(data, maker, seed=0)
    repeated = [row for row in train if any(t >= 0 for tokens in row["clean"]["source_token"] for t in tokens)]
    collator = PDTDataCollator(0, 12, 16, 3, max_row_tokens=data.max_row_tokens)
    batch = collator(repeated[:2])
    assert batch["input_ids"].shape[0] == sum(len(row["header_ids"]) for row in repeated[:2])
    assert (batch["labels"] != -100).any()


def sentences(number, place):
    """A section about a river with a fact that the first section owns."""
    heads = (f"The river reaches a depth of {10 + number} m near the old mill.", f"The path has {20 + number} steps.")
    tail = f"It was measured in {1800 + number} by Anna Mill{'abcdefghij'[number % 10]}er of this valley."
    rest = "Walkers follow the water for hours and rest under the trees that have always stood here, as they say."
    repeat = f"The depth is {10 + number} m where the path ends." if place else tail
    return f"{heads[place]} {rest} {repeat}"


def test_the_extractive_teacher_builds_a_dataset_to_train_on(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    for number in range(24):
        sections = "\n\n".join(f"## Part {place}\n\n{sentences(number, place)}" for place in range(2))
        (source / f"river{number}.md").write_text(f"# River {number}\n\n{sections}\n", encoding="utf-8")
    sources = [{"kind": "text", "files": [str(source / "*.md")], "name": "rivers"}]
    options = {"teacher": "extractive", "teacher_options": {"min_repeats": 1}, **UNLIKE}
    make_builder(tmp_path / "build", sources=sources, **options).run()
    manifest = read_json(tmp_path / "build" / "dataset" / "manifest.json")
    assert sum(manifest["rows"].values()) == 24
    check_training_input(tmp_path / "build")


def build_with_chat(folder, documents):
    """A build from toy documents against a failing server; (manifests by stage, server)."""
    folder.mkdir(parents=True)
    rows = [
        {"id": d.document_id, "title": d.title, "sections": [{"header": h, "text": t} for h, t in d.sections]}
        for d in documents
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"id": "id", "title": "title", "sections": "sections"}
    sources = [{"kind": "jsonl", "files": [str(folder / "docs.jsonl")], "name": "toys", "columns": columns}]
    with chat_server(failures=0.3, kinds=QUICK) as server:
        teacher_options = {
            **{"base_url": server.url, "store": str(folder / "answers.sqlite"), "attempts": 3, "backoff_s": 0.001},
            **{"plan_model": "a", "notes_model": "b", "max_concurrency": 4},
        }
        options = {"teacher": "chat", "teacher_options": teacher_options, **UNLIKE}
        builder = make_builder(folder / "build", sources=sources, shard_size=20, **options)
        estimate = builder.estimate()
        assert (estimate["documents"], estimate["requests"]) == (len(documents), 2 * len(documents))
        assert not server.calls
        builder.run()
    stages = ("preflight", "plans", "notes", "splits")
    return {stage: read_json(folder / "build" / stage / "manifest.json") for stage in stages}, server


def check_chat_build(folder, count):
    manifests, server = build_with_chat(folder, [toy_document(number) for number in range(count)])
    kept = count
    reasons = Counter()
    for manifest in manifests.values():
        assert manifest["rows"] + sum(manifest["rejects"].values()) == kept
        kept = manifest["rows"]
        reasons.update(manifest["rejects"])
    exported = read_json(folder / "build" / "dataset" / "manifest.json")["rows"]
    assert sum(exported.values()) == kept
    assert kept + sum(reasons.values()) == count
    assert server.most_active <= 4
    assert set(server.good.values()) == {1}
    return kept, reasons


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_the_chat_teacher_builds_a_dataset_to_train_on(tmp_path):
    kept, reasons = check_chat_build(tmp_path / "chat", 24)
    assert kept >= 16
    assert not reasons.keys() & {"unfounded_notes", "bad_span", "plan_holds_value"}
    check_training_input(tmp_path / "chat" / "build")


@pytest.mark.soak
@pytest.mark.usefixtures("online")
def test_two_thousand_documents_with_a_failing_server(tmp_path):
    kept, _ = check_chat_build(tmp_path / "chat", 2000)
    assert kept > 1700
