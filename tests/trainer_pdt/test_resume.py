"""A run in a folder that holds one: continued exactly, refused with names, or started anew on request."""

import pytest

from tests.tiny_training import make_arguments
from trainer_pdt.checkpoints import COMPLETE_FILE, find_checkpoints
from trainer_pdt.resume import differences, find_checkpoint, is_finished, record_run
from trainer_pdt.telemetry import read_json, to_jsonable, write_json


def settings_of(args, **changes):
    return to_jsonable({"training": args.to_dict(), "stages": [{"name": "bus", "until": 2}], **changes})


@pytest.fixture
def run(tmp_path):
    """A folder with two checkpoints and the manifest of the run that wrote them."""
    args = make_arguments(tmp_path)
    record_run(args, settings_of(args), None)
    for step in (1, 2):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    return tmp_path


def write_checkpoint(folder, step):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).touch()
    write_json(folder / COMPLETE_FILE, {"step": step, "files": {}})


def test_an_empty_folder_starts_a_run(tmp_path):
    args = make_arguments(tmp_path / "new")
    assert find_checkpoint(args, settings_of(args)) is None
    args = make_arguments(tmp_path)
    record_run(args, settings_of(args), None)
    changed = make_arguments(tmp_path, learning_rate=1.0)
    assert find_checkpoint(changed, settings_of(changed)) is None


def test_equal_settings_continue_and_the_manifest_stays(run):
    args = make_arguments(run, logging_steps=7, save_steps=3, disable_tqdm=False, run_name="again")
    checkpoint = find_checkpoint(args, settings_of(args))
    assert checkpoint == str(run / "checkpoint-2")
    before = read_json(run / "manifest.json")
    for count in (1, 2):
        record_run(args, settings_of(args), checkpoint)
        manifest = read_json(run / "manifest.json")
        continued = manifest.pop("continued")
        assert [entry["checkpoint"] for entry in continued] == ["checkpoint-2"] * count
        assert manifest == before


@pytest.mark.parametrize(
    ("changes", "parts", "named"),
    [
        ({"learning_rate": 0.5}, {}, "training.learning_rate: 0.01 -> 0.5"),
        (
            {"seed": 3, "per_device_train_batch_size": 4},
            {},
            "per_device_train_batch_size: 2 -> 4; training.seed: 42 -> 3",
        ),
        ({}, {"stages": [{"name": "bus", "until": 1}]}, r"stages\[0\].until: 2 -> 1"),
        ({}, {"stages": []}, r"stages: \[\{'name': 'bus', 'until': 2\}\] -> \[\]"),
        ({}, {"data": {"train_documents": 3}}, "data: None -> {'train_documents': 3}"),
    ],
)
def test_other_settings_are_refused_by_name(run, changes, parts, named):
    args = make_arguments(run, **changes)
    with pytest.raises(ValueError, match=named) as error:
        find_checkpoint(args, settings_of(args, **parts))
    for way in ("another output_dir", "overwrite_output_dir=True", "resume_from_checkpoint"):
        assert way in str(error.value)
    assert (run / "checkpoint-2").is_dir()


def test_a_finished_model_without_checkpoints_is_not_overwritten(tmp_path):
    args = make_arguments(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="training: None -> "):
        find_checkpoint(args, settings_of(args))
    record_run(args, settings_of(args), None)
    assert find_checkpoint(args, settings_of(args)) is None


@pytest.mark.parametrize(("step", "folder"), [(1, "elsewhere"), (2, ".")])
def test_a_named_checkpoint_goes_on_with_other_settings(run, step, folder):
    checkpoint = str(run / f"checkpoint-{step}")
    args = make_arguments(run / folder, max_steps=3, learning_rate=0.5, resume_from_checkpoint=checkpoint)
    assert find_checkpoint(args, settings_of(args)) == checkpoint
    record_run(args, settings_of(args), checkpoint)
    assert read_json(run / folder / "manifest.json")["config"]["training"]["learning_rate"] == 0.5


# Checkpoints are kept by their steps. Where later ones of another course stood, each new one was deleted as soon as it
# was written, and after a kill the run went on from the newest of the other course: the manifest had been rewritten.
@pytest.mark.parametrize(
    ("place", "step", "named"),
    [
        (".", 1, "'checkpoint-2'"),
        ("elsewhere", 1, "'checkpoint-1', 'checkpoint-2'"),
        ("elsewhere", 2, "'checkpoint-1', 'checkpoint-2'"),
        ("kept", 1, "'checkpoint-1', 'checkpoint-2'"),
    ],
)
def test_a_named_checkpoint_is_refused_beside_those_of_another_course(run, place, step, named):
    checkpoint = run / place / f"checkpoint-{step}"
    write_checkpoint(checkpoint, step)
    args = make_arguments(run, max_steps=3, learning_rate=0.5, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='.*' is at step {step}, and .* holds") as error:
        find_checkpoint(args, settings_of(args))
    assert f"[{named}]" in str(error.value)
    for way in ("another output_dir", "deleted", "without resume_from_checkpoint"):
        assert way in str(error.value)
    assert list(find_checkpoints(run)) == [1, 2]


# What a finished run had left stood for what the next run in its folder had not written yet: killed between its state
# and its model, that one counted as finished, with the model of before.
@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (2, {"overwrite_output_dir": True, "learning_rate": 0.5}),
        (3, {"max_steps": 3, "resume_from_checkpoint": "checkpoint-2"}),
    ],
)
def test_a_run_in_the_folder_of_a_finished_one_is_not_finished_before_its_model_is_written(run, step, changes):
    write_json(run / "trainer_state.json", {"global_step": 2})
    (run / "training_args.bin").touch()
    assert is_finished(run, 2)
    if "resume_from_checkpoint" in changes:
        changes = {**changes, "resume_from_checkpoint": str(run / changes["resume_from_checkpoint"])}
    args = make_arguments(run, **changes)
    record_run(args, settings_of(args), find_checkpoint(args, settings_of(args)))
    write_json(run / "trainer_state.json", {"global_step": step})
    assert not is_finished(run, step)
    (run / "training_args.bin").touch()
    assert is_finished(run, step)


def test_a_named_checkpoint_has_to_be_there_before_anything_is_recorded(run):
    args = make_arguments(run, resume_from_checkpoint=str(run / "checkpoint-7"))
    with pytest.raises(ValueError, match=r"checkpoint-7.* is not a complete checkpoint: there is no such folder"):
        find_checkpoint(args, settings_of(args))


def test_overwriting_deletes_the_checkpoints_when_the_run_begins(run):
    (run / "_saving-checkpoint-3").mkdir()
    args = make_arguments(run, learning_rate=0.5, overwrite_output_dir=True)
    before = sorted(run.rglob("*"))
    assert find_checkpoint(args, settings_of(args)) is None
    # They were gone before model, data and trainer were built: a mistyped path cost the run of before.
    assert sorted(run.rglob("*")) == before
    record_run(args, settings_of(args), None)
    assert sorted(path.name for path in run.iterdir()) == ["manifest.json"]


def test_overwriting_deletes_the_gradient_norms(run):
    # The report of the new run showed those of the run before.
    for step in (0, 20):
        (run / f"gradient_norms_from_{step}.jsonl").touch()
    args = make_arguments(run, overwrite_output_dir=True)
    record_run(args, settings_of(args), find_checkpoint(args, settings_of(args)))
    assert sorted(path.name for path in run.iterdir()) == ["manifest.json"]


def test_differences_are_nested_and_ignore_what_has_no_effect():
    earlier = {"a": {"b": [1, {"c": 2}]}, "output_dir": "x", "hub_token": None, "threads": 1}
    now = {"a": {"b": [1, {"c": 3}]}, "output_dir": "y", "hub_token": "t", "threads": 1, "eval_steps": 2}
    assert list(differences(earlier, now)) == ["a.b[1].c: 2 -> 3"]


def test_a_longer_row_may_be_allowed_in_the_same_folder():
    # A larger `max_row_tokens`, the way out that the error names, was refused as another setting.
    earlier = {"data": {"max_row_tokens": 129, "feature_workers": 1, "train_documents": 8}}
    assert not list(
        differences(earlier, {"data": {"max_row_tokens": 200, "feature_workers": 4, "train_documents": 8}})
    )
