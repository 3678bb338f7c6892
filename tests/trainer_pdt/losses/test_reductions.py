import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_pdt.losses import (
    IGNORE_INDEX,
    masked_mean,
    shift_and_mask,
    supervised_positions,
    supervised_values,
    weighted_mean,
)


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0], [4.0, 100.0]])
    assert masked_mean(values, torch.tensor([[True, True], [True, False]])).item() == pytest.approx(7 / 3)


def test_masked_mean_divides_by_at_least_one_and_weighted_mean_by_the_weights():
    values, weights = torch.tensor([2.0, 6.0]), torch.tensor([0.25, 0.25])
    assert masked_mean(values, weights).item() == pytest.approx(2.0)
    assert weighted_mean(values, weights).item() == pytest.approx(4.0)


@pytest.mark.parametrize("mean", [masked_mean, weighted_mean])
def test_nothing_to_average_is_zero_with_a_graph(mean):
    values = torch.tensor([float("nan"), float("inf")], requires_grad=True)
    result = mean(values, torch.zeros(2))
    assert result.item() == 0.0
    result.backward()
    assert values.grad.tolist() == [0.0, 0.0]
    empty = torch.zeros(0, requires_grad=True)
    assert mean(empty, torch.zeros(0)).item() == 0.0
    assert mean(empty, torch.zeros(0)).requires_grad


@pytest.mark.parametrize("mean", [masked_mean, weighted_mean])
def test_a_mask_of_another_shape_is_an_error(mean):
    with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
        mean(torch.zeros(3), torch.ones(2))


def test_shift_and_mask_by_hand():
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 2, 1], [IGNORE_INDEX, 0, IGNORE_INDEX, IGNORE_INDEX]])
    weights = torch.tensor([[9.0, 9.0, 1.0, 5.0], [9.0, 2.0, 9.0, 9.0]])
    chosen, targets, chosen_weights = shift_and_mask(logits, labels, weights)
    assert torch.equal(chosen, torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]))
    assert targets.tolist() == [2, 1, 0]
    assert chosen_weights.tolist() == [1.0, 5.0, 2.0]
    assert shift_and_mask(logits, labels)[2].tolist() == [1.0, 1.0, 1.0]


def test_the_first_token_is_never_a_target():
    labels = torch.tensor([[1, IGNORE_INDEX]])
    assert shift_and_mask(torch.zeros(1, 2, 3), labels)[1].numel() == 0
    assert supervised_positions(labels).tolist() == [[False, False]]


def test_prompt_and_padding_get_no_gradient():
    logits = torch.randn(1, 5, 3, requires_grad=True)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 1, 2, IGNORE_INDEX]])
    shift_and_mask(logits, labels)[0].sum().backward()
    assert logits.grad[0, :, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"logits_RTV has shape \[1, 4, 3\]"):
        shift_and_mask(torch.zeros(1, 4, 3), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="values_RT"):
        supervised_values(torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.long))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 6),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    seed=st.integers(0),
)
def test_padding_on_either_side_changes_nothing(rows, tokens, left, right, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    logits = torch.randn(rows, tokens, 4, generator=generator)
    labels = torch.randint(0, 4, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.4] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    weights = torch.rand(rows, tokens, generator=generator)
    plain = shift_and_mask(logits, labels, weights)
    padded = shift_and_mask(
        torch.nn.functional.pad(logits, (0, 0, left, right)),
        torch.nn.functional.pad(labels, (left, right), value=IGNORE_INDEX),
        torch.nn.functional.pad(weights, (left, right)),
    )
    for one, other in zip(plain, padded, strict=True):
        assert torch.equal(one, other)
    assert len(plain[0]) == supervised_positions(labels).sum()
