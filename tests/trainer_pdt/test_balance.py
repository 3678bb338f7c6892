"""The balance of distillation: by hand, really applied, the same after a continuation, and refused without effect."""

import pytest
import torch

from tests.tiny_training import BUS_STAGE, make_arguments, make_features, make_trainer, weights
from trainer_pdt.balance import BALANCE_FILE, HIGHEST, LOWEST, DistillationBalance, gradient_norm
from trainer_pdt.curriculum import Curriculum, Stage

BOTH = {**BUS_STAGE, "losses": {"lm_ce": 1.0, "kd": 2.0}}
BALANCED = {"kd_balance_target": 0.5, "kd_balance_rate": 0.2, "kd_balance_every": 2, "max_steps": 4}


def test_gradient_norm_by_hand():
    one, two, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = (3.0 * one).sum() + (4.0 * two).sum()
    assert gradient_norm(loss, [one, two, other]).item() == pytest.approx(50**0.5)
    assert gradient_norm(loss, [one]).item() == pytest.approx(18**0.5)
    assert one.grad is None
    assert gradient_norm(loss, [other]).item() == 0.0


def test_update_by_hand():
    balance = DistillationBalance(1.0, 0.1, 1)
    balance.update(torch.tensor([4.0, 2.0]), 0)
    assert balance.scale == pytest.approx(0.9)
    balance.update(torch.tensor([1.0, 2.0]), 0)
    assert balance.scale == pytest.approx(0.9 * 1.05)
    for unusable in (0.0, float("nan"), float("inf")):
        balance.update(torch.tensor([unusable, 2.0]), 0)
    assert balance.scale == pytest.approx(0.9 * 1.05)
    for norms, bound in (((1e9, 1.0), LOWEST), ((1e-9, 1.0), HIGHEST)):
        for _ in range(60):
            balance.update(torch.tensor(norms), 0)
        assert balance.scale == bound


def test_the_factor_is_on_the_weight_that_is_measured_and_used():
    parameter = torch.ones(1, requires_grad=True)
    parts = {"kd": 3.0 * parameter.sum(), "lm_ce": 2.0 * parameter.sum()}
    stage = Stage("a", 1, ("snc",), {"lm_ce": 0.5, "kd": 2.0})
    balance = DistillationBalance(1.0, 0.1, 1)
    balance.scale = 0.5
    assert balance.weights(stage) == {"lm_ce": 0.5, "kd": 1.0}
    assert balance.measure(parts, stage, [parameter]).tolist() == [3.0, 1.0]
    assert stage.losses == {"lm_ce": 0.5, "kd": 2.0}
    alone = Stage("b", 1, ("snc",), {"kd": 2.0})
    assert not balance.acts_in(alone) and balance.weights(alone) == {"kd": 2.0}


def test_measured_where_it_is_due():
    balance = DistillationBalance(1.0, 0.1, 3)
    assert [balance.is_due(*place) for place in ((0, 0), (0, 1), (1, 0), (3, 0))] == [True, False, False, True]


@pytest.mark.slow
def test_a_run_trains_with_it_and_continues_exactly(tmp_path):
    shared = {"train_dataset": make_features(8), "max_grad_norm": 0.0, "optim": "sgd"}
    saving = {**shared, "save_strategy": "steps", "save_steps": 2}
    plain = make_trainer(tmp_path / "plain", [BOTH], max_steps=4, **shared)
    plain.train()
    whole = make_trainer(tmp_path / "whole", [BOTH], **BALANCED, **saving)
    whole.train()
    again = make_trainer(tmp_path / "again", [BOTH], **BALANCED, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    logs = [entry for entry in whole.state.log_history if "kd_scale" in entry]
    assert len(logs) == 4 and logs[0]["kd_scale"] == logs[1]["kd_scale"] != 1.0 != logs[2]["kd_scale"]
    for entry in logs:
        total = entry["loss_lm_ce"] + 2.0 * entry["kd_scale"] * entry["loss_kd"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["kd_ce_gradient_ratio"] > 0
    assert "kd_scale" not in plain.state.log_history[0]
    assert again.balance.scale == whole.balance.scale
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value)
    assert any(not torch.equal(weights(plain.model)[name], value) for name, value in weights(whole.model).items())
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=f"lacks {BALANCE_FILE}, allowed: a checkpoint of a run with kd_balance"):
        whole.balance.load(str(tmp_path / "bare"))


def test_refused_where_it_could_not_act(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="allowed: none, or a stage that weighs both kd and lm_ce"):
        make_trainer(tmp_path, kd_balance_target=1.0)
    args = make_arguments(tmp_path, kd_balance_target=1.0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    curriculum = Curriculum((Stage("a", 2, ("snc",), {"lm_ce": 1.0, "kd": 1.0}),))
    with pytest.raises(ValueError, match="allowed with DeepSpeed: none"):
        DistillationBalance.of_run(args, curriculum)


def test_only_the_refused_step_is_taken_back():
    balance = DistillationBalance(1.0, 0.1, 1)
    balance.update(torch.tensor([4.0, 2.0]), 0)
    kept = balance.logs()
    balance.update(torch.tensor([9.0, 2.0]), 1)
    assert balance.logs() != kept
    balance.undo(1)
    assert balance.logs() == kept
    balance.undo(2)
    assert balance.logs() == kept == {"kd_scale": pytest.approx(0.9), "kd_ce_gradient_ratio": 2.0}


@pytest.mark.slow
def test_a_skipped_step_leaves_the_balance_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, [BOTH], **BALANCED)
    scales, accepts = [], trainer.guard._reason

    def refuses_third(loss, grad_norm):
        scales.append(trainer.balance.scale)
        return "asked for" if len(scales) == 3 else accepts(loss, grad_norm)

    trainer.guard._reason = refuses_third
    trainer.train()
    assert [entry["step"] for entry in trainer.guard.skipped] == [3]
    first, second, third, fourth = scales
    assert first == second == fourth != third
    assert trainer.balance.scale == fourth
