"""A run that was interrupted anywhere and resumed equals the uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_model, make_trainer, weights

ROOT = Path(__file__).resolve().parents[2]
STAGES = [
    {**BUS_STAGE, "until": 0.5, "bus_mix": 0.5, "note_drop": 0.2, "note_noise": 0.1, "note_swap": 0.3},
    HEAD_STAGE,
]
SETTINGS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
RUN = """
import sys
from tests.invariants.test_resume import SETTINGS, STAGES
from tests.tiny_training import make_trainer
trainer = make_trainer(sys.argv[1], STAGES, **SETTINGS)
from transformers.trainer_utils import get_last_checkpoint
trainer.train(resume_from_checkpoint=get_last_checkpoint(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = make_model()
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), STAGES, model, **SETTINGS)
    trainer.train()
    return weights(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("step", [2, 4, 5])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, step):
    expected, losses, whole = uninterrupted
    model = make_model(seed=9)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(
            model.peft.named_parameters(), whole.model.peft.named_parameters(), strict=True
        ):
            if not theirs.requires_grad:
                mine.copy_(theirs)
    trainer = make_trainer(tmp_path, STAGES, model, **SETTINGS)
    trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
    assert losses_of(trainer) == losses
    for name, value in weights(model).items():
        assert torch.equal(value, expected[name]), name


def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted):
    expected, losses, _ = uninterrupted
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (tmp_path / "checkpoint-2").is_dir():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = get_last_checkpoint(str(tmp_path))
    assert last is not None
    model = make_model()
    trainer = make_trainer(tmp_path, STAGES, model, **SETTINGS)
    trainer.train(resume_from_checkpoint=last)
    assert losses_of(trainer) == losses
    for name, value in weights(model).items():
        assert torch.equal(value, expected[name]), name
    assert not list(tmp_path.glob(".saving-*"))
