"""Passes of a step: they differ where they should, run only where they are asked for, and train their groups."""

from dataclasses import replace

import pytest
import torch

from modeling_pdt.adapter_layer import PDTStack
from tests.step_passes import FEATURES, READING, branches_of, drifted_teacher, full_batch, moved_model, stage
from tests.tiny_training import make_collator, make_model
from trainer_pdt.branches import build_rollout, reread, silence, student_rollout
from trainer_pdt.callbacks import parameter_group
from trainer_pdt.curriculum import LOSS_NAMES, Stage
from trainer_pdt.losses import ChunkedLogits, token_ce, weighted_total
from trainer_pdt.noise import draw_noise
from trainer_pdt.objective import loss_parts

TRAINS = {
    "planner": {"planner"},
    "kd_plan": {"planner"},
    "plan_snapshot": {"planner", "snc", "stream_adapters", "writer"},
    "lm_ce": READING,
    "kd": READING,
    "keep_close": READING,
    "block_start": READING,
    "notes": {"snc", "stream_adapters", "encoder"},
    "spec": {"writer", "snc"},
    "spec_kl": {"writer", "snc"},
    "use": READING,
    "stab": READING,
    "red": {"writer", "snc"},
    "cov": {"coverage", "encoder", "snc"},
    "stream": {"stream"},
    "agree": {"agreement"},
}


@pytest.fixture(scope="module")
def model():
    return moved_model()


@pytest.fixture(scope="module")
def batch(model):
    return full_batch(model)


@pytest.fixture(scope="module")
def ema(model):
    return drifted_teacher(model)


def test_a_shared_prefix_changes_no_loss_and_no_gradient(model, batch, ema, tmp_path, monkeypatch):
    every = stage([loss for loss in LOSS_NAMES if loss != "nli"])
    results = []
    for skips_prompts in (True, False):
        if not skips_prompts:
            monkeypatch.setattr(PDTStack, "share_prefix", lambda stack, tap, *choices: stack.lower_from(tap))
        branches, arguments = branches_of(model, batch["corrupted"], every, tmp_path, ema, teacher_kind="ema")
        assert (branches.student.tap.prefix is not None) is skips_prompts
        model.zero_grad()
        report = weighted_total(loss_parts(branches, batch["corrupted"], every, arguments), every.losses)
        report.total.backward()
        learnt = [p.grad.clone() for p in model.pdt_parameters().values() if p.grad is not None]
        results.append([report.total.detach(), *learnt])
    for shared, whole in zip(*results, strict=True):
        torch.testing.assert_close(shared, whole, atol=1e-6 * float(whole.abs().max()) + 1e-7, rtol=1e-5)


@pytest.mark.parametrize("plan_on_bus", [True, False])
def test_without_the_plan_on_the_bus_its_items_train_coverage_alone(batch, tmp_path, plan_on_bus):
    model, both = make_model(plan_on_bus=plan_on_bus), stage(["lm_ce", "cov"])
    view = batch["corrupted"]
    other = {**view, "item_ids": view["item_ids"].flip(0), "item_mask": view["item_mask"].flip(0)}
    losses = []
    for inputs in (view, other):
        branches, arguments = branches_of(model, inputs, both, tmp_path)
        losses.append(loss_parts(branches, inputs, both, arguments))
    first, second = losses
    assert torch.equal(first["lm_ce"], second["lm_ce"]) is not plan_on_bus
    assert not torch.equal(first["cov"], second["cov"])


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_loss_moves_exactly_its_groups(model, batch, tmp_path, loss):
    one = stage([loss])
    view = batch["corrupted"] if loss == "agree" else batch
    branches, arguments = branches_of(model, view, one, tmp_path, usage_margin=50.0, redundancy_threshold=-1.0)
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


def test_weights_of_the_arguments_reach_the_targets(model, batch, tmp_path):
    chosen = {"sibling_weight": 3.0, "other_weight": 0.0}
    targets = branches_of(model, batch["corrupted"], stage(["lm_ce"]), tmp_path, **chosen)[0].targets
    assert 0 < targets.feasible_M.sum() < targets.feasible_M.numel()
    assert not targets.weights_M[~targets.feasible_M].any()
    assert set(targets.weights_M[targets.feasible_M].tolist()) <= {0.0, 3.0} and targets.weights_M.any()


def test_no_pass_without_its_loss(model, batch, tmp_path, monkeypatch):
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    branches, _ = branches_of(model, batch, stage(["lm_ce"]), tmp_path)
    assert len(calls) == 1
    assert branches.student.coverage_logits is None
    assert branches.student.agreement_logits is None
    assert branches.student.planner_logits is None
    extras = (branches.teacher, branches.averaged, branches.aim, branches.trunk, branches.stale, branches.buckets)
    assert extras == (None,) * 6
    assert branches.silent_ce_M is None and branches.informed_ce_M is None
    assert branches.target is None
    calls.clear()
    branches_of(model, batch, stage(["lm_ce", "kd", "keep_close", "use", "stab", "notes", "spec"]), tmp_path)
    assert len(calls) == 5
    assert all("tap" in inputs and "input_ids" not in inputs for inputs in calls[1:])


def test_heads_alone_run_no_upper_half(model, batch, tmp_path):
    heads = Stage("h", 1, ("coverage",), {"cov": 1.0})
    branches, _ = branches_of(model, batch, heads, tmp_path)
    assert branches.student.logits is None
    assert branches.student.coverage_logits is not None


def test_branches_differ(model, batch, tmp_path):
    both = stage(["lm_ce", "kd", "keep_close", "use", "stab"])
    branches, _ = branches_of(model, batch, both, tmp_path)
    student_MV = branches.student.logits.whole()
    others = [branches.teacher.logits, branches.trunk, branches.stale]
    for other in others:
        assert other.shape == student_MV.shape
        assert not torch.allclose(other, student_MV, atol=1e-4)
    silent_M = token_ce(student_MV, branches.targets.tokens_M)
    assert not torch.allclose(branches.silent_ce_M, silent_M, atol=1e-4)
    assert branches.aim is branches.teacher.logits
    assert not branches.teacher.logits.requires_grad
    text, _ = branches_of(model, batch, both, tmp_path, teacher_kind="text")
    assert text.aim.shape == student_MV.shape
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
    assert torch.allclose(plain[supervised], branches.trunk, atol=1e-5)


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


def test_use_counts_what_true_notes_help_the_teacher_with(model, batch, tmp_path):
    one = stage(["use"])
    branches, arguments = branches_of(model, batch, one, tmp_path, usage_margin=50.0, usage_sensitivity=0.05)
    assert branches.teacher.logits.shape[0] == 0
    helped = branches.silent_ce_M - branches.informed_ce_M > 0.05
    assert 0 < helped.sum() < len(helped)
    logits = branches.student.logits.whole().requires_grad_()
    chunked = ChunkedLogits(logits, torch.nn.Identity(), 64, remade=False)
    counted = replace(branches, student=replace_logits(branches.student, chunked))
    loss_parts(counted, batch, one, arguments)["use"].backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, helped)
    nothing = {**batch, "note_mask": torch.zeros_like(batch["note_mask"])}
    branches, arguments = branches_of(model, nothing, one, tmp_path, usage_margin=50.0, usage_sensitivity=0.05)
    assert loss_parts(branches, nothing, one, arguments)["use"] == 0


def replace_logits(output, logits):
    return type(output)(**{**output, "logits": logits})


def test_plan_snapshot_is_zero_where_buckets_say_what_texts_say(model, batch, tmp_path):
    one = stage(["plan_snapshot"])
    branches, arguments = branches_of(model, batch, one, tmp_path)
    assert loss_parts(branches, batch, one, arguments)["plan_snapshot"] > 1e-4
    bare = {
        **batch,
        "plan_slots": torch.zeros_like(batch["plan_slots"]),
        "item_mask": torch.zeros_like(batch["item_mask"]),
    }
    branches, arguments = branches_of(model, bare, one, tmp_path)
    assert loss_parts(branches, bare, one, arguments)["plan_snapshot"].abs() < 1e-6


def test_redundancy_compares_siblings_of_one_round(model, batch, tmp_path):
    one = stage(["red"])
    branches, arguments = branches_of(model, batch, one, tmp_path, redundancy_threshold=-1.0)
    notes, exists = branches.student.speculation.mean(dim=2), batch["block_exists"]
    expected = [
        1.0 + torch.cosine_similarity(notes[a, v], notes[b, v], dim=0)
        for document in range(4)
        for a, b in ((0, 1), (0, 2), (1, 2))
        for a, b in ((3 * document + a, 3 * document + b),)
        for v in range(exists.shape[1])
        if exists[a, v] and exists[b, v]
    ]
    assert torch.allclose(loss_parts(branches, batch, one, arguments)["red"], torch.stack(expected).mean(), atol=1e-5)
    arguments.redundancy_threshold = 1.0
    assert loss_parts(branches, batch, one, arguments)["red"].abs() < 1e-6
