"""One process, DDP, FSDP2 and ZeRO give the same losses and weights, and go on from each other's checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_model, make_trainer, weights
from trainer_pdt.recovery import check_layout
from trainer_pdt.sharding import is_trunk_sharded, shard_trunk

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
LOSSES = {"lm_ce": 1.0, "kd": 0.5, "notes": 0.5, "keep_close": 0.1, "spec": 0.1}
STAGES = [{**BUS_STAGE, "losses": LOSSES, "until": 0.5, "lag_jitter": 0.0}, HEAD_STAGE]
SETTINGS = {
    "max_steps": 4,
    # Adam divides gradients that are rounding alone by themselves; two runs of one process would differ.
    "adam_epsilon": 1e-5,
    "save_strategy": "steps",
    "save_steps": 1,
    "teacher_kind": "ema",
    "teacher_ema_decay": 0.5,
    "kd_top_k": 8,
    "logits_chunk": 16,
}
LIMITED = {"spectral_norm": 0.9}
"""Of the adapter: below the norms that its matrices start with."""

BALANCED = {
    **SETTINGS,
    "teacher_kind": "notes",
    "kd_balance_target": 0.5,
    "kd_balance_every": 1,
    "bf16": True,
    "activation_checkpointing": True,
    "gradient_accumulation_steps": 2,
}
ZERO = {
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def shard_on_the_cpu() -> None:
    """accelerate has FSDP for accelerators alone: only its word for what the processes are is changed here."""
    start = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **choices):
        start(self, *arguments, fsdp_plugin=fsdp_plugin, **choices)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin() if fsdp_plugin is None else fsdp_plugin

    AcceleratorState.__init__ = init


def main(runs: str) -> None:
    """One process: trains one model after the other, each with the folder, checkpoint and settings given as JSON."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    for run in json.loads(runs):
        model = make_model(**LIMITED)
        trainer = make_trainer(run["folder"], STAGES, model, **run["settings"])
        trainer.train(resume_from_checkpoint=run["checkpoint"])
        metrics = trainer.evaluate()
        sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        report = {
            "world": trainer.args.world_size,
            "wrapped": type(trainer.model_wrapped).__name__,
            "sharded": sharded,
            "loss": metrics["eval_loss"],
            "scale": None if trainer.balance is None else trainer.balance.scale,
            "sums": [float(value.double().sum()) for value in weights(model).values()],
        }
        Path(run["folder"], f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


def job(folder: Path, checkpoint: Path | None = None, **settings) -> dict:
    """What [`main`] is to do."""
    place = None if checkpoint is None else str(checkpoint)
    return {"folder": str(folder), "checkpoint": place, "settings": settings or SETTINGS}


def launch(configuration: str | None, *jobs: dict) -> list[dict]:
    """Runs jobs in two processes with a shipped launch configuration, or plainly; the first process's reports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
    environment.pop("ACCELERATE_USE_CPU", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if configuration is not None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / configuration)]
        command += ["--main_process_port", "0"]
    done = subprocess.run(
        [*command, __file__, json.dumps(jobs)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    reports = []
    for run in jobs:
        # ZeRO-3 processes may abort after everything is written; what counts is what they wrote.
        assert Path(run["folder"], "rank1.json").is_file(), done.stderr[-3000:]
        first, second = (json.loads(Path(run["folder"], f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        assert first["world"] == 2
        reports.append(first)
    return reports


def outcome(folder: Path, step: int = 4) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, averaged ones among them, and losses up to a step."""
    last = folder / f"checkpoint-{step}"
    state = load_file(last / "adapter" / "adapter_model.safetensors")
    averages = last / "ema.safetensors"
    if averages.is_file():
        state |= {f"average of {name}": value for name, value in load_file(averages).items()}
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return state, [entry["loss"] for entry in history if "loss" in entry]


def check_same(folder: Path, expected: Path) -> None:
    """Two runs ended with the same losses and weights."""
    (state, losses), (wanted, wanted_losses) = outcome(folder), outcome(expected)
    assert len(losses) == 4
    assert losses == pytest.approx(wanted_losses, abs=1e-5)
    configurations = [json.loads((run / "checkpoint-4" / "config.json").read_text()) for run in (folder, expected)]
    assert configurations[0] == configurations[1]
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        assert torch.allclose(value, wanted[name], rtol=0, atol=1e-5), name


def train_alone(folder: Path, checkpoint: Path | None = None, **settings) -> Path:
    """The same documents per step in one process: two micro-batches in place of two processes."""
    trainer = make_trainer(
        folder, STAGES, make_model(**LIMITED), **{**SETTINGS, **settings, "gradient_accumulation_steps": 2}
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    return train_alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.multi
def test_ddp_and_fsdp2_equal_one_process_and_each_goes_on_from_the_other(tmp_path, alone):
    layers = len(list(make_model().stack.base_layer.layers.parameters()))
    evaluated = []
    for name, wrapper, sharded in (("ddp", "DistributedDataParallel", 0), ("fsdp2", "FSDPPDT", layers)):
        whole, resumed, balanced = (tmp_path / name / run for run in ("whole", "resumed", "balanced"))
        jobs = job(whole), job(resumed, alone / "checkpoint-1"), job(balanced, **BALANCED)
        reports = launch(f"{name}.yaml", *jobs)
        for report in reports:
            assert report["wrapped"].startswith(wrapper)
            assert report["sharded"] == sharded
        assert reports[2]["scale"] not in (None, 1.0)
        check_same(whole, alone)
        check_same(resumed, alone)
        check_same(train_alone(tmp_path / name / "back", whole / "checkpoint-3"), alone)
        evaluated.append([report["loss"] for report in reports])
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    check_same(tmp_path / "fsdp2" / "balanced", tmp_path / "ddp" / "balanced")


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_and_their_checkpoints_are_not_exchanged(tmp_path, alone, stage):
    # The threshold counts in ZeRO-3 alone: there, small parameters are not sharded by default.
    zero = {**ZERO, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    folder = tmp_path / "zero"
    other = {**SETTINGS, "learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta2": 0.9}
    first, second = (
        job(folder, **SETTINGS, deepspeed=zero),
        job(tmp_path / "other", folder / "checkpoint-1", **other, deepspeed=zero),
    )
    assert [report["wrapped"] for report in launch(None, first, second)] == ["DeepSpeedEngine"] * 2
    check_same(folder, alone)
    # ZeRO loads what the optimizer's groups say too.
    check_same(tmp_path / "other", train_alone(tmp_path / "other_alone", alone / "checkpoint-1", **other))
    written, wrong = (
        str(folder / "checkpoint-1"),
        f"was written with ZeRO-{stage} on 2 processes, allowed: .* a run with ",
    )
    check_layout(written, stage, 2)
    with pytest.raises(ValueError, match=wrong + "one process, DDP or FSDP2"):
        train_alone(tmp_path / "back", folder / "checkpoint-1")
    for asked, processes in ((5 - stage, 2), (stage, 4)):
        with pytest.raises(ValueError, match=wrong + f"ZeRO-{asked} on {processes} processes"):
            check_layout(written, asked, processes)
    with pytest.raises(ValueError, match=r"was written with one process, DDP or FSDP2, allowed: .* with ZeRO"):
        check_layout(str(alone / "checkpoint-1"), stage, 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fsdp_version", 1),
        ("cpu_offload", CPUOffloadPolicy()),
        ("cpu_ram_efficient_loading", True),
        ("activation_checkpointing", True),
    ],
)
def test_options_of_fsdp_that_would_shard_or_wrap_more_are_refused(option, value):
    allowed = {
        "fsdp_version": 2,
        "cpu_offload": None,
        "cpu_ram_efficient_loading": False,
        "activation_checkpointing": False,
    }
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**allowed, option: value})))
    with pytest.raises(ValueError, match=f"{option}=(1|True), allowed: "):
        shard_trunk(make_model(), accelerator)


@pytest.mark.parametrize(("fsdp", "stage"), [(True, None), (False, 3)])
def test_gradient_norms_are_refused_where_one_process_cannot_go_backwards_alone(tmp_path, monkeypatch, fsdp, stage):
    accelerator = SimpleNamespace(
        is_fsdp2=fsdp, state=SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage))
    )
    assert is_trunk_sharded(accelerator)
    monkeypatch.setattr("trainer_pdt.recovery.is_trunk_sharded", lambda _: True)
    with pytest.raises(ValueError, match="log_gradient_norms=1, allowed with ZeRO-3 or FSDP2: none"):
        make_trainer(tmp_path, log_gradient_norms=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
