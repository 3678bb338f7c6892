import math

import pytest
import torch

from trainer_pdt.losses import block_start_ce, token_ce, token_kl, top_k_teacher

HALF = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
OTHER = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
TARGETS = torch.tensor([0, 1])


def test_cross_entropy_by_hand():
    assert token_ce(HALF, TARGETS).tolist() == pytest.approx([-math.log(0.5), -math.log(0.8)])


def test_divergence_by_hand():
    # KL(p || q) for p = (.25, .5, .25), q = (.5, .25, .25): .25 ln .5 + .5 ln 2 = .25 ln 2; the second token is equal.
    assert token_kl(HALF, OTHER).tolist() == pytest.approx([0.25 * math.log(2), 0.0], rel=1e-5, abs=1e-7)


def test_divergence_with_temperature_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert token_kl(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_divergence_is_of_the_student_from_the_teacher():
    student, teacher = torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.5, 0.5]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_of_equal_logits_is_zero(temperature):
    logits = torch.randn(7, 11)
    for teacher in (logits.clone(), top_k_teacher(logits, 4, temperature)):
        assert token_kl(logits, teacher, temperature).abs().max() == 0.0


def test_top_k_teacher_by_hand():
    teacher = top_k_teacher(torch.log(torch.tensor([[0.1, 0.6, 0.2, 0.1]])), k=1)
    assert teacher.indices_Mk.tolist() == [[1]]
    assert teacher.log_probs_MC.exp()[0].tolist() == pytest.approx([0.6, 0.4])
    student = torch.log(torch.tensor([[0.3, 0.3, 0.3, 0.1]]))
    expected = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert token_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_top_k_with_all_but_one_token_equals_the_full_divergence():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    full = token_kl(student, teacher, 1.5)
    torch.testing.assert_close(token_kl(student, top_k_teacher(teacher, 8, 1.5), 1.5), full)
    assert (token_kl(student, top_k_teacher(teacher, 2, 1.5), 1.5) < full).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_top_k_is_that_of_the_sum_of_all_other_tokens(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9, requires_grad=True), top_k_teacher(torch.randn(5, 9), 3, temperature)
    probs = (student / temperature).softmax(dim=-1)
    best = probs.gather(1, teacher.indices_Mk)
    rest = probs.scatter(1, teacher.indices_Mk, 0.0).sum(dim=-1, keepdim=True)
    student_log_probs, target = torch.cat([best, rest], dim=-1).log(), teacher.log_probs_MC
    by_hand = temperature**2 * (target.exp() * (target - student_log_probs)).sum(dim=-1)
    value = token_kl(student, teacher, temperature)
    torch.testing.assert_close(value, by_hand)
    weights = torch.rand(5)
    found, expected = (torch.autograd.grad((kl * weights).sum(), student)[0] for kl in (value, by_hand))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-2


def test_block_start_by_hand():
    ce, offsets = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 2, -1])
    assert block_start_ce(ce, offsets, count=1).item() == 1.0
    assert block_start_ce(ce, offsets, count=2).item() == 1.5
    assert block_start_ce(ce, torch.full((4,), -1), count=2).item() == 0.0


VALUES = {
    "ce": lambda student, teacher: token_ce(student, torch.zeros(len(student), dtype=torch.long)),
    "kl": lambda student, teacher: token_kl(student, teacher),
    "kl_top_k": lambda student, teacher: token_kl(student, top_k_teacher(teacher, 2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_gradient_reaches_the_student_and_never_the_teacher(name):
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    VALUES[name](student, teacher).sum().backward()
    assert student.grad.abs().sum(dim=-1).min() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", VALUES)
def test_no_token_has_no_value_and_a_graph(name):
    student = torch.zeros(0, 6, requires_grad=True)
    values = VALUES[name](student, torch.zeros(0, 6))
    assert values.shape == (0,)
    values.sum().backward()


@pytest.mark.parametrize("name", VALUES)
def test_low_precision_logits_are_read_in_float32(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5).bfloat16().requires_grad_(), torch.randn(2, 5).bfloat16()
    values = VALUES[name](student, teacher)
    torch.testing.assert_close(values, VALUES[name](student.float(), teacher.float()), rtol=0, atol=0)
    values.sum().backward()
    assert student.grad.dtype == torch.bfloat16


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"temperature=0.0 .* above 0"):
        token_kl(HALF, OTHER, 0.0)
    with pytest.raises(ValueError, match=r"k=3 .* 1 to vocabulary - 1 = 2"):
        top_k_teacher(HALF, 3)
    with pytest.raises(ValueError, match=r"temperature=1.0 differs .* allowed: 2.0"):
        token_kl(HALF, top_k_teacher(OTHER, 2, 2.0))
    with pytest.raises(ValueError, match="teacher has shape"):
        token_kl(HALF, OTHER[:1])
    with pytest.raises(ValueError, match="count=0"):
        block_start_ce(HALF[0], TARGETS, 0)
