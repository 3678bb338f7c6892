"""A release is staged, shown, checked and only then uploaded; every number is from a telemetry file."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from modeling_pdt import PDTForParallelDecoding
from recipes import push_to_hub
from tests.measured import DEMO, write_evaluation
from tests.tiny_training import make_model, tokenizer
from trainer_pdt.evaluation.sections import adapters_mark
from trainer_pdt.publishing import describe_run, measured, without_paths


@pytest.fixture
def run(tmp_path):
    """A run's folder: model with a trunk of this machine, tokenizer, telemetry, and what must not get out."""
    folder = tmp_path / "run"
    model = make_model()
    model.generation_config.agreement_threshold = 0.25
    model.save_pretrained(folder, include_trunk=True)
    tokenizer().save_pretrained(folder)
    data = {"train_documents": 10, "dataset_path": str(tmp_path / "worlds")}
    manifest = {
        "command": f"recipes/train.py --output_dir {folder}",
        "seed": 3,
        "git": {"sha": "0123abcd", "dirty": False},
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "config": {"data": data},
        "config_fingerprint": "feedbeef",
        "notes_schema_version": "2.0",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "stage_history.json").write_text(json.dumps({"stages": [{"name": "bus", "first_step": 0}]}))
    (folder / "training_report.json").write_text(json.dumps({"step": 900, "seconds": 455.1}))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    return folder


def publish(run, tmp_path, *words):
    staging = tmp_path / "staging"
    push_to_hub.main(
        [*("--model", str(run), "--repo_id", "me/pdt", "--staging_folder", str(staging), "--dry-run"), *words]
    )
    return staging / "me--pdt"


def test_a_dry_run_shows_every_file_and_the_card(run, tmp_path, capsys):
    evaluation = write_evaluation(tmp_path / "evaluation.json", run)
    folder = publish(run, tmp_path, "--include_trunk", "--evaluation", evaluation)
    shown = capsys.readouterr().out
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert all(f"  {name}\n" in shown for name in names)
    assert (folder / "README.md").read_text() in shown and "nothing was uploaded" in shown
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "README.md", "LICENSE", "SHA256SUMS"}
    wanted |= {"provenance.json", "evaluation.json", "adapter/adapter_model.safetensors", "trunk/model.safetensors"}
    assert wanted | {"custom_generate/generate.py", "modeling_pdt.py"} <= set(names)
    assert not {"is_local", "local_files_only"} & json.loads((folder / "tokenizer_config.json").read_text()).keys()
    assert not {"training_args.bin", ".env", "manifest.json"} & set(names)


@pytest.mark.parametrize("named", ["model", "evaluation"])
def test_what_is_published_is_not_deleted_first(run, tmp_path, named):
    # A model in the staging folder lost its evaluation, manifest and thresholds, and then could not be staged.
    place = tmp_path / "staging" / "me--pdt"
    shutil.copytree(run, place)
    shutil.copyfile(DEMO, place / "evaluation.json")
    before = sorted(path.name for path in place.iterdir())
    model = place if named == "model" else run
    with pytest.raises(ValueError, match=rf"staging_folder=.*, allowed with {named}=.*me--pdt, which is emptied"):
        publish(model, tmp_path, "--include_trunk", "--evaluation", str(place / "evaluation.json"))
    assert sorted(path.name for path in place.iterdir()) == before


def test_check_sums_cover_every_file(run, tmp_path):
    folder = publish(run, tmp_path, "--include_trunk")
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    assert set(sums) == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_card_s_numbers_are_the_evaluation_s(run, tmp_path):
    path = write_evaluation(tmp_path / "evaluation.json", run)
    folder = publish(run, tmp_path, "--include_trunk", "--evaluation", path, "--tags", "tiny")
    evaluation = json.loads(DEMO.read_text())
    card = ModelCard.load(folder / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["sibling_fact_recall"] == round(evaluation["sibling_fact_recall"]["pdt"]["mean"], 4)
    assert results["agreement_auroc"] == round(evaluation["agreement"]["auroc"]["mean"], 4)
    assert results["parallel_speedup"] == round(evaluation["speed"]["parallel_vs_single"]["mean"], 4)
    assert len(results) == 10 and card.data.model_name == "pdt" and "tiny" in card.data.tags
    for line in (
        "| steps | `900` |",
        "| seed | `3` |",
        "| git revision | `0123abcd` |",
        "| agreement threshold | 0.25 |",
    ):
        assert line in card.content
    assert "None" not in card.content and str(tmp_path) not in card.content


def test_missing_numbers_leave_their_lines_out(run, tmp_path):
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps({"coverage": {"precision": {"mean": 0.5}, "recall": {"mean": None}}}))
    for name in ("manifest.json", "stage_history.json", "training_report.json"):
        (run / name).unlink()
    folder = publish(run, tmp_path, "--include_trunk", "--evaluation", str(partial))
    card = ModelCard.load(folder / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["coverage_precision"]
    assert "coverage recall" not in card.content and "## Training" not in card.content
    provenance = json.loads((folder / "provenance.json").read_text())
    assert set(provenance) == {"metrics", "published_from", "plan_hash"}
    assert provenance["plan_hash"] == {"salt": "parallel-decoder-v1", "buckets": 32}
    bare = publish(run, tmp_path, "--include_trunk")
    assert ModelCard.load(bare / "README.md").data.eval_results is None
    assert "## Measured" not in (bare / "README.md").read_text() and not (bare / "evaluation.json").exists()
    # Any JSON passed for an evaluation, and gave a card without figures.
    with pytest.raises(ValueError, match=r"evaluation=.*config.json', allowed: what recipes/evaluate.py wrote"):
        publish(run, tmp_path, "--include_trunk", "--evaluation", str(run / "config.json"))


def test_an_evaluation_of_other_adapters_is_refused(run, tmp_path, caplog):
    # The card of any model took over the figures of any evaluation, and nothing told whose they were.
    model = PDTForParallelDecoding.from_pretrained(run)
    mark, path = adapters_mark(model), tmp_path / "measured.json"
    measures = {"coverage": {"precision": {"mean": 0.5}}}
    path.write_text(json.dumps({**measures, "settings": {"adapters": "0123abcd"}}))
    with pytest.raises(ValueError, match=rf"measured.json' measured the adapters 0123abcd, allowed: .*{mark}"):
        publish(run, tmp_path, "--include_trunk", "--evaluation", str(path))
    path.write_text(json.dumps({**measures, "settings": {"adapters": mark}}))
    publish(run, tmp_path, "--include_trunk", "--evaluation", str(path))
    untold = "does not say which adapters it measured"
    assert untold not in caplog.text
    path.write_text(json.dumps({**measures, "settings": {}}))
    publish(run, tmp_path, "--include_trunk", "--evaluation", str(path))
    assert caplog.text.count(untold) == 1


def test_provenance_without_paths_of_the_machine(run, tmp_path):
    evaluation = json.loads(DEMO.read_text())
    provenance = describe_run(run, evaluation)
    assert provenance["training"]["command"] == "recipes/train.py --output_dir run"
    assert provenance["training"]["git"]["sha"] == "0123abcd" and provenance["step"] == 900
    assert provenance["training"]["notes_schema_version"] == "2.0"
    assert provenance["stages"] == [{"name": "bus", "first_step": 0}] and len(provenance["data_fingerprint"]) == 64
    assert provenance["metrics"]["coverage_precision"]["n"] == evaluation["coverage"]["precision"]["n"]
    folder = publish(run, tmp_path, "--include_trunk")
    for path in folder.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/tmp/a/b", "b"),
        ("x.py --out /home/me/run --n 3", "x.py --out run --n 3"),
        ("--out=/home/me/run", "--out=run"),
        ("~/models/one", "one"),
        ("C:\\Users\\me\\run", "run"),
        ("precision / recall and </s> or /no", "precision / recall and </s> or /no"),
        ("recipes/train.py owner/name 1/2 https://a.b/c", "recipes/train.py owner/name 1/2 https://a.b/c"),
    ],
)
def test_paths_are_cut(text, clean):
    assert without_paths({"a": [text]}) == {"a": [clean]}


def test_metrics_without_numbers_are_left_out():
    assert measured({}) == [] and measured({"agreement": {"auroc": float("nan")}}) == []


def test_what_cannot_be_published_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"repo_id='pdt', allowed: owner/name"):
        push_to_hub.main(["--model", str(run), "--repo_id", "pdt"])
    with pytest.raises(ValueError, match=r"model='nowhere'"):
        push_to_hub.main(["--model", "nowhere", "--repo_id", "me/pdt"])
    with pytest.raises(ValueError, match="unknown field `token`"):
        push_to_hub.main(["--model", str(run), "--repo_id", "me/pdt", "--token", "hf_x"])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "trunk_name_or_path": str(run / "trunk")}))
    with pytest.raises(ValueError, match="is a local folder"):
        publish(run, tmp_path)
