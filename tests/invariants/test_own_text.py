"""Two processes on gloo train on own text: each writes its documents, all read them, and end with the same weights."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.invariants.test_data_parallel import launch
from tests.tiny_training import HEAD_STAGE, make_features, make_model, make_trainer, weights


def main(folder: str) -> None:
    """One process of the run: trains on each of 8 documents twice and writes its weights."""
    model = make_model()
    trainer = make_trainer(
        folder, [{**HEAD_STAGE, "data": "own"}], model, max_steps=4, train_dataset=make_features(8), learning_rate=1e-3
    )
    trainer.train()
    state = {name: value.contiguous() for name, value in weights(model).items()}
    save_file(state, f"{folder}/rank{trainer.args.process_index}.safetensors")
    trainer.accelerator.end_training()


@pytest.mark.multi
def test_two_processes_read_one_own_text(tmp_path):
    done = launch(tmp_path, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    start = weights(make_model())
    assert any(not torch.equal(first[name], start[name]) for name in start)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    written = sorted(file.stem for file in Path(tmp_path, "own_text").rglob("*.json"))
    features = make_features(8)
    assert written == sorted(features.document(index).document_id for index in range(8))


if __name__ == "__main__":
    main(*sys.argv[1:])
