"""A run that was interrupted anywhere and resumed equals the uninterrupted one, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_model, make_trainer, weights
from trainer_pdt.checkpoints import check_complete, find_checkpoints
from trainer_pdt.telemetry import read_json

STAGES = [
    {**BUS_STAGE, "until": 0.5, "bus_mix": 0.5, "note_drop": 0.2, "note_noise": 0.1, "note_swap": 0.3},
    HEAD_STAGE,
]
SETTINGS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
KILLED = {**SETTINGS, "save_total_limit": 2}
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}
"""Audit events that write, move or delete files; a process can be killed right before any of them."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = make_model()
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), STAGES, model, **SETTINGS)
    trainer.train()
    return weights(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 5))])
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


def train_once(folder: str, world: int, rank: int, port: int, touch: int, touches: Path | None) -> None:
    """
    One process of a run that continues in its folder.

    Args:
        folder, world, rank, port: Of the run; `port` is free.
        touch: The process kills itself before it touches the run's files for this time; 0 = never.
        touches: File that receives how often the first process touched them, if wanted.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    count = 0

    def kill_at_touch(event, arguments):
        nonlocal count
        if event in TOUCHES and (event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(folder)):
            count += 1
            if count == touch:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(folder, STAGES, **KILLED)
    assert trainer.args.world_size == world
    sys.addaudithook(kill_at_touch)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    if touches is not None and rank == 0:
        touches.write_text(str(count))


def run(folder: Path, world: int = 1, touch: int = 0, seconds: float = 300.0, touches: Path | None = None) -> bool:
    """Runs the processes of a run until they end, one is killed or `seconds` are over; whether all ended well."""
    folder.mkdir(exist_ok=True)
    # Its processes start with everything imported.
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=train_once, args=(str(folder), world, rank, port, 0 if rank else touch, touches))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and {process.exitcode for process in processes} in ({None}, {None, 0}):
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.join()
    return all(process.exitcode == 0 for process in processes)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Final weights and all losses."""
    last = folder / "checkpoint-8"
    state = load_file(last / "adapter" / "adapter_model.safetensors")
    return state, [entry["loss"] for entry in read_json(last / "trainer_state.json")["log_history"] if "loss" in entry]


def check_same(folder: Path, expected: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    """The run of a folder ended as the expected one did, and left nothing half done."""
    state, losses = outcome(folder)
    assert losses == expected[1]
    assert state.keys() == expected[0].keys()
    for name, value in state.items():
        assert torch.equal(value, expected[0][name]), name
    assert list(find_checkpoints(folder)) == [4, 7, 8]
    assert not list(folder.glob(".*checkpoint-*"))


def kill_and_resume(folder: Path, world: int, expected: tuple, **moment: float) -> None:
    """A run that is killed at a moment leaves whole checkpoints only, and goes on to the expected end."""
    run(folder, world, **moment)
    for step, checkpoint in find_checkpoints(folder).items():
        assert check_complete(str(checkpoint)) == step
    assert run(folder, world)
    check_same(folder, expected)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outcome of one undisturbed process, how often it touched the run's files, and its seconds."""
    folder = tmp_path_factory.mktemp("alone")
    started = time.monotonic()
    assert run(folder / "run", touches=folder / "touches")
    return outcome(folder / "run"), int((folder / "touches").read_text()), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.45, 0.8])
def test_killed_while_it_saves_and_resumed_equals_uninterrupted(tmp_path, alone, uninterrupted, share):
    expected, touches, _ = alone
    losses = uninterrupted[1]
    assert expected[1] == losses
    folder = tmp_path / "run"
    assert not run(folder, touch=int(share * touches))
    assert 0 < max(find_checkpoints(folder)) < 8
    kill_and_resume(folder, 1, expected, touch=1)


@pytest.mark.multi
def test_two_processes_killed_and_resumed_equal_uninterrupted(tmp_path):
    assert run(tmp_path / "whole", 2, touches=tmp_path / "touches")
    touches = int((tmp_path / "touches").read_text())
    assert (tmp_path / "whole" / "checkpoint-8" / "rng_state_1.pth").is_file()
    kill_and_resume(tmp_path / "killed", 2, outcome(tmp_path / "whole"), touch=int(0.6 * touches))


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_twenty_random_moments(tmp_path, world):
    started = time.monotonic()
    assert run(tmp_path / "whole", world, touches=tmp_path / "touches")
    seconds, touches = time.monotonic() - started, int((tmp_path / "touches").read_text())
    expected, draw = outcome(tmp_path / "whole"), random.Random(world)
    for index in range(20):
        # Half of them fall on a save or on the deletion of a checkpoint, half anywhere.
        moment = {"touch": draw.randint(1, touches)} if index % 2 else {"seconds": draw.uniform(0.1, 1.0) * seconds}
        kill_and_resume(tmp_path / "killed", world, expected, **moment)
        shutil.rmtree(tmp_path / "killed")
