import math

import pytest
import torch

from trainer_pdt.losses import block_start_ce, kd_lm, keep_close, lm_ce, token_ce, token_kl, top_k_teacher

HALF = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
OTHER = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
TARGETS = torch.tensor([0, 1])


def test_lm_ce_by_hand():
    by_token = [-math.log(0.5), -math.log(0.8)]
    assert token_ce(HALF, TARGETS).tolist() == pytest.approx(by_token)
    weighted = lm_ce(HALF, TARGETS, torch.tensor([5.0, 1.0])).item()
    assert weighted == pytest.approx((5 * by_token[0] + by_token[1]) / 6)


def test_kd_by_hand():
    # KL(p || q) for p = (.25, .5, .25), q = (.5, .25, .25): .25 ln .5 + .5 ln 2 = .25 ln 2; the second token is equal.
    value = kd_lm(HALF, OTHER, torch.ones(2))
    assert value.item() == pytest.approx(0.125 * math.log(2), rel=1e-5)
    assert kd_lm(HALF, OTHER, torch.tensor([3.0, 1.0])).item() == pytest.approx(0.1875 * math.log(2), rel=1e-5)


def test_kd_with_temperature_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd_lm(student, teacher, torch.ones(1), temperature=2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kd_of_equal_logits_is_zero(temperature):
    logits = torch.randn(7, 11)
    assert kd_lm(logits, logits.clone(), torch.ones(7), temperature).item() == 0.0
    assert kd_lm(logits, top_k_teacher(logits, 4, temperature), torch.ones(7), temperature).item() == 0.0
    assert keep_close(logits, logits.clone(), torch.ones(7, dtype=torch.bool)).item() == 0.0


def test_top_k_teacher_by_hand():
    teacher = top_k_teacher(torch.log(torch.tensor([[0.1, 0.6, 0.2, 0.1]])), k=1)
    assert teacher.indices_Mk.tolist() == [[1]]
    assert teacher.log_probs_MC.exp()[0].tolist() == pytest.approx([0.6, 0.4])
    student = torch.log(torch.tensor([[0.3, 0.3, 0.3, 0.1]]))
    expected = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert kd_lm(student, teacher, torch.ones(1)).item() == pytest.approx(expected, rel=1e-5)


def test_top_k_with_all_but_one_token_equals_the_full_kd():
    torch.manual_seed(0)
    student, teacher, weights = torch.randn(5, 9), torch.randn(5, 9), torch.rand(5)
    full = kd_lm(student, teacher, weights, 1.5)
    assert kd_lm(student, top_k_teacher(teacher, 8, 1.5), weights, 1.5).item() == pytest.approx(full.item(), rel=1e-5)
    assert kd_lm(student, top_k_teacher(teacher, 2, 1.5), weights, 1.5) < full


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


def test_keep_close_counts_only_unmasked_tokens():
    assert keep_close(HALF, OTHER, torch.tensor([False, True])).item() == pytest.approx(0.0, abs=1e-7)
    assert keep_close(HALF, OTHER, torch.tensor([True, False])).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)


def test_keep_close_is_the_kl_of_the_trunk_to_the_model():
    model, trunk = torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.5, 0.5]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert keep_close(model, trunk, torch.tensor([True])).item() == pytest.approx(expected, rel=1e-5)


def test_block_start_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.2, 0.8]]))
    targets, offsets = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, -1])
    assert block_start_ce(logits, targets, offsets, count=1).item() == pytest.approx(math.log(2))
    assert block_start_ce(logits, targets, offsets, count=2).item() == pytest.approx(1.5 * math.log(2))


def calls(student, teacher):
    targets, weights = torch.zeros(len(student), dtype=torch.long), torch.ones(len(student))
    return {
        "lm_ce": lm_ce(student, targets, weights),
        "kd": kd_lm(student, teacher, weights),
        "kd_top_k": kd_lm(student, top_k_teacher(teacher, 2), weights),
        "keep_close": keep_close(student, teacher, weights.bool()),
        "block_start": block_start_ce(student, targets, torch.zeros_like(targets), 1),
    }


@pytest.mark.parametrize("name", ["lm_ce", "kd", "kd_top_k", "keep_close", "block_start"])
def test_gradient_reaches_the_student_and_never_the_teacher(name):
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    calls(student, teacher)[name].backward()
    assert student.grad.abs().sum(dim=-1).min() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["lm_ce", "kd", "kd_top_k", "keep_close", "block_start"])
def test_no_token_is_zero_with_a_graph(name):
    student = torch.zeros(0, 6, requires_grad=True)
    value = calls(student, torch.zeros(0, 6))[name]
    assert value.item() == 0.0
    value.backward()


def test_all_masked_is_zero_with_a_graph():
    student = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3)
    total = (
        lm_ce(student, torch.zeros(3, dtype=torch.long), none)
        + kd_lm(student, torch.randn(3, 4), none)
        + keep_close(student, torch.randn(3, 4), none.bool())
        + block_start_ce(student, torch.zeros(3, dtype=torch.long), torch.full((3,), -1), 2)
    )
    assert total.item() == 0.0
    total.backward()
    assert student.grad.abs().sum() == 0.0


def test_low_precision_logits_are_read_in_float32():
    assert kd_lm(torch.randn(2, 5).bfloat16(), torch.randn(2, 5).bfloat16(), torch.ones(2)).dtype == torch.float32


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
        block_start_ce(HALF, TARGETS, TARGETS, 0)
