"""Checkpoints: which are kept, what makes one complete, and which are refused."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_arguments, make_features, make_model, make_trainer, weights
from trainer_pdt import checkpoints
from trainer_pdt.checkpoints import (
    COMPLETE_FILE,
    Retention,
    check_complete,
    check_optimizer,
    clear_unfinished,
    completion_record,
    delete_checkpoint,
    find_checkpoints,
    move_into_place,
    smoothed,
)
from trainer_pdt.curriculum import Curriculum
from trainer_pdt.resume import find_checkpoint, record_run
from trainer_pdt.telemetry import read_json, write_json

TWO_STAGES = [{**BUS_STAGE, "until": 0.4}, HEAD_STAGE]
DiskUsage = namedtuple("DiskUsage", "total used free")


def write_checkpoint(run: Path, step: int, size: int = 1000) -> Path:
    """A complete checkpoint of two files."""
    folder = run / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(bytes([step % 256]) * size)
    (folder / "state.json").write_text("{}")
    write_json(folder / COMPLETE_FILE, completion_record(folder, step))
    return folder


def steps_kept(run: Path) -> list[int]:
    return list(find_checkpoints(run))


def retention_of(max_steps: int, last: int | None, until: float = 0.4) -> Retention:
    return Retention.of_run(Curriculum.from_list([{**BUS_STAGE, "until": until}, HEAD_STAGE], max_steps), last)


@pytest.mark.parametrize(
    ("free_checkpoints", "end", "at_80"),
    [
        # 150 steps, saved every 5: the sets that the training documents name.
        (100, [15, 37, 75, 112, 135, 140, 145, 150], [15, 37, 70, 75, 80]),
        (5, [15, 37, 75, 112, 135, 145, 150], [15, 37, 75, 80]),
        (1, [15, 37, 75, 112, 135, 150], [15, 37, 75, 80]),
    ],
)
def test_milestones_and_the_last_ones_stay(tmp_path, monkeypatch, free_checkpoints, end, at_80):
    retention = retention_of(150, 3, until=0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, free_checkpoints * 3000))
    for step in range(1, 151):
        if step % 5 == 0 or step in retention.lasting:
            write_checkpoint(tmp_path, step, 3000 - 200)
            retention.apply(tmp_path)
        if step == 80:
            assert steps_kept(tmp_path) == at_80
    assert steps_kept(tmp_path) == end


def test_ends_of_stages_and_the_best_stay(tmp_path):
    retention = retention_of(30, 1, until=0.4)
    assert retention.lasting == {3, 7, 12, 15, 22, 27, 30}
    assert retention_of(8, 1, until=0.5).lasting == {4, 8}
    assert retention.superfluous(range(10, 15), 1, best=11) == [10, 13]
    assert retention.superfluous(range(10, 15), 1) == [10, 11, 13]
    assert retention_of(30, None).superfluous(range(31), retention_of(30, None).newest(31, 10**9, 1)) == []


def test_a_full_disk_is_said_once_it_matters(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    for step in (1, 2, 4, 5):
        write_checkpoint(tmp_path, step)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-5").rglob("*") if path.is_file())
    for free, kept in ((size * 11, [1, 2, 4, 5]), (size * 9, [2, 4, 5]), (size, [5])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: DiskUsage(0, 0, free))
        retention_of(8, 4, until=0.75).apply(tmp_path)
        assert steps_kept(tmp_path) == kept
    assert len(said) == 2
    assert "the newest 3 checkpoints stay instead of 4" in said[0]
    assert "the newest 1 checkpoints stay instead of 3" in said[1]


@pytest.mark.slow
def test_a_run_writes_its_milestones_and_stage_ends(tmp_path):
    trainer = make_trainer(tmp_path, TWO_STAGES, max_steps=20, save_strategy="steps", save_steps=7, save_total_limit=2)
    trainer.train()
    assert steps_kept(tmp_path) == [2, 5, 8, 10, 15, 18, 20]
    assert all(check_complete(str(folder)) == step for step, folder in find_checkpoints(tmp_path).items())
    nothing = make_trainer(tmp_path / "no", TWO_STAGES, max_steps=5)
    nothing.train()
    assert steps_kept(tmp_path / "no") == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


def cut(folder):
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "complete.json is missing, so it was not written to its end": lambda folder: (folder / COMPLETE_FILE).unlink(),
    "complete.json cannot be read \\(JSONDecodeError": lambda folder: (folder / COMPLETE_FILE).write_text("{"),
    "complete.json cannot be read \\(KeyError: 'files'": lambda folder: (folder / COMPLETE_FILE).write_text(
        json.dumps({"step": 1})
    ),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "optimizer.pt has .* bytes, .* were written": cut,
    "adapter_model.safetensors has another SHA-256": flip,
    "there is no such folder": shutil.rmtree,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_and_incomplete_checkpoints_are_refused_with_the_reason(tmp_path, trained, reason):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(trained / "checkpoint-1", checkpoint)
    assert check_complete(str(checkpoint)) == 1
    DAMAGES[reason](checkpoint)
    with pytest.raises(ValueError, match=f"checkpoint-1' is not a complete checkpoint: .*{reason}"):
        make_trainer(tmp_path / "again", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_foreign_checkpoints_are_refused_with_the_reason(tmp_path, trained):
    renamed = tmp_path / "checkpoint-7"
    shutil.copytree(trained / "checkpoint-1", renamed)
    with pytest.raises(ValueError, match="it holds step 1, its name says 7"):
        make_trainer(tmp_path / "again", max_steps=8).train(resume_from_checkpoint=str(renamed))
    wider = make_trainer(tmp_path / "wider", model=make_model(adapter_bottleneck=5), max_steps=2)
    with pytest.raises(ValueError, match="pdt_stream_adapters"):
        wider.train(resume_from_checkpoint=str(trained / "checkpoint-1"))
    with pytest.raises(ValueError, match="checkpoint-2' is at step 2, allowed: at most max_steps=1"):
        make_trainer(tmp_path / "shorter", max_steps=1).train(resume_from_checkpoint=str(trained / "checkpoint-2"))


# A run went on from such a checkpoint with a new optimizer and its schedule at the start, and said nothing.
def test_checkpoints_without_optimizer_are_refused_while_steps_are_left(tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, **saving).train()
    first, last = str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")
    named = make_arguments(tmp_path / "named", resume_from_checkpoint=first, max_steps=2)
    again = make_trainer(tmp_path / "again", **saving)
    for go_on in (lambda: again.train(resume_from_checkpoint=first), lambda: find_checkpoint(named, {})):
        refusal = "checkpoint-1' has no optimizer.pt, scheduler.pt .save_only_model., allowed with 1 steps left: "
        with pytest.raises(ValueError, match=refusal):
            go_on()
    # No step is left: the model alone remains to be written.
    again.train(resume_from_checkpoint=last)
    assert again.state.global_step == 2
    # DeepSpeed keeps the optimizer in its own folder.
    check_optimizer(str(write_deepspeed_checkpoint(tmp_path)), 1)


def write_deepspeed_checkpoint(run: Path) -> Path:
    folder = write_checkpoint(run, 7)
    (folder / "global_step7").mkdir()
    (folder / "scheduler.pt").touch()
    return folder


def test_whoever_is_killed_leaves_a_checkpoint_whole_or_gone(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path):
        (path / "state.json").unlink()
        raise Killed

    old, new = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path / "_saving-checkpoint-3", 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        delete_checkpoint(old)
    assert steps_kept(tmp_path) == []
    (tmp_path / ".saving-checkpoint-4").mkdir()
    clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []
    old, new = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path / "new", 3, size=7)
    move_into_place(new, old)
    assert (old / "adapter" / "weights").stat().st_size == 7
    assert check_complete(str(old)) == 3


@pytest.mark.slow
def test_a_finished_run_is_not_continued_with_the_same_max_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    settings = {"training": trainer.args.to_dict()}
    record_run(trainer.args, settings, None)
    trainer.train()
    last = str(tmp_path / "checkpoint-2")
    assert find_checkpoint(trainer.args, settings) == last
    # Killed after the last step and before the model was written: no step is added, and the rest is done.
    (tmp_path / "_deleting-checkpoint-1").mkdir()
    unfinished = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    unfinished.train(resume_from_checkpoint=last)
    assert unfinished.state.global_step == 2
    assert not list(tmp_path.glob("_*"))
    for name, value in weights(trainer.model).items():
        assert torch.equal(weights(unfinished.model)[name], value)
    unfinished.save_state()
    unfinished.save_model()
    with pytest.raises(ValueError, match=r"output_dir=.* is finished at max_steps=2: no step is left\. Allowed:"):
        find_checkpoint(trainer.args, settings)
    again = make_arguments(tmp_path, resume_from_checkpoint=last)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='.*checkpoint-2' .* is finished at max_steps=2"):
        find_checkpoint(again, settings)
    longer = make_arguments(tmp_path, max_steps=3, resume_from_checkpoint=last)
    assert find_checkpoint(longer, settings) == last
    anew = make_arguments(tmp_path, overwrite_output_dir=True)
    assert find_checkpoint(anew, settings) is None
    record_run(anew, settings, None)
    assert steps_kept(tmp_path) == []
    write_checkpoint(tmp_path, 2)
    assert find_checkpoint(trainer.args, settings) == last


def score(trainer, scores):
    """Gives a trainer's evaluations these values of `eval_score`."""
    scores = iter(scores)

    def evaluate(*args, **kwargs):
        metrics = {"eval_score": next(scores)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate


@pytest.mark.slow
def test_the_best_checkpoint_is_the_best_of_the_smoothed_metric_and_stays(tmp_path):
    assert smoothed([1.0, 2.0, 0.0]) == pytest.approx(0.91)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score"}
    saving = {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 2, "greater_is_better": True}
    trainer = make_trainer(tmp_path, max_steps=6, **evaluation, **saving)
    score(trainer, [0.5, 0.9, 0.4, 0.4, 0.55, 0.3])
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == pytest.approx(0.62)
    assert steps_kept(tmp_path) == [2, 6]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="save_total_limit=1, allowed with metric_for_best_model: None or at least 2"):
        make_trainer(tmp_path, **{**evaluation, **saving, "save_total_limit": 1})


def make_scored(folder, scores):
    """Two steps, one of the bus and one of the heads, that end with the best of both."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score"}
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    stages = [{**BUS_STAGE, "until": 1}, HEAD_STAGE]
    trainer = make_trainer(folder, stages, max_steps=2, train_dataset=make_features(4), **evaluation, **saving)
    score(trainer, scores)
    return trainer


def check_best(trainer, best):
    """The trainer's model is what the checkpoint holds, and is said to have learnt no more than that has."""
    assert trainer.state.best_model_checkpoint == str(best)
    saved = load_file(best / "adapter" / "adapter_model.safetensors")
    trainer.save_model()
    written = load_file(Path(trainer.args.output_dir, "adapter", "adapter_model.safetensors"))
    assert all(torch.equal(value, written[name]) for name, value in saved.items())
    configs = [read_json(Path(folder, "adapter", "adapter_config.json")) for folder in (best, trainer.args.output_dir)]
    assert configs[0]["trained_parts"] == configs[1]["trained_parts"]
    return configs[1]["trained_parts"]


def test_the_best_model_is_loaded_at_the_end_with_what_it_has_learnt(tmp_path):
    # The saved model named the groups of the whole run, heads too that the best checkpoint had never trained.
    trainer = make_scored(tmp_path / "run", [1.0, 0.0])
    trainer.train()
    assert check_best(trainer, tmp_path / "run" / "checkpoint-1") == BUS_STAGE["train"]
    # The best checkpoint was looked for in the folder of the run that goes on, where it has never been.
    other = make_scored(tmp_path / "other", [0.0])
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    check_best(other, tmp_path / "run" / "checkpoint-1")
    # A moved run without a step left did not find it at all, and ended with its last weights.
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = make_scored(tmp_path / "moved", [])
    moved.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    check_best(moved, tmp_path / "moved" / "checkpoint-1")


def test_the_last_checkpoint_may_be_the_best(tmp_path):
    # It was noted, in its own state too, where it was written before it moved to its place; the run ended in an error.
    trainer = make_scored(tmp_path, [0.0, 1.0])
    trainer.train()
    assert set(check_best(trainer, tmp_path / "checkpoint-2")) == {*BUS_STAGE["train"], *HEAD_STAGE["train"]}
    state = read_json(tmp_path / "checkpoint-2" / "trainer_state.json")
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
