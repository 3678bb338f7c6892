import math

import pytest
import torch

from trainer_pdt.losses import nli_violation, redundancy, spec_cosine, spec_kl, use_margin


def test_spec_by_hand():
    written = torch.tensor([[[[1.0, 0.0], [3.0, 4.0]], [[1.0, 0.0], [1.0, 0.0]]]])  # [1 row, 2 rounds, 2 notes, 2]
    encoded = torch.tensor([[[[2.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [-1.0, 0.0]]]])
    assert spec_cosine(written, encoded, torch.tensor([[True, False]])).item() == pytest.approx(1 - (1.0 + 0.6) / 2)
    assert spec_cosine(written, encoded, torch.tensor([[True, True]])).item() == pytest.approx((0.2 + 2.0) / 2)
    assert spec_cosine(encoded, 7 * encoded, torch.tensor([[True, True]])).item() == pytest.approx(0.0, abs=1e-6)


def test_spec_kl_by_hand():
    written = torch.log(torch.tensor([[[[0.5, 0.5]], [[0.9, 0.1]]]]))
    encoded = torch.log(torch.tensor([[[[0.75, 0.25]], [[0.9, 0.1]]]]))
    # ((.5 - .75) (ln .5 - ln .75) + (.5 - .25) (ln .5 - ln .25)) / 2 = .125 ln 3
    assert spec_kl(written, encoded, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.125 * math.log(3), rel=1e-5)
    weighted = spec_kl(written, encoded, torch.tensor([[0.5, 0.25]])).item()
    assert weighted == pytest.approx(0.125 * math.log(3) * 2 / 3, rel=1e-5)
    assert spec_kl(written, written.clone(), torch.ones(1, 2), temperature=0.3).item() == 0.0


def test_spec_kl_is_symmetric():
    one, other, weights = torch.randn(2, 3, 1, 5), torch.randn(2, 3, 1, 5), torch.rand(2, 3)
    assert spec_kl(one, other, weights).item() == pytest.approx(spec_kl(other, one, weights).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [spec_cosine, spec_kl])
def test_notes_of_the_encoder_get_no_gradient(loss):
    written = torch.randn(2, 3, 2, 4, requires_grad=True)
    encoded = torch.randn(2, 3, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss(written, encoded, mask).backward()
    assert encoded.grad is None
    assert torch.equal(written.grad.abs().sum(dim=(-1, -2)) > 0, mask)


@pytest.mark.parametrize("loss", [spec_cosine, spec_kl])
def test_no_block_is_zero_even_for_notes_that_are_zero(loss):
    written = torch.zeros(1, 2, 2, 4, requires_grad=True)
    value = loss(written, torch.zeros(1, 2, 2, 4), torch.zeros(1, 2))
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(written.grad, torch.zeros_like(written))


def test_use_by_hand():
    ce, without, weights = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.1]), torch.tensor([1.0, 1.0])
    assert use_margin(ce, without, weights, margin=0.5).item() == pytest.approx(0.2)
    assert use_margin(ce, without, weights, margin=0.3).item() == pytest.approx(0.0, abs=1e-6)
    assert use_margin(ce, without, torch.tensor([0.0, 1.0]), margin=0.5).item() == pytest.approx(0.4)
    assert use_margin(without, ce, weights, margin=0.0).item() == pytest.approx(0.3)


def test_use_cannot_be_lowered_by_a_worse_branch_without_notes():
    ce, without = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    use_margin(ce, without, torch.ones(2), margin=1.0).backward()
    assert without.grad is None
    assert ce.grad.tolist() == [0.5, 0.5]


def test_use_without_tokens_is_zero():
    ce = torch.ones(2, requires_grad=True)
    value = use_margin(ce, torch.ones(2), torch.zeros(2), margin=1.0)
    assert value.item() == 0.0
    value.backward()
    assert ce.grad.tolist() == [0.0, 0.0]


def test_redundancy_by_hand():
    notes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = redundancy(notes, torch.tensor([True, True, True]))
    assert value.item() == pytest.approx(0.3 / 3)
    value.backward()
    assert notes.grad.abs().max() < 1e-6
    leaning = torch.tensor([[1.0, 0.0], [2.0, 0.5], [0.0, 1.0]], requires_grad=True)
    redundancy(leaning, torch.tensor([True, True, True])).backward()
    assert (leaning.grad.abs().sum(dim=-1) > 1e-6).tolist() == [True, True, False]
    assert redundancy(notes, torch.tensor([True, True, False])).item() == pytest.approx(0.3)
    assert redundancy(notes, torch.tensor([True, False, False])).item() == 0.0
    stacked = redundancy(torch.stack([notes, notes]), torch.tensor([[True, True, False], [True, True, True]]))
    assert stacked.item() == pytest.approx((0.3 + 0.3) / 4)


def test_nli_by_hand():
    def scorer(premises, hypotheses):
        assert premises == ["a", "b"] and hypotheses == ["c", "d"]
        return torch.tensor([[0.9, 0.1], [0.2, 0.7]])

    assert nli_violation(scorer, ["a", "b"], ["c", "d"]).tolist() == pytest.approx([0.7, 0.0])
    assert nli_violation(scorer, ["a", "b"], ["c", "d"], margin=0.0).tolist() == pytest.approx([0.8, 0.0])
    assert nli_violation(scorer, [], []).shape == (0,)
    with pytest.raises(ValueError, match="hypotheses has 1 texts"):
        nli_violation(scorer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"margin=2 is out of range, allowed: 0 to 1"):
        nli_violation(scorer, ["a", "b"], ["c", "d"], margin=2)
    with pytest.raises(ValueError, match=r"scorer returned shape \[2\]"):
        nli_violation(lambda *_: torch.zeros(2), ["a", "b"], ["c", "d"])


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="temperature=-1"):
        spec_kl(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.ones(1, 1), temperature=-1)
    with pytest.raises(ValueError, match="margin=-1"):
        use_margin(torch.zeros(1), torch.zeros(1), torch.ones(1), margin=-1)
