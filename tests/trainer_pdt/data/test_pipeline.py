"""A build from procedural worlds: exact, whole or not at all, the same bytes however often it is interrupted."""

import gc
import json
import math
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk
from huggingface_hub import DatasetCard

from tests.child_process import exit_code, start_child, wait_until
from tests.data_builds import STAGES, all_bytes, build, build_and_die, file_numbers, make_builder
from tests.test_recipes import run_training
from tests.tiny_training import tokenizer
from trainer_pdt import FeatureMaker
from trainer_pdt.arguments import DataArguments
from trainer_pdt.data import export, storage
from trainer_pdt.data.augmentation import other_orders
from trainer_pdt.data.notes import readiness
from trainer_pdt.data.pipeline import LOCK_FILE
from trainer_pdt.data.publish import DOCUMENT_FEATURES, document_from_row, load_published
from trainer_pdt.data.runner import SWITCH_SECONDS, short_stops
from trainer_pdt.data.sources import SAFE_ID
from trainer_pdt.data.storage import read_json, read_rejects, read_shard
from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.features import load_features


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    make_builder(folder).run()
    return folder


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def published(folder, tmp_path):
    return load_dataset(str(folder / "dataset"), cache_dir=str(tmp_path / "cache"))


def test_published_documents_are_the_worlds_own(built, tmp_path):
    splits = published(built, tmp_path)
    assert set(splits) == {"train", "validation", "test"}
    assert all(split.features == DOCUMENT_FEATURES for split in splits.values())
    rows = [document_from_row(row) for split in splits.values() for row in split]
    expected = {(d := generate_document("train", index, WorldOptions())).document_id: d for index in range(21)}
    assert {row.document_id for row in rows} == set(expected) and len(rows) == len(expected)
    for row in rows:
        twin = expected[row.document_id]
        pairs = zip(row.streams, twin.streams, strict=True)
        streams = tuple(replace(stream, noisy_notes=other.noisy_notes) for stream, other in pairs)
        assert replace(row, streams=streams) == twin


def test_a_build_that_rejects_everything_says_why(tmp_path):
    # It advised more documents, another `split_seed` or another `validation_fraction`, and named no reason.
    message = r"no document reached the dataset: preflight kept 0, rejected 21 \(too_short 21\); plans kept 0"
    with pytest.raises(ValueError, match=message):
        make_builder(tmp_path, min_words=5000).run()


def test_a_split_without_documents_says_what_was_rejected(tmp_path):
    message = r"'validation' has no documents .* By stage: preflight kept 21, rejected 0; plans kept 21"
    with pytest.raises(ValueError, match=message):
        make_builder(tmp_path, validation_fraction=0.0001).run()


def test_counts_add_up(built):
    kept = 21
    for stage in STAGES:
        manifest = read_json(built / stage / "manifest.json")
        assert manifest["rows"] + sum(manifest["rejects"].values()) == kept
        assert manifest["shards"] == 3
        kept = manifest["rows"]
    manifest = read_json(built / "dataset" / "manifest.json")
    assert sum(manifest["rows"].values()) == kept
    assert manifest["files"] == {name: storage.file_digest(built / "dataset" / name) for name in manifest["files"]}
    report = read_json(built / "dataset" / "quality_report.json")
    assert sum(split["counts"]["documents"] for split in report["splits"].values()) == kept
    assert sum(sum(split["domains"].values()) for split in report["splits"].values()) == kept


def test_training_takes_the_dataset(built):
    maker = FeatureMaker(tokenizer(), 8, 32, "parallel-decoder-v1")
    train, validation = load_features(DataArguments(str(built / "dataset"), 5, 2), maker, seed=0)
    assert (len(train), len(validation)) == (5, 2)
    row = next(read_shard(built / "notes", 0))
    direct = maker(document_from_row(row))
    features = {row["document_id"]: row for row in (*train, *validation)}
    assert features.get(row["document_id"], direct)["clean"]["section_ids"] == direct["clean"]["section_ids"]
    assert any(source >= 0 for row in train for sources in row["clean"]["source_token"] for source in sources)


def features_of(built, workers):
    maker = FeatureMaker(tokenizer(), 8, 32, "parallel-decoder-v1")
    return load_features(DataArguments(str(built / "dataset"), 5, 2, feature_workers=workers), maker, seed=0)


def test_features_are_kept_until_something_changes(built):
    first, again = ([part.cache_files for part in features_of(built, 1)] for _ in range(2))
    assert first == again and all(first)


@pytest.mark.slow
def test_two_processes_make_the_same_features(built):
    one, two = ([list(part) for part in features_of(built, workers)] for workers in (1, 2))
    assert one == two


@pytest.mark.slow
def test_the_training_recipe_runs_on_it(built, tmp_path):
    stage = {"name": "bus", "until": 6, "train": ["snc", "writer"], "losses": {"lm_ce": 1.0}}
    worlds = ["--hard_fraction", "null", "--foreign_fraction", "null"]
    options = ["--dataset_path", str(built / "dataset"), *worlds, "--stages", json.dumps([stage])]
    done = run_training(tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_rerun_makes_nothing(copy):
    before, files = file_numbers(copy), all_bytes(copy)
    make_builder(copy).run()
    assert file_numbers(copy) == before
    assert all_bytes(copy) == files


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"noisy_drop": 0.5}, {"notes", "splits", "dataset"}),
        ({"split_seed": 5}, {"splits", "dataset"}),
        ({"dataset_name": "Another"}, {"dataset"}),
        ({"plan_lint": "warn"}, {"plans"}),
        ({"hub_private": False}, set()),
    ],
)
def test_a_changed_option_redoes_what_depends_on_it(copy, change, redone):
    before = file_numbers(copy)
    make_builder(copy, **change).run()
    after = file_numbers(copy)
    assert {name.split("/")[0] for name in after if after[name] != before[name]} == redone
    assert after.keys() == before.keys()


def test_a_damaged_shard_is_made_again(copy, built):
    (copy / "notes" / "shard-00001" / "rows.parquet").write_bytes(b"PAR1")
    shutil.rmtree(copy / "plans" / "shard-00002")
    make_builder(copy).run()
    assert all_bytes(copy) == all_bytes(built)


@pytest.mark.slow
def test_fewer_documents_leave_no_old_shards(copy, tmp_path):
    sources = [{"kind": "worlds", "count": 14}]
    make_builder(copy, sources=sources).run()
    make_builder(tmp_path / "new", sources=sources).run()
    assert all_bytes(copy) == all_bytes(tmp_path / "new")


@pytest.mark.slow
def test_killed_twice_it_gives_the_same_bytes(built, tmp_path):
    folder = tmp_path / "killed"
    for writes in (4, 3):
        assert exit_code(start_child(build_and_die, folder, writes)) == -signal.SIGKILL
    assert len(list(folder.glob("*/shard-*"))) == 7
    make_builder(folder).run()
    assert all_bytes(folder) == all_bytes(built)


@pytest.mark.soak
def test_killed_at_any_time_it_gives_the_same_bytes(built, tmp_path):
    rng, kills = random.Random(0), 0
    while kills < 20:
        folder = tmp_path / f"killed{kills}"
        child = start_child(build, folder)
        wait_until(lambda: (folder / LOCK_FILE).exists() or not child.is_alive())  # noqa: B023
        child.join(rng.uniform(0.0, 4.0))
        child.kill()
        kills += exit_code(child) == -signal.SIGKILL
        make_builder(folder).run()
        assert all_bytes(folder) == all_bytes(built)


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(built, tmp_path):
    make_builder(tmp_path / "two", workers=2).run()
    assert all_bytes(tmp_path / "two") == all_bytes(built)


@pytest.mark.slow
def test_parts_that_are_built_apart_hold_the_documents_of_one_build(built, tmp_path):
    for part, (start, count) in enumerate(((0, 11), (11, 10))):
        make_builder(tmp_path / f"part_{part}", sources=[{"kind": "worlds", "start": start, "count": count}]).run()
    pattern = str(tmp_path / "part_*" / "dataset" / "data")
    files = {split: f"{pattern}/{split}-*.parquet" for split in ("train", "validation", "test")}
    load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "c")).save_to_disk(str(tmp_path / "all"))
    ids = [
        {name: sorted(split["document_id"]) for name, split in load_published(str(folder)).items()}
        for folder in (built / "dataset", tmp_path / "all")
    ]
    assert ids[0] == ids[1]


def test_arrow_and_kd_records_hold_the_same_rows_and_no_paths(copy, built, tmp_path):
    make_builder(copy, save_arrow=True, save_kd_jsonl=True).run()
    rows = published(copy, tmp_path)
    arrow = load_from_disk(str(copy / "dataset_arrow"))
    assert {name: list(split) for name, split in arrow.items()} == {name: list(split) for name, split in rows.items()}
    described = [path.read_text() for path in (copy / "dataset_arrow").rglob("*.json")]
    assert not [text for text in described if str(tmp_path) in text]
    for name, split in rows.items():
        lines = (copy / "dataset_kd" / f"kd_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        wanted = [(row["document_id"], stream["notes"]["text"]) for row in split for stream in row["streams"]]
        assert [(r["sample_id"], r["notes_text"]) for r in map(json.loads, lines)] == wanted


@pytest.mark.parametrize("num_streams", [2, 4])
def test_copies_in_other_orders_say_the_same(num_streams):
    original = generate_document("train", 3, WorldOptions(num_streams))
    copies = list(other_orders(original, 3, seed=0))
    assert len(copies) == min(3, math.factorial(num_streams) - 1)
    assert (
        len({tuple(stream.text for stream in document.streams) for document in (original, *copies)}) == len(copies) + 1
    )
    # A source may hold both `a` and `a-order1`, which was a copy's id too.
    assert not [document for document in copies if SAFE_ID.fullmatch(document.document_id)]
    for document in copies:
        assert sorted(s.text for s in document.streams) == sorted(s.text for s in original.streams)
        owners = {item.item_id: item.stream for item in document.items}
        texts = {(item.text, document.streams[item.stream].header) for item in document.items}
        assert texts == {(item.text, original.streams[item.stream].header) for item in original.items}
        for stream in document.streams:
            assert all(stream.text[s.start : s.end] == s.value for s in stream.spans)
            assert all(owners[s.item_id] == s.owner for s in stream.spans)
            own = [item_id for item_id, owner in owners.items() if owner == stream.stream_id]
            assert [entry.item_id for entry in stream.notes.coverage] == own
            assert stream.ready == readiness(document.streams, stream, round_words=9)


def test_threads_that_waited_go_first_for_as_long_as_a_stage_waits():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), short_stops():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        assert gc.get_freeze_count() > 0
        raise KeyError
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == 0


def test_one_build_at_a_time(copy):
    builder = make_builder(copy)
    with builder._locked(), pytest.raises(RuntimeError, match="another build is running"):
        builder.run()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        make_builder(tmp_path).run()
    assert [path.name for path in tmp_path.rglob("*")] == ["dataset", "mine.txt"]


def test_the_folder_is_uploaded(copy, monkeypatch):
    calls = []

    class Hub:
        """Stands in for `HfApi`."""

        def create_repo(self, name, **options):
            calls.append((name, options["repo_type"], options["private"]))

        def upload_folder(self, **options):
            calls.append((options["repo_id"], options["repo_type"], sorted(all_bytes(Path(options["folder_path"])))))

    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(
        export.DatasetCard, "validate", lambda card, repo_type: calls.append((repo_type, card.content))
    )
    make_builder(copy, push_to_hub=True, hub_dataset_id="someone/worlds").run()
    assert calls == [
        ("dataset", (copy / "dataset" / "README.md").read_text(encoding="utf-8")),
        ("someone/worlds", "dataset", True),
        ("someone/worlds", "dataset", sorted(all_bytes(copy / "dataset"))),
    ]
    assert 'load_dataset("someone/worlds")' in (copy / "dataset" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="without `hub_dataset_id`"):
        make_builder(copy, push_to_hub=True)


def test_a_build_is_not_taken_for_another_of_its_name(built, copy, tmp_path):
    # The cache of `load_dataset` knew folders by name and card, and all builds are called `dataset`: the second one
    # loaded had the rows of the first.
    first = published(built, tmp_path)
    make_builder(copy, split_seed=1).run()
    second = published(copy, tmp_path)
    expected = load_published(str(copy / "dataset"))
    assert {name: list(split) for name, split in second.items()} == {name: list(expected[name]) for name in expected}
    assert list(first["train"]) != list(second["train"])
    info = DatasetCard.load(copy / "dataset" / "README.md").data.dataset_info
    assert info["download_size"] == sum(path.stat().st_size for path in (copy / "dataset" / "data").iterdir())


def test_folders_may_have_any_name(built, tmp_path):
    # `load_dataset` takes paths for patterns: in a folder named `run[1]` it found no file, and the build failed.
    folder = make_builder(tmp_path / "run[1]*").run()
    assert all_bytes(folder / "data") == all_bytes(built / "dataset" / "data")
    assert {name: len(split) for name, split in load_published(str(folder)).items()} == {
        name: len(split) for name, split in load_published(str(built / "dataset")).items()
    }


def test_dry_run_stops_after_the_first_stage(tmp_path):
    assert make_builder(tmp_path).estimate() == {"documents": 21}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"preflight"}


def test_rejects_are_kept_with_their_reason_and_the_card_tells(copy):
    folder = make_builder(copy, max_length_ratio=1.5, dataset_name="Small worlds").run()
    manifest = read_json(copy / "splits" / "manifest.json")
    rejects = [reject for number in range(3) for reject in read_rejects(copy / "splits", number)]
    assert manifest["rejects"] == {"unbalanced": len(rejects)} and 0 < len(rejects) < 21
    assert manifest["rows"] == 21 - len(rejects)
    assert json.loads((copy / "dataset" / "quality_report.json").read_text())["stages"]["splits"]["rejects"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# Small worlds" in card and "license: other" in card
    assert all(f"| {name} | {count} |" in card for name, count in read_json(folder / "manifest.json")["rows"].items())
    assert f"| splits | unbalanced {len(rejects)} |" in card
    assert not [word for word in ("None", "{{", "undefined") if word in card]
