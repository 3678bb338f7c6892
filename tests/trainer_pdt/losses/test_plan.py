import math

import pytest
import torch

from trainer_pdt.losses import coverage_bce, kd_plan, planner_ce, stream_ce


def test_planner_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]])).requires_grad_()
    value = planner_ce(logits, torch.tensor([[0, 0, -100]]))
    assert value.item() == pytest.approx(1.5 * math.log(2))
    value.backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).tolist() == [[True, True, False]]


def test_kd_plan_by_hand():
    student = torch.log(torch.tensor([[[0.5, 0.5], [0.3, 0.7]]])).requires_grad_()
    teacher = torch.log(torch.tensor([[[0.75, 0.25], [0.9, 0.1]]])).requires_grad_()
    value = kd_plan(student, teacher, torch.tensor([[True, False]]))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    value.backward()
    assert teacher.grad is None
    assert (student.grad.abs().sum(dim=-1) > 0).tolist() == [[True, False]]
    assert kd_plan(student, student.clone(), torch.tensor([[True, True]]), temperature=2.0).item() == 0.0


def test_coverage_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0), 50.0]]], requires_grad=True)
    targets, mask = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[True, True, False]]])
    value = coverage_bce(logits, targets, mask)
    assert value.item() == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-5)
    value.backward()
    assert (logits.grad != 0).tolist() == [[[True, True, False]]]
    heavy = coverage_bce(logits, targets, mask, pos_weight=3.0)
    assert heavy.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 2, rel=1e-5)


def test_stream_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])).requires_grad_()
    value = stream_ce(logits, torch.tensor([0, 1, -1]))
    assert value.item() == pytest.approx((math.log(2) - math.log(0.75)) / 2, rel=1e-5)
    value.backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).tolist() == [True, True, False]
    by_round = stream_ce(logits.unsqueeze(1), torch.tensor([[0], [1], [-1]]))
    assert by_round.item() == pytest.approx(value.item())


def test_all_masked_is_zero_with_a_graph():
    slots, items, streams = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4), (2, 3, 4), (5, 3)))
    total = (
        planner_ce(slots, torch.full((2, 3), -100))
        + kd_plan(slots, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
        + coverage_bce(items, torch.ones(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool), pos_weight=2.0)
        + stream_ce(streams, torch.full((5,), -1))
    )
    assert total.item() == 0.0
    total.backward()
    assert all(tensor.grad.abs().sum() == 0 for tensor in (slots, items, streams))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"pos_weight=0.0 .* above 0"):
        coverage_bce(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1), pos_weight=0.0)
