import math

import pytest
import torch

from trainer_pdt.losses import agreement_bce, balanced_weights, readiness_targets

LN2, LN4 = math.log(2), math.log(4)
LOGITS = torch.tensor([[0.0, 0.0, 0.0, math.log(3.0), 9.0]])  # losses ln 2 (x 3), ln 4 as a negative
TARGETS = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True, True, False]])


def test_balanced_loss_gives_each_class_half():
    assert agreement_bce(LOGITS, TARGETS, MASK).item() == pytest.approx((LN2 + LN4) / 2, rel=1e-5)
    weights = balanced_weights(TARGETS, MASK)
    assert weights[0].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0, 0.0])


def test_fixed_weight_by_hand():
    assert agreement_bce(LOGITS, TARGETS, MASK, negative_weight=1.0).item() == pytest.approx((3 * LN2 + LN4) / 4)
    assert agreement_bce(LOGITS, TARGETS, MASK, negative_weight=3.0).item() == pytest.approx((3 * LN2 + 3 * LN4) / 6)


def test_one_class_alone_is_a_plain_mean():
    assert agreement_bce(LOGITS, torch.ones(1, 5), MASK[:, [0, 1, 2, 4, 4]]).item() == pytest.approx(LN2)
    assert balanced_weights(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1.0, 1.0]]


def test_gradient_reaches_labelled_blocks_only():
    logits = LOGITS.clone().requires_grad_()
    agreement_bce(logits, TARGETS, MASK).backward()
    assert (logits.grad != 0).tolist() == MASK.tolist()


@pytest.mark.parametrize("negative_weight", [None, 2.0])
def test_no_labelled_block_is_zero_with_a_graph(negative_weight):
    logits = LOGITS.clone().requires_grad_()
    value = agreement_bce(logits, TARGETS, torch.zeros_like(MASK), negative_weight)
    assert value.item() == 0.0
    value.backward()
    assert logits.grad.abs().sum() == 0


def test_readiness_targets():
    corrupted = torch.tensor([[True, False, True]])
    targets, mask = readiness_targets(corrupted, torch.tensor([[True, True, False]]))
    assert targets.tolist() == [[0.0, 1.0, 0.0]]
    assert mask.tolist() == [[True, True, False]]


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="negative_weight=0"):
        agreement_bce(LOGITS, TARGETS, MASK, negative_weight=0)
    with pytest.raises(ValueError, match="labelled_RK has shape"):
        readiness_targets(torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
