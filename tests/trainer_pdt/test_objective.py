"""On which tokens and blocks the losses count."""

from dataclasses import replace

import pytest
import torch

from modeling_pdt import PDTOutput
from tests.tiny_training import make_arguments, make_collator, make_features, make_model
from trainer_pdt.agreement_labels import planted_labels
from trainer_pdt.branches import BranchOutputs, Targets, build_rollout, build_targets
from trainer_pdt.curriculum import Stage
from trainer_pdt.losses import IGNORE_INDEX, ChunkedLogits, token_ce, token_kl
from trainer_pdt.objective import OTHER_BLOCK_WEIGHT, agreement_loss, loss_parts


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def batch(model):
    features = make_features(4)
    return make_collator(model, with_corrupted=True)([features[index] for index in range(4)])


def test_agreement_loss_counts_other_blocks_as_agreeing(batch):
    view = batch["corrupted"]
    shape = view["judgeable"].shape
    others = view["block_exists"] & ~view["judgeable"]
    right = torch.where(view["contradicts"], -20.0, 20.0)
    planted = (view["labels"] == IGNORE_INDEX) & (view["write_round"] >= 0)
    tokens = torch.where(planted, -20.0, 20.0)
    labels = planted_labels(view)
    assert agreement_loss(right, tokens, view, labels) < 1e-6
    wrong_elsewhere = right.masked_fill(others, -4.0)
    loss = agreement_loss(wrong_elsewhere, tokens, view, labels)
    assert torch.allclose(loss, torch.tensor(OTHER_BLOCK_WEIGHT * 4.018), atol=1e-3)
    assert agreement_loss(torch.zeros(shape), tokens, view, labels) > 0.6


def test_agreement_loss_names_the_tokens_that_disagree(batch):
    view = batch["corrupted"]
    right = torch.where(view["contradicts"], -20.0, 20.0)
    planted = (view["labels"] == IGNORE_INDEX) & (view["write_round"] >= 0)
    judged = (view["reference"] >= 0) & view["judgeable"].gather(1, view["write_round"].clamp(min=0))
    assert (planted & judged).any() and (judged & ~planted).any()
    unsure = torch.zeros(planted.shape)
    labels = planted_labels(view)
    assert torch.allclose(agreement_loss(right, unsure, view, labels), torch.tensor(0.6931), atol=1e-3)
    tokens = unsure.clone().requires_grad_()
    agreement_loss(right, tokens, view, labels).backward()
    assert torch.equal(tokens.grad != 0, judged)
    assert (tokens.grad[planted & judged] > 0).all() and (tokens.grad[judged & ~planted] < 0).all()


def test_targets_weigh_what_a_note_can_have_told(model, batch):
    rollout = build_rollout(batch, model.config)
    now = build_targets(batch, replace(rollout, lag_R1=rollout.lag_R1 * 0), 5.0)
    later = build_targets(batch, replace(rollout, lag_R1=rollout.lag_R1 + 50), 5.0)
    usual = build_targets(batch, rollout, 5.0)
    assert usual.sibling_M.sum() >= now.feasible_M.sum() > usual.feasible_M.sum() > later.feasible_M.sum() == 0
    assert torch.equal(usual.weights_M, torch.where(usual.feasible_M, 5.0, 1.0))
    swapped = build_targets(batch, rollout, 5.0, swapped_R=torch.ones(12, dtype=torch.bool))
    assert torch.equal(swapped.weights_M, torch.where(usual.sibling_M, 0.0, 1.0))
    alone = build_targets(batch, rollout, 5.0, other_weight=0.0)
    assert torch.equal(alone.weights_M, torch.where(usual.feasible_M, 5.0, 0.0))


WEIGHTS = torch.tensor([5.0, 0.0, 1.0, 1.0])
FEASIBLE = torch.tensor([True, True, False, False])
SIBLING = torch.tensor([True, True, True, False])
COUNTED = {
    "lm_ce": WEIGHTS,
    "block_start": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "use": torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "kd": torch.tensor([5.0, 0.0, 0.0, 1.0]),
    "keep_close": torch.tensor([0.0, 0.0, 0.0, 1.0]),
    "stab": torch.tensor([0.0, 0.0, 0.0, 1.0]),
    "notes": WEIGHTS,
    "plan_snapshot": torch.ones(4),
}
"""Weight of each token in each loss: the second reads a swapped note, the third repeats what no note can have told."""


ALONE = torch.tensor([5.0, 0.0, 0.0, 0.0])
COUNTED_ALONE = {**COUNTED, "lm_ce": ALONE, "notes": ALONE, "block_start": torch.tensor([1.0, 0.0, 0.0, 0.0])}
"""The same with `other_weight=0`."""


def four_tokens(logits, weights=WEIGHTS):
    """Passes over four tokens with given logits of the student, and of the passes that learn beside it."""
    made = ChunkedLogits(logits, torch.nn.Identity(), 3, remade=False)
    targets = Targets(torch.zeros(4).long(), torch.tensor([0, 1, 2, 9]), SIBLING, FEASIBLE, weights)
    teacher = torch.stack([torch.zeros(4), torch.tensor([0.3, 1.0, 2.0, 3.0])], dim=1)
    return BranchOutputs(
        PDTOutput(logits=made),
        targets,
        teacher=PDTOutput(logits=made),
        aim=teacher,
        trunk=2 * teacher,
        stale=-teacher,
        buckets=ChunkedLogits(logits + torch.tensor([0.0, 1.0]), torch.nn.Identity(), 3, remade=True),
        silent_ce_M=torch.zeros(4),
    )


@pytest.mark.parametrize(("weights", "counted"), [(WEIGHTS, COUNTED), (ALONE, COUNTED_ALONE)], ids=["all", "alone"])
@pytest.mark.parametrize("loss", COUNTED)
def test_a_loss_is_the_mean_over_its_tokens(tmp_path, loss, weights, counted):
    logits = torch.zeros(4, 2, requires_grad=True)
    branches, temperature = four_tokens(logits, weights), 2.0
    inputs = {"input_ids": torch.zeros(1, 1), "item_ids": torch.zeros(1, 1, 1)}
    arguments = make_arguments(tmp_path, kd_temperature=temperature, block_start_tokens=4)
    value = loss_parts(branches, inputs, Stage("a", 1, ("snc",), {loss: 1.0}), arguments)[loss]

    values = {
        "kd": token_kl(logits, branches.aim, temperature),
        "keep_close": token_kl(logits, branches.trunk),
        "stab": token_kl(logits, branches.stale, temperature),
        "plan_snapshot": token_kl(logits + torch.tensor([0.0, 1.0]), logits),
    }.get(loss, token_ce(logits, branches.targets.tokens_M))
    expected = (values * counted[loss]).sum() / counted[loss].sum()
    if loss == "use":
        expected = expected + arguments.usage_margin
    torch.testing.assert_close(value, expected)
    value.backward()
    assert ((logits.grad.abs().sum(dim=1) > 0) == (counted[loss] > 0)).all()
