import pytest
import torch

from trainer_pdt import losses
from trainer_pdt.curriculum import LOSS_NAMES, METRIC_NAMES
from trainer_pdt.losses import weighted_total


def test_total_by_hand():
    one, two = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    report = weighted_total({"kd": one, "cov": two}, {"kd": 0.5, "cov": 2.0})
    assert report.total.item() == 7.0
    report.total.backward()
    assert (one.grad.item(), two.grad.item()) == (0.5, 2.0)
    assert {name: part.item() for name, part in report.parts.items()} == {"kd": 2.0, "cov": 3.0}
    assert not any(part.requires_grad for part in report.parts.values())


def test_a_part_without_weight_is_logged_and_does_not_count():
    bad = torch.tensor(float("nan"), requires_grad=True)
    good = torch.tensor(1.0, requires_grad=True)
    report = weighted_total({"kd": good, "use": bad, "spec": bad}, {"kd": 1.0, "use": 0.0})
    report.total.backward()
    assert report.total.item() == 1.0 and bad.grad is None
    assert set(report.parts) == {"kd", "use", "spec"}


def test_a_weight_without_its_part_is_an_error():
    with pytest.raises(ValueError, match=r"\['cov'\].*\['kd'\]"):
        weighted_total({"kd": torch.tensor(1.0)}, {"kd": 1.0, "cov": 0.1})
    assert weighted_total({"kd": torch.tensor(1.0)}, {"kd": 1.0, "cov": 0.0}).total.item() == 1.0


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="at least one non-zero weight"):
        weighted_total({"kd": torch.tensor(1.0)}, {"kd": 0.0})


def test_every_name_of_the_curriculum_is_in_the_table():
    table = losses.__doc__
    assert all(f"| `{name}` |" in table for name in LOSS_NAMES)
    assert all(f"(`{name}`)" in table for name in METRIC_NAMES)
    assert table.count("\n| `") == len(LOSS_NAMES)


def test_all_public_names_exist():
    assert all(hasattr(losses, name) for name in losses.__all__)
