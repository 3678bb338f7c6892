"""Recipes that build datasets: every one names fields that exist, and the teachers run through all stages."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hub_cards import template_path
from tests.chat_server import KINDS, chat_server, toy_document
from tests.data_builds import OPTIONS, STAGES, make_builder
from tests.test_recipes import run_training
from trainer_pdt.arguments import DataArguments
from trainer_pdt.collator import PDTDataCollator
from trainer_pdt.data.chat_client import BudgetExceeded
from trainer_pdt.data.chat_store import AnswerStore
from trainer_pdt.data.pipeline import TEACHERS, DatasetBuilder, make_teacher
from trainer_pdt.data.publish import load_published
from trainer_pdt.data.sources import make_source
from trainer_pdt.data.storage import read_json, read_rejects
from trainer_pdt.features import FeatureMaker, load_features
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[2]
# Toy documents are near duplicates of each other.
UNLIKE = {"near_duplicates": "keep", "near_duplicate_similarity": 1.0}
QUICK = tuple(kind for kind in KINDS if kind != "timeout")
BUILDS = [path for path in (ROOT / "recipes").rglob("data.yaml") if path.parent.name != "benchmarks"]
RECIPES = sorted([*BUILDS, *(ROOT / "recipes/data").glob("*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_name_fields_sources_and_teachers_that_exist(path):
    build, *_ = RecipeParser(*OPTIONS).parse(["--config", str(path)])
    assert make_teacher(build.teacher, build.teacher_options).fingerprint("plans")
    assert [make_source(options) for options in build.sources]


def test_there_is_a_recipe_per_teacher():
    teachers = {RecipeParser(*OPTIONS).parse(["--config", str(path)])[0].teacher for path in RECIPES}
    assert teachers == set(TEACHERS)


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


@pytest.mark.slow
def test_training_starts_on_documents_that_are_installed(tmp_path):
    recipe = ["--config", str(ROOT / "recipes/data/extractive.yaml"), "--output_dir", str(tmp_path / "build")]
    DatasetBuilder(*RecipeParser(*OPTIONS).parse(recipe), card_template=template_path("dataset_card.md")).run()
    manifest = read_json(tmp_path / "build" / "preflight" / "manifest.json")
    assert manifest["rows"] >= 200
    streams = [len(row["streams"]) for row in load_published(str(tmp_path / "build" / "dataset"))["train"]]
    assert len(streams) >= 50 and {2, 3} <= set(streams)
    stage = {"name": "bus", "until": 6, "train": ["snc", "writer"], "losses": {"lm_ce": 1.0}}
    options = ["--dataset_path", str(tmp_path / "build" / "dataset")]
    options += ["--hard_fraction", "null", "--foreign_fraction", "null", "--other_weight", "1"]
    options += ["--max_row_tokens", "4096", "--stages", json.dumps([stage])]
    options += ["--per_device_train_batch_size", "2", "--eval_documents", "4"]
    done = run_training(tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def chat_build(folder, documents, server, **choices):
    """A builder that asks a server about toy documents, and its documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": d.document_id, "title": d.title, "sections": [{"header": h, "text": t} for h, t in d.sections]}
        for d in map(toy_document, range(documents))
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"id": "id", "title": "title", "sections": "sections"}
    sources = [{"kind": "jsonl", "files": [str(folder / "docs.jsonl")], "name": "toys", "columns": columns}]
    teacher_options = {
        **{"base_url": server.url, "store": str(folder / "answers.sqlite"), "attempts": 3, "backoff_s": 0.001},
        **{"plan_model": "a", "notes_model": "b", "max_concurrency": 4, **choices},
    }
    options = {"teacher": "chat", "teacher_options": teacher_options, **UNLIKE}
    return make_builder(folder / "build", sources=sources, shard_size=20, **options)


def check_chat_build(folder, count):
    """Every document is exported once or rejected with its reason; (exported, reasons)."""
    reasons, ids = Counter(), []
    kept = count
    for stage in STAGES:
        manifest = read_json(folder / "build" / stage / "manifest.json")
        assert manifest["rows"] + sum(manifest["rejects"].values()) == kept
        kept = manifest["rows"]
        reasons.update(manifest["rejects"])
        shards = range(manifest["shards"])
        ids += [reject.document_id for n in shards for reject in read_rejects(folder / "build" / stage, n)]
    splits = load_published(str(folder / "build" / "dataset"))
    ids += [name for split in splits.values() for name in split["document_id"]]
    assert sorted(ids) == [toy_document(number).document_id for number in range(count)]
    assert kept + sum(reasons.values()) == count
    return kept, reasons


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_the_chat_teacher_builds_a_dataset_to_train_on(tmp_path):
    with chat_server(failures=0.3, kinds=QUICK) as server:
        builder = chat_build(tmp_path, 24, server)
        estimate = builder.estimate()
        assert (estimate["documents"], estimate["requests"]) == (24, 48)
        assert not server.calls
        builder.run()
    kept, reasons = check_chat_build(tmp_path, 24)
    assert kept >= 16
    assert not reasons.keys() & {"unfounded_notes", "bad_span", "plan_holds_value"}
    assert server.most_active <= 4
    assert set(server.good.values()) == {1}
    check_training_input(tmp_path / "build")


@pytest.mark.soak
@pytest.mark.usefixtures("online")
def test_two_thousand_documents_with_a_failing_server_and_a_budget(tmp_path, record_property):
    limits = {"timeout_s": 2.0, "max_concurrency": 8, "attempts": 4}
    with chat_server(failures=0.3, hang=2.5) as server:
        for budget in (1_000_000, 2_000_000):
            with pytest.raises(BudgetExceeded):
                chat_build(tmp_path, 2000, server, **limits, budget_tokens=budget).run()
            assert 0.9 * budget < AnswerStore(tmp_path / "answers.sqlite").spent()[0] <= budget
        chat_build(tmp_path, 2000, server, **limits).run()
    kept, reasons = check_chat_build(tmp_path, 2000)
    assert 1800 < kept < 2000 and reasons
    assert server.most_active <= 8
    assert set(server.outcomes) == {*KINDS, "good"}
    outcomes = AnswerStore(tmp_path / "answers.sqlite").outcomes()
    # Only an answer that came too late was asked for again.
    late = outcomes["timed_out"] - server.outcomes["timeout"]
    assert 0 <= sum(server.good.values()) - outcomes["finished"] <= late
    assert len(server.good) >= outcomes["finished"]
    for name, value in (("exported", kept), ("rejected", dict(reasons)), ("requests", dict(server.outcomes))):
        record_property(name, value)
