"""Optimizers of transformers on the groups that stages freeze and free, and the limit on singular values."""

import pytest
import torch
from transformers import get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_features, make_model, make_trainer, weights
from trainer_pdt.callbacks import parameter_group
from trainer_pdt.curriculum import PARAMETER_GROUPS

STAGES = [{**BUS_STAGE, "until": 2}, HEAD_STAGE]
LESS_USED = ("adamw_torch_fused", "sgd", "adagrad", "rmsprop")
BUILT_IN = ("adamw_torch", "adafactor", *(pytest.param(name, marks=pytest.mark.slow) for name in LESS_USED))
EIGHT_BIT = {"adamw_bnb_8bit": is_bitsandbytes_available, "adamw_torch_8bit": is_torchao_available}


def check_stages(trainer):
    """Two steps of the bus, one of the heads: what learnt changed, and only that."""
    start, after = weights(trainer.model), {}
    trainer.train()
    after = weights(trainer.model)
    changed = {parameter_group(name) for name in start if not torch.equal(start[name], after[name])}
    assert changed == set(PARAMETER_GROUPS)
    assert [entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True] * 3


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_optimizer_follows_the_stages(tmp_path, name):
    check_stages(make_trainer(tmp_path, STAGES, max_steps=3, optim=name, train_dataset=make_features(8)))


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_optimizers_train_or_say_what_is_missing(tmp_path, name):
    trainer = make_trainer(tmp_path, STAGES, max_steps=3, optim=name, train_dataset=make_features(8))
    if EIGHT_BIT[name]():
        check_stages(trainer)
        return
    with pytest.raises((ImportError, ValueError), match=r"(?i)install"):
        trainer.train()


def test_the_trainers_own_choice_of_a_class_is_used(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.NAdam, {"betas": (0.8, 0.9)})
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.NAdam)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["pdt_group"] for group in optimizer.param_groups} == set(PARAMETER_GROUPS)


def rates_of(scheduler, optimizer, steps):
    """Learning rate of the first param group before every step, and after the last."""
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_min_lr", {"min_lr": 5e-3}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}),
        ("cosine_warmup_with_min_lr", {"min_lr": 5e-3, "warmup_lr_rate": 0.1}),
        ("polynomial", {"lr_end": 5e-3}),
        ("polynomial", {}),
        ("cosine", {}),
    ],
)
def test_rates_of_a_schedule_are_those_of_the_library(tmp_path, name, options):
    # Options that are learning rates were multiplied by `learning_rate`: this run ended at 5e-5, not at 5e-3.
    choices = {"max_steps": 6, "warmup_steps": 2, "lr_scheduler_type": name, "lr_scheduler_kwargs": options}
    trainer = make_trainer(tmp_path, learning_rate=1e-2, **choices)
    found = rates_of(trainer.create_scheduler(6, trainer.create_optimizer()), trainer.optimizer, 5)
    plain = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    library = get_scheduler(name, plain, num_warmup_steps=2, num_training_steps=6, scheduler_specific_kwargs=options)
    assert found == pytest.approx(rates_of(library, plain, 5), rel=1e-12)


@pytest.mark.parametrize("option", ["params", "model", "optimizer_dict"])
def test_an_optimizer_that_chooses_its_parameters_is_refused(tmp_path, monkeypatch, option):
    trainer = make_trainer(tmp_path, optim=OptimizerNames.GALORE_ADAMW.value)
    chosen = (torch.optim.AdamW, {"lr": 0.1, option: []})
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda args, model: chosen)
    with pytest.raises(ValueError, match=f"optim='galore_adamw' brings its own {option}, allowed: one that takes"):
        trainer.create_optimizer()


# The saved state of optimizer and schedule brought the options of the run that wrote it, over those of the run that
# went on from it with other ones, while its manifest named the new.
def test_a_run_that_goes_on_with_other_settings_has_its_own_rates_decay_and_betas(tmp_path):
    def settings(trainer):
        groups = [{name: value for name, value in group.items() if name != "params"} for group in groups_of(trainer)]
        return groups, trainer.lr_scheduler.base_lrs, trainer.lr_scheduler.get_last_lr()

    def groups_of(trainer):
        return trainer.optimizer.param_groups

    saved = {"train_dataset": make_features(8), "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "first", max_steps=2, **saved).train()
    other = {"learning_rate": 1e-4, "weight_decay": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "gate_lr_scale": 3.0}
    whole, continued = (make_trainer(tmp_path / name, max_steps=2, **other) for name in ("whole", "continued"))
    whole.train()
    continued.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert settings(continued) == settings(whole)
    moments = [next(iter(trainer.optimizer.state.values()))["step"] for trainer in (continued, whole)]
    assert moments == [2, 2]


@pytest.mark.slow
def test_training_keeps_the_limit_on_singular_values(tmp_path):
    def largest(model):
        snc, adapters = model.stack.snc, model.stack.pdt_stream_adapters["default"]
        matrices = [site.o_proj.weight for site in snc] + [part for module in adapters for part in module.down]
        return max(float(torch.linalg.svdvals(matrix)[0]) for matrix in matrices)

    found = {}
    for limit in (None, 1.0):
        trainer = make_trainer(tmp_path / str(limit), model=make_model(spectral_norm=limit), learning_rate=0.05)
        trainer.train()
        found[limit] = largest(trainer.model)
    assert found[None] > 1.1
    assert found[1.0] <= 1.01
