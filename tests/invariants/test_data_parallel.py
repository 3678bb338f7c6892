"""Two processes on gloo: both see half of the documents, and end with the same weights as one that sees all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_model, make_trainer, weights

ROOT = Path(__file__).resolve().parents[2]
STAGES = [{**BUS_STAGE, "losses": {"lm_ce": 1.0, "notes": 0.5, "keep_close": 0.1}, "until": 0.5}, HEAD_STAGE]


def main(folder: str, deepspeed: str | None = None) -> None:
    """One process of the run: trains, and writes its weights, losses and world size."""
    model = make_model()
    choices = {} if deepspeed is None else {"deepspeed": deepspeed}
    trainer = make_trainer(folder, STAGES, model, max_steps=4, save_strategy="steps", save_steps=2, **choices)
    trainer.train()
    rank = trainer.args.process_index
    if deepspeed is None:
        state = {name: value.contiguous() for name, value in weights(model).items()}
        save_file(state, f"{folder}/rank{rank}.safetensors")
    metrics = trainer.evaluate()
    logs = [{key: entry[key] for key in entry if "loss" in key} for entry in trainer.state.log_history]
    wrapped = type(trainer.model_wrapped).__name__
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({"world": trainer.args.world_size, "wrapped": wrapped, "logs": logs, "metrics": metrics})
    )


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `main` in two processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if not arguments:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [__file__, str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


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
    keys = [key for key in reports[0]["metrics"] if "sibling" in key or "other" in key]
    assert keys
    assert all(reports[0]["metrics"][key] == reports[1]["metrics"][key] for key in keys)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_data_parallel_does(tmp_path, stage):
    settings = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    states = {}
    for name, arguments in (("ddp", []), ("zero", [str(tmp_path / "ds.json")])):
        folder = tmp_path / name
        folder.mkdir()
        done = launch(folder, *arguments)
        # ZeRO-3 processes may abort after everything is written; what counts is what they wrote.
        assert (folder / "rank1.json").is_file(), done.stderr[-3000:]
        states[name] = load_file(folder / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    assert states["ddp"].keys() == states["zero"].keys()
    for name, value in states["ddp"].items():
        assert torch.allclose(value, states["zero"][name], atol=1e-4), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
