"""FSDP2 (`fully_shard`) on two gloo processes: the losses and gradients of one process, trunk and adapters sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.tiny_training import make_arguments, make_collator, make_features, make_model
from trainer_pdt.branches import run_branches
from trainer_pdt.curriculum import Stage
from trainer_pdt.losses import weighted_total
from trainer_pdt.noise import draw_noise
from trainer_pdt.objective import loss_parts

ROOT = Path(__file__).resolve().parents[2]
STAGE = Stage(
    "all",
    1,
    ("snc", "stream_adapters", "writer", "encoder", "planner", "coverage", "agreement", "stream"),
    dict.fromkeys(("lm_ce", "notes", "keep_close", "kd", "spec", "planner", "cov", "stream", "agree"), 1.0),
    data="corrupted",
)


def train_on(model, document: int, folder: str) -> float:
    """Loss of one document, student, teacher and trunk pass; the gradients stay in the parameters."""
    inputs = make_collator(model, with_corrupted=True)([make_features(2)[document]])["corrupted"]
    generator = torch.Generator().manual_seed(document)
    noise = draw_noise(STAGE, 1, 3, inputs["block_exists"].shape[1], model.config.bus_lag, generator)
    arguments = make_arguments(folder)
    branches = run_branches(model, inputs, STAGE, noise, arguments, model.config, generator)
    total = weighted_total(loss_parts(branches, inputs, STAGE, arguments), STAGE.losses).total
    total.backward()
    return total.item()


def main(folder: str) -> None:
    """One process: shards every decoder layer and what is left, trains on its own document, gathers gradients."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = make_model()
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.stack.base_layer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    loss = train_on(model, rank, folder)
    frozen = [
        name for name, parameter in model.peft.named_parameters() if "pdt_" not in name and parameter.grad is not None
    ]
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.pdt_parameters().items()}
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    report = {"loss": loss, "whole": whole, "frozen": frozen, "local": local, "world": mesh.size()}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
    if rank == 0:
        save_file(
            {name: gradient.contiguous() for name, gradient in gradients.items()}, f"{folder}/gradients.safetensors"
        )


@pytest.mark.multi
def test_sharded_losses_and_gradients_are_those_of_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    model = make_model()
    losses = [train_on(model, document, tmp_path) for document in (0, 1)]
    size = sum(parameter.numel() for parameter in model.parameters())
    assert [report["loss"] for report in reports] == pytest.approx(losses, abs=1e-5)
    for report in reports:
        assert (report["world"], report["whole"], report["frozen"]) == (2, [], [])
        assert report["local"] < 0.6 * size
    gradients = load_file(tmp_path / "gradients.safetensors")
    assert gradients.keys() == model.pdt_parameters().keys()
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for name, parameter in model.pdt_parameters().items():
        # Two processes average, one process adds up.
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 2
        assert torch.allclose(gradients[name], expected, rtol=0, atol=1e-5), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
