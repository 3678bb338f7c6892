"""Averaged weights: what they are, that they change places without copies, and that a continued run has the same."""

import pytest
import torch

from tests.tiny_training import BUS_STAGE, make_features, make_model, make_trainer, weights
from trainer_pdt.teacher import EMA_FILE, EmaTeacher

STAGE = {**BUS_STAGE, "losses": {"lm_ce": 1.0, "kd": 1.0, "spec": 0.5}}
EMA = {"teacher_kind": "ema", "teacher_ema_decay": 0.5, "max_steps": 4}


def test_average_by_hand():
    model = make_model()
    ema = EmaTeacher(model, 0.75)
    ema.start()
    before = weights(model)
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(4.0)
    ema.update()
    assert set(ema.average) == set(before)
    for name, value in before.items():
        assert torch.allclose(ema.average[name], value + 1.0, atol=1e-5)


def test_weights_change_places_without_copies_and_come_back():
    model = make_model()
    ema = EmaTeacher(model, 0.5)
    ema.start()
    live = {name: parameter.data_ptr() for name, parameter in model.pdt_parameters().items()}
    average = {name: value.data_ptr() for name, value in ema.average.items()}
    with pytest.raises(RuntimeError, match="inside"), ema.weights():
        assert {name: p.data_ptr() for name, p in model.pdt_parameters().items()} == average
        raise RuntimeError("inside")
    assert {name: p.data_ptr() for name, p in model.pdt_parameters().items()} == live


def test_parameters_of_lower_precision_are_averaged_in_float32():
    model = make_model()
    for parameter in model.pdt_parameters().values():
        parameter.data = parameter.data.bfloat16()
    ema = EmaTeacher(model, 0.999)
    ema.start()
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.fill_(1.0)
    ema.update()
    name, value = next((n, v) for n, v in ema.average.items() if (v == 0.001).any())
    with ema.weights():
        assert model.pdt_parameters()[name].dtype == torch.bfloat16
        assert torch.equal(model.pdt_parameters()[name], value.bfloat16())


@pytest.mark.slow
def test_a_continued_run_has_the_same_average_losses_and_weights(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "train_dataset": make_features(8)}
    whole = make_trainer(tmp_path / "whole", [STAGE], **EMA, **saving)
    whole.train()
    again = make_trainer(tmp_path / "again", [STAGE], **EMA, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.ema.average.items():
        assert torch.equal(again.ema.average[name], value)
        assert torch.equal(weights(again.model)[name], weights(whole.model)[name])
    assert any(not torch.equal(value, weights(whole.model)[name]) for name, value in whole.ema.average.items())
    losses = [
        [(e["step"], e["loss_kd"], e["loss_spec"]) for e in trainer.state.log_history if "loss_kd" in e]
        for trainer in (whole, again)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    make_trainer(tmp_path, [STAGE], save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / EMA_FILE).exists()
    with pytest.raises(ValueError, match=r"lacks ema\.safetensors, allowed: a checkpoint of a run with teacher_kind"):
        make_trainer(tmp_path / "again", [STAGE], **EMA).train(resume_from_checkpoint=str(checkpoint))


def test_an_average_of_other_parameters_is_refused(tmp_path):
    model = make_model()
    ema = EmaTeacher(model, 0.5)
    ema.start()
    ema.average.pop(sorted(ema.average)[0])
    ema.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"do not both have .*, allowed: equal parameters"):
        EmaTeacher(model, 0.5).load(str(tmp_path))
