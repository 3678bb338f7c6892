"""Batches whose loss is no number or far too large: skipped without a trace, counted, and at last refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_trainer, weights
from trainer_pdt import guard as guard_module
from trainer_pdt.guard import LossGuard
from trainer_pdt.telemetry import REPORT_FILE

RUN = {"max_steps": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1}


class Moments(TrainerCallback):
    """Weights and moments of the optimizer after every step."""

    def __init__(self, model):
        self.model, self.after = model, []

    def on_step_end(self, args, state, control, **kwargs):
        moments = [value["exp_avg"].clone() for value in kwargs["optimizer"].state.values()]
        self.after.append((weights(self.model), moments))


def spoil(trainer, steps, factor):
    """Multiplies the loss of the last micro-batch of `steps` (from 1); returns the documents of those steps."""
    compute, documents, calls = trainer.compute_loss, {}, []

    def spoilt(model, inputs, **kwargs):
        calls.append(inputs["document_ids"])
        step = trainer.state.global_step + 1
        documents[step] = documents.get(step, []) + inputs["document_ids"]
        loss = compute(model, inputs, **kwargs)
        return loss * factor if step in steps and len(documents[step]) == 4 else loss

    trainer.compute_loss = spoilt
    return documents


def equal(before, after):
    return all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and all(
        torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True)
    )


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_step_without_a_number_changes_nothing_and_is_counted(tmp_path, monkeypatch, value):
    said = []
    monkeypatch.setattr(guard_module.logger, "warning", said.append)
    trainer = make_trainer(tmp_path, **RUN)
    moments = Moments(trainer.model)
    trainer.add_callback(moments)
    documents = spoil(trainer, {3}, value)
    trainer.train()
    assert equal(moments.after[1], moments.after[2])
    assert not equal(moments.after[0], moments.after[1])
    assert not equal(moments.after[2], moments.after[3])
    assert trainer.lr_scheduler.last_epoch == 4
    (entry,) = trainer.guard.skipped
    assert (entry["step"], entry["documents"]) == (3, documents[3])
    assert len(said) == 1
    assert said[0].startswith(f"Step 3: the loss is {value}. Documents of its batch: {', '.join(documents[3])}.")
    report = json.loads((tmp_path / REPORT_FILE).read_text())
    assert report["skipped"] == trainer.guard.skipped
    assert all(entry["loss_lm_ce"] > 0 for entry in report["logs"] if "loss" in entry)


def test_gradients_without_a_number_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    before = weights(trainer.model)
    parameter = next(iter(trainer.model.pdt_parameters().values()))
    handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train()
    handle.remove()
    assert "the norm of its gradient" in trainer.guard.skipped[0]["reason"]
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name])


def test_too_many_end_the_run_and_name_the_batch(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.guard.limit = 1
    documents = spoil(trainer, {2, 3}, float("nan"))
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert str(error.value) == (
        f"Step 3: the loss is nan. Documents of its batch: {', '.join(documents[3])}. Steps [2] were skipped before, "
        "allowed: limit=1."
    )


@pytest.mark.slow
def test_a_resumed_run_keeps_count_and_mean(tmp_path):
    settings = {**RUN, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **settings)
    spoil(whole, {2}, float("nan"))
    whole.train()
    again = make_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.guard.state() == whole.guard.state()
    assert [entry["step"] for entry in again.guard.skipped] == [2]


def test_restored_callbacks_leave_the_guard_to_the_run(tmp_path):
    # `Trainer` put a copy in its place, with the limits of the earlier run; skipped steps were counted in the one that
    # was gone, and saved by the other.
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, **settings)
    spoil(whole, {1}, float("nan"))
    whole.train()
    choices = {**settings, "restore_callback_states_from_checkpoint": True}
    again = make_trainer(tmp_path / "again", **choices)
    again.guard.limit = 2
    spoil(again, {3}, float("nan"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in again.guard.skipped] == [1, 3]
    assert again.guard in again.callback_handler.callbacks
    saved = again.state.stateful_callbacks["LossGuard"]
    assert saved == again.guard.state()
    assert saved["args"]["limit"] == 2


def judged(guard, losses, stage=0):
    """Verdicts on a row of losses."""
    accelerator = SimpleNamespace(reduce=lambda value, how: value, scaler=None, distributed_type="NO")
    verdicts = []
    for step, loss in enumerate(losses):
        guard.add(torch.tensor(loss), [f"doc-{step}"])
        verdicts.append(guard.accepts(step, stage, 1.0, accelerator))
    return verdicts


def test_spikes_are_refused_when_asked_once_the_mean_of_the_stage_is_known():
    assert all(judged(LossGuard(), [1.0] * 30 + [1e6]))
    guard = LossGuard(spike_factor=5.0)
    assert all(judged(guard, [50.0] + [1.0] * 10 + [100.0]))
    assert all(judged(guard, [1.0] * 19 + [90.0], stage=1))
    assert judged(guard, [1.0] * 60, stage=1)[-1]
    mean = guard.mean
    assert judged(guard, [4.0, 30.0, 1.0], stage=1) == [True, False, True]
    assert guard.skipped == [
        {
            "step": 2,
            "reason": f"the loss is 30, more than spike_factor=5 times its mean {mean + 0.05 * (4.0 - mean):.4g}",
            "documents": ["doc-1"],
        }
    ]
    assert all(judged(guard, [1000.0] * 5, stage=2))


def test_where_a_step_cannot_be_skipped_the_first_ends_the_run():
    accelerator = SimpleNamespace(reduce=lambda value, how: value, scaler=None, distributed_type="DEEPSPEED")
    guard = LossGuard()
    guard.add(torch.tensor(float("nan")), ["doc-7"])
    with pytest.raises(RuntimeError, match=r"Step 5: the loss is nan\. .* doc-7\. DeepSpeed cannot skip a step"):
        guard.accepts(4, 0, None, accelerator)
    scaled = SimpleNamespace(**{**vars(accelerator), "scaler": object()})
    guard.add(torch.tensor(1.0), ["doc-8"])
    assert guard.accepts(5, 0, float("inf"), scaled)


def test_limits_are_checked():
    with pytest.raises(ValueError, match=r"limit=-1, allowed: an int of at least 0"):
        LossGuard(limit=-1)
    with pytest.raises(ValueError, match=r"spike_factor=1\.0"):
        LossGuard(spike_factor=1.0)


def test_a_stage_with_more_losses_is_judged_anew(tmp_path):
    trainer = make_trainer(tmp_path, [{**BUS_STAGE, "until": 0.5}, HEAD_STAGE], max_steps=4)
    trainer.train()
    assert (trainer.guard.stage, trainer.guard.usual, trainer.guard.skipped) == (1, 2, [])
