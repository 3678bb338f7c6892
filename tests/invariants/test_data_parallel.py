"""Two processes on gloo: half of the documents each, one set of weights, each evaluated document counted once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_features, make_model, make_trainer, weights

ROOT = Path(__file__).resolve().parents[2]
STAGES = [{**BUS_STAGE, "losses": {"lm_ce": 1.0, "notes": 0.5, "keep_close": 0.1}, "until": 0.5}, HEAD_STAGE]
EVALUATED = (1, 3, 5, 8)
"""Documents per evaluation; two processes with batches of 2 fill all but the last up with documents once more."""


def main(folder: str, deepspeed: str | None = None, checkpoint: str | None = None) -> None:
    """One process of the run: trains, and writes its weights, losses, metrics and world size."""
    model = make_model()
    choices = {} if deepspeed is None else {"deepspeed": deepspeed}
    if checkpoint is not None:
        with torch.no_grad():
            for parameter in model.pdt_parameters().values():
                parameter.add_(1.0)
    trainer = make_trainer(folder, STAGES, model, max_steps=4, save_strategy="steps", save_steps=1, **choices)
    trainer.train(resume_from_checkpoint=checkpoint)
    rank = trainer.args.process_index
    if deepspeed is None:
        state = {name: value.contiguous() for name, value in weights(model).items()}
        save_file(state, f"{folder}/rank{rank}.safetensors")
    metrics = {count: trainer.evaluate(make_features(count, split="validation")) for count in EVALUATED}
    logs = [{key: entry[key] for key in entry if "loss" in key} for entry in trainer.state.log_history]
    wrapped = type(trainer.model_wrapped).__name__
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({"world": trainer.args.world_size, "wrapped": wrapped, "logs": logs, "metrics": metrics})
    )


def launch(folder: Path, *arguments: str, script: str = __file__) -> subprocess.CompletedProcess:
    """Runs the `main` of a script in two processes."""
    # The recipe's use_cpu is enough; ACCELERATE_USE_CPU would turn DeepSpeed off without a word.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
    environment.pop("ACCELERATE_USE_CPU", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if not arguments:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [script, str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.multi
def test_two_processes_train_one_model(tmp_path):
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    states = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert [report["world"] for report in reports] == [2, 2]
    assert [report["wrapped"] for report in reports] == ["DistributedDataParallel"] * 2
    assert reports[0]["logs"] == reports[1]["logs"]
    start = weights(make_model())
    assert any(not torch.equal(states[0][name], start[name]) for name in start)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert (tmp_path / "checkpoint-4" / "complete.json").is_file()
    check_metrics([report["metrics"] for report in reports], states[0], tmp_path)


def check_metrics(reports: list[dict], state: dict[str, torch.Tensor], folder: Path) -> None:
    """Metrics of both processes are those of one process that sees every document once."""
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.pdt_parameters().items():
            parameter.copy_(state[name])
    alone = make_trainer(folder / "alone", STAGES, model, max_steps=4)
    for count in EVALUATED:
        expected = alone.evaluate(make_features(count, split="validation"))
        keys = [key for key in expected if "sibling" in key or "other" in key or key == "eval_loss"]
        assert len(keys) > 5
        for metrics in reports:
            assert {key: metrics[str(count)][key] for key in keys} == pytest.approx(
                {key: expected[key] for key in keys}, abs=1e-5
            ), count


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_data_parallel_does_and_resumes_without_the_trunk(tmp_path, stage):
    settings = {
        # The second field counts in ZeRO-3 alone: there, small parameters are not sharded by default.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    config, middle = tmp_path / "ds.json", tmp_path / "zero" / "checkpoint-3"
    config.write_text(json.dumps(settings))
    states, logs = {}, {}
    for name, arguments in (("ddp", []), ("zero", [config]), ("resumed", [config, middle])):
        folder = tmp_path / name
        folder.mkdir()
        done = launch(folder, *map(str, arguments))
        # ZeRO-3 processes may abort after everything is written; what counts is what they wrote.
        assert (folder / "rank1.json").is_file(), done.stderr[-3000:]
        states[name] = load_file(folder / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
        report = json.loads((folder / "rank0.json").read_text())
        assert report["wrapped"] == ("DistributedDataParallel" if name == "ddp" else "DeepSpeedEngine")
        assert report["world"] == 2
        logs[name] = report["logs"]
    assert states["ddp"].keys() == states["zero"].keys()
    for name, value in states["ddp"].items():
        assert torch.allclose(value, states["zero"][name], atol=1e-4), name
        # Not always the same bits: matrix products depend on where in memory the partitions lie.
        assert torch.allclose(states["zero"][name], states["resumed"][name], rtol=0, atol=1e-6), name
    for resumed, whole in zip(training_losses(logs["resumed"]), training_losses(logs["zero"]), strict=True):
        assert resumed == pytest.approx(whole, abs=1e-5)
    check_no_trunk(middle)


def training_losses(logs: list[dict]) -> list[dict]:
    """Logged losses of the training steps."""
    return [entry for entry in logs if "loss" in entry]


def check_no_trunk(checkpoint: Path) -> None:
    """DeepSpeed's files of a checkpoint hold what learns, and no tensor of the trunk by name or by size."""
    model = make_model()
    learns = {f"peft.{name}": parameter.numel() for name, parameter in model.pdt_parameters().items()}
    files = list(checkpoint.rglob("*model_states.pt"))
    assert files
    for file in files:
        state = torch.load(file, weights_only=False)
        assert state["module"].keys() == learns.keys(), file
        assert sum(tensor.numel() for tensor in state["module"].values()) <= sum(learns.values()), file
        assert not state.get("frozen_param_fragments"), file


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
