"""Passes of a step: they differ where they should, run only where they are asked for, and train their groups."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_training import make_arguments, make_collator, make_features, make_model
from trainer_pdt.branches import (
    agreement_loss,
    build_rollout,
    build_targets,
    loss_parts,
    reread,
    run_branches,
    silence,
    student_rollout,
)
from trainer_pdt.callbacks import parameter_group
from trainer_pdt.curriculum import LOSS_NAMES, PARAMETER_GROUPS, Stage
from trainer_pdt.losses import IGNORE_INDEX, weighted_total
from trainer_pdt.noise import draw_noise

FEATURES = [make_features(4)[index] for index in range(4)]
# Groups that a loss moves, once zero-initialised projections have moved away from zero.
READING = {"snc", "stream_adapters", "writer", "encoder"}
TRAINS = {
    "planner": {"planner"},
    "kd_plan": {"planner"},
    "lm_ce": READING,
    "kd": READING,
    "keep_close": READING,
    "block_start": READING,
    "notes": {"snc", "stream_adapters", "encoder"},
    "spec": {"writer", "snc"},
    "spec_kl": {"writer", "snc"},
    "use": READING,
    "stab": READING,
    "cov": {"coverage", "encoder", "snc"},
    "stream": {"stream"},
    "agree": {"agreement"},
}


def stage(losses, train=tuple(PARAMETER_GROUPS), **changes):
    losses = dict.fromkeys(losses, 1.0)
    kept = [g for g in train if g not in ("coverage", "agreement", "stream")] or list(train)
    return Stage("test", 10, tuple(kept), losses, **changes)


@pytest.fixture(scope="module")
def model():
    model = make_model()
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def batch(model):
    return make_collator(model, with_corrupted=True, with_text_teacher=True)(FEATURES)


def branches_of(model, batch, stage, tmp_path, **arguments):
    arguments = make_arguments(tmp_path, **arguments)
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise(stage, 4, 3, batch["block_exists"].shape[1], 1, generator)
    return run_branches(model, batch, stage, noise, arguments, model.config, generator), arguments


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_loss_moves_exactly_its_groups(model, batch, tmp_path, loss):
    one = stage([loss])
    view = batch["corrupted"] if loss == "agree" else batch
    branches, arguments = branches_of(model, view, one, tmp_path, usage_margin=50.0)
    model.zero_grad()
    report = weighted_total(loss_parts(branches, view, one, arguments), one.losses)
    assert torch.isfinite(report.total)
    assert report.total > 0
    report.total.backward()
    moved = {
        parameter_group(name)
        for name, parameter in model.pdt_parameters().items()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert moved == TRAINS[loss]
    assert all(parameter.grad is None for name, parameter in model.peft.named_parameters() if "pdt_" not in name)


def test_no_pass_without_its_loss(model, batch, tmp_path, monkeypatch):
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    branches, _ = branches_of(model, batch, stage(["lm_ce"]), tmp_path)
    assert len(calls) == 1
    assert branches.student.coverage_logits is None
    assert branches.student.agreement_logits is None
    assert branches.student.planner_logits is None
    extras = (branches.teacher, branches.trunk_MV, branches.text_MV, branches.silent_MV, branches.stale_MV)
    assert extras == (None,) * 5
    calls.clear()
    branches_of(model, batch, stage(["lm_ce", "kd", "keep_close", "use", "stab", "notes", "spec"]), tmp_path)
    assert len(calls) == 5
    assert all("tap" in inputs and "input_ids" not in inputs for inputs in calls[1:])


def test_heads_alone_make_no_logits(model, batch, tmp_path):
    heads = Stage("h", 1, ("coverage",), {"cov": 1.0})
    branches, _ = branches_of(model, batch, heads, tmp_path)
    assert branches.student.logits.shape[0] == 0
    assert branches.student.coverage_logits is not None


def test_branches_differ(model, batch, tmp_path):
    both = stage(["lm_ce", "kd", "keep_close", "use", "stab"])
    branches, _ = branches_of(model, batch, both, tmp_path)
    others = [branches.teacher.logits, branches.trunk_MV, branches.silent_MV, branches.stale_MV]
    for other in others:
        assert other.shape == branches.student.logits.shape
        assert not torch.allclose(other, branches.student.logits, atol=1e-4)
    assert not branches.teacher.logits.requires_grad
    text, _ = branches_of(model, batch, both, tmp_path, teacher_kind="text")
    assert text.text_MV.shape == branches.student.logits.shape
    assert text.teacher is None


def test_trunk_pass_is_the_trunk(model, batch, tmp_path):
    branches, _ = branches_of(model, batch, stage(["keep_close", "lm_ce"]), tmp_path)
    with model.disable_adapter(), torch.no_grad():
        plain = model.trunk(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).logits
    supervised = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.allclose(plain[supervised], branches.trunk_MV, atol=1e-5)


def test_shared_lower_half_equals_a_full_forward(model, batch):
    rollout = build_rollout(batch, model.config)
    supervised = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    full = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "stream_ids")}
    with torch.no_grad():
        output = model(**full, rollout=silence(rollout), logits_mask=supervised)
    assert torch.equal(reread(model, batch, output.tap, silence(rollout)), output.logits)
    assert not torch.allclose(reread(model, batch, output.tap, rollout), output.logits, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_the_loss(model, tmp_path, side):
    batch = make_collator(model, padding_side=side)(FEATURES)
    one = stage(["lm_ce", "cov", "planner", "spec", "keep_close", "block_start"])
    branches, arguments = branches_of(model, batch, one, tmp_path)
    report = weighted_total(loss_parts(branches, batch, one, arguments), one.losses)
    left = make_collator(model)(FEATURES)
    expected, _ = branches_of(model, left, one, tmp_path)
    expected = weighted_total(loss_parts(expected, left, one, arguments), one.losses)
    assert torch.allclose(report.total, expected.total, atol=1e-5)


def test_targets_weigh_what_a_note_can_have_told(model, batch):
    rollout = build_rollout(batch, model.config)
    now = build_targets(batch, replace(rollout, lag_R1=rollout.lag_R1 * 0), 5.0)
    later = build_targets(batch, replace(rollout, lag_R1=rollout.lag_R1 + 50), 5.0)
    usual = build_targets(batch, rollout, 5.0)
    assert usual.sibling_M.sum() >= now.feasible_M.sum() > usual.feasible_M.sum() > later.feasible_M.sum() == 0
    assert torch.equal(usual.weights_M, torch.where(usual.feasible_M, 5.0, 1.0))
    swapped = build_targets(batch, rollout, 5.0, torch.ones(12, dtype=torch.bool))
    assert torch.equal(swapped.weights_M, torch.where(usual.sibling_M, 0.0, 1.0))


def test_noise_reaches_the_rollout(model, batch):
    noisy = stage(
        ["lm_ce"], bus_mix=1.0, note_drop=0.5, note_swap=1.0, note_noise=0.3, stream_dropout=0.2, lag_jitter=0.5
    )
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise(noisy, 4, 3, batch["block_exists"].shape[1], 1, generator)
    rollout = student_rollout(batch, noisy, noise, model.config, generator)
    assert set(rollout.lag_R1.flatten().tolist()) == {0, 1}
    assert not torch.equal(rollout.donor_R, torch.arange(12))
    assert (~rollout.keep_RV).any()
    assert torch.equal(rollout.teacher_RV, batch["noisy_note_mask"].any(2))
    assert 0.2 < rollout.perturbation_RVKN.std() < 0.4
    dropping = student_rollout(batch, stage(["lm_ce"], item_drop=0.5), noise, model.config, generator)
    assert dropping.item_mask_BPL.sum() < batch["item_mask"].sum()
    assert torch.equal(dropping.item_mask_BPL.any(-1), batch["item_mask"].any(-1))
    assert not (dropping.item_mask_BPL & ~batch["item_mask"]).any()
    clean = student_rollout(batch, stage(["lm_ce"]), noise, model.config, generator)
    assert (clean.keep_RV, clean.donor_R, clean.teacher_RV, clean.perturbation_RVKN) == (None,) * 4


def test_agreement_loss_counts_other_blocks_little(batch):
    view = batch["corrupted"]
    shape = view["judgeable"].shape
    others = view["block_exists"] & ~view["judgeable"]
    right = torch.where(view["contradicts"], -20.0, 20.0)
    planted = (view["labels"] == IGNORE_INDEX) & (view["write_round"] >= 0)
    tokens = torch.where(planted, -20.0, 20.0)
    assert agreement_loss(right, tokens, view) < 1e-6
    wrong_elsewhere = right.masked_fill(others, -4.0)
    assert torch.allclose(agreement_loss(wrong_elsewhere, tokens, view), torch.tensor(0.25 * 4.018), atol=1e-3)
    assert agreement_loss(torch.zeros(shape), tokens, view) > 0.6


def test_agreement_loss_names_the_tokens_that_disagree(batch):
    view = batch["corrupted"]
    right = torch.where(view["contradicts"], -20.0, 20.0)
    planted = (view["labels"] == IGNORE_INDEX) & (view["write_round"] >= 0)
    judged = (view["reference"] >= 0) & view["judgeable"].gather(1, view["write_round"].clamp(min=0))
    assert (planted & judged).any() and (judged & ~planted).any()
    unsure = torch.zeros(planted.shape)
    assert torch.allclose(agreement_loss(right, unsure, view), torch.tensor(0.6931), atol=1e-3)
    tokens = unsure.clone().requires_grad_()
    agreement_loss(right, tokens, view).backward()
    assert torch.equal(tokens.grad != 0, judged)
    assert (tokens.grad[planted & judged] > 0).all() and (tokens.grad[judged & ~planted] < 0).all()


def test_teacher_publishes_only_blocks_that_have_true_notes(model, batch, tmp_path):
    rollouts = []

    class Spy:
        config = model.config

        def __call__(self, *args, **kwargs):
            rollouts.append(kwargs.get("rollout"))
            return model(*args, **kwargs)

    branches_of(Spy(), batch, stage(["lm_ce", "notes"]), tmp_path)
    told = batch["note_mask"].any(dim=2)
    assert (batch["block_exists"] & ~told).any()
    student, teacher = rollouts
    assert student.keep_RV is None and student.teacher_RV is None
    assert torch.equal(teacher.teacher_RV, told) and torch.equal(teacher.keep_RV, told)
