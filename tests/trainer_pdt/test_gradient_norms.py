"""Gradient norms by loss: equal to separate gradients, masks of frozen groups, and a course of training left alone."""

import json

import pytest
import torch

from tests.tiny_training import BUS_STAGE, make_model, make_trainer, weights
from trainer_pdt import trainer as trainer_module
from trainer_pdt.gradient_norms import GradientNormLog, norms_by_group

STAGE = {
    **BUS_STAGE,
    "train": ["snc", "stream_adapters", "encoder"],
    "losses": {"lm_ce": 1.0, "keep_close": 0.5, "spec": 0.25, "cov": 1.0},
}


def lines(folder, step=0):
    file = folder / f"gradient_norms_from_{step}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_norms_by_hand():
    gradients = [torch.tensor([3.0, 4.0]), None, torch.tensor([[12.0]]), None]
    assert norms_by_group(gradients, ["snc", "snc", "writer", "planner"]) == {"all": 13.0, "snc": 5.0, "writer": 12.0}
    assert norms_by_group([None], ["snc"]) == {"all": 0.0}


def test_a_weighted_loss_and_the_sum_of_all(tmp_path):
    model = make_model()
    parameters = {name: p for name, p in model.pdt_parameters().items() if "gate" in name or "writer" in name}
    gate = next(p for name, p in parameters.items() if "gate" in name)
    writer = next(p for name, p in parameters.items() if "writer" in name)
    parts = {"lm_ce": 3 * gate.sum(), "keep_close": gate.sum() - 8 * writer.flatten()[0]}
    log = GradientNormLog(tmp_path / "run", 10)
    log.write(20, "bus", {"lm_ce": 2.0, "keep_close": 0.5, "use": 0.0}, parts, parameters)
    (line,) = lines(tmp_path / "run", 20)
    assert (line["step"], line["stage"]) == (20, "bus")
    root = gate.numel() ** 0.5
    assert line["losses"]["lm_ce"] == pytest.approx({"weight": 2.0, "all": 6 * root, "snc": 6 * root})
    assert line["losses"]["keep_close"]["writer"] == pytest.approx(4)
    assert line["total"]["snc"] == pytest.approx(6.5 * root) and line["total"]["writer"] == pytest.approx(4)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_file_takes_the_place_of_those_that_begin_later(tmp_path):
    # A run that went on from before them showed what another course had measured from there on.
    gate = torch.nn.Parameter(torch.ones(1))
    for step in (5, 30, 10):
        log = GradientNormLog(tmp_path, 5)
        log.write(step, "bus", {"lm_ce": 1.0}, {"lm_ce": 2 * gate.sum()}, {"pdt_snc.0.gate.logit": gate})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gradient_norms_from_10.jsonl",
        "gradient_norms_from_5.jsonl",
    ]


def test_due_and_bounds(tmp_path):
    log = GradientNormLog(tmp_path, 5)
    assert [step for step in range(11) if log.is_due(step, 0)] == [0, 5, 10] and not log.is_due(5, 1)
    with pytest.raises(ValueError, match="every=0, allowed: at least 1"):
        GradientNormLog(tmp_path, 0)


@pytest.mark.slow
def test_training_takes_the_same_course(tmp_path, monkeypatch):
    """The trainer's own losses, measured where it weighs them; clipping and a frozen writer included."""
    plain = make_trainer(tmp_path / "plain", [STAGE], max_steps=3)
    plain.train()
    measured = make_trainer(tmp_path / "measured", [STAGE], max_steps=3, log_gradient_norms=1)
    total = trainer_module.weighted_total
    separate = []

    def spy(parts, losses):
        parameters = measured.model.pdt_parameters()
        found = torch.autograd.grad(
            parts["keep_close"], list(parameters.values()), retain_graph=True, allow_unused=True
        )
        separate.append(0.5 * float(torch.stack([g.norm() for g in found if g is not None]).norm()))
        return total(parts, losses)

    monkeypatch.setattr(trainer_module, "weighted_total", spy)
    measured.train()
    for name, value in weights(plain.model).items():
        assert torch.equal(value, weights(measured.model)[name]), name
    assert not list((tmp_path / "plain").glob("*.jsonl"))
    found = lines(tmp_path / "measured")
    assert [line["step"] for line in found] == [0, 1, 2]
    logs = [entry for entry in measured.state.log_history if "grad_norm" in entry]
    for line, keep_close, entry in zip(found, separate, logs, strict=True):
        assert line["losses"]["keep_close"]["all"] == pytest.approx(keep_close, rel=1e-5)
        # One micro-batch per step and one process: the sum is the step's gradient before clipping.
        assert line["total"]["all"] == pytest.approx(entry["grad_norm"], rel=1e-4)
        assert line["losses"]["lm_ce"]["snc"] > 0 and line["losses"]["lm_ce"].get("writer", 0) == 0
        # `cov` trains through the plan items' encoder; its own head is frozen here.
        assert line["losses"]["cov"]["coverage"] == 0 < line["losses"]["cov"]["encoder"]
