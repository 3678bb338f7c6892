"""Two processes on documents of 2 to 4 streams: full batches, all documents, exact resume and evaluation."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset

from tests.invariants.test_data_parallel import launch
from tests.tiny_training import HEAD_STAGE, make_features, make_model, make_trainer

SIZES = ((5, 2), (3, 3), (1, 4))
"""Documents and their streams: 6 batches of 2, which two processes make 3 steps of."""


def mixed_features() -> ConcatDataset:
    """All documents."""
    return ConcatDataset([make_features(count, streams) for count, streams in SIZES])


def main(folder: str, checkpoint: str | None = None) -> None:
    """One process of the run: writes the documents of its batches, its losses and its metrics."""
    choices = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "train_dataset": mixed_features()}
    trainer = make_trainer(folder, [HEAD_STAGE], make_model(), **choices)
    compute, seen = trainer.compute_loss, []

    def named(model, inputs, *rest, **options):
        seen.append((inputs["document_ids"], inputs["input_ids"].shape[0]))
        return compute(model, inputs, *rest, **options)

    trainer.compute_loss = named
    trainer.train(resume_from_checkpoint=checkpoint)
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {"seen": seen, "logs": logs, "metrics": trainer.evaluate(mixed_features())}
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


@pytest.mark.multi
def test_two_processes_share_a_mixed_dataset(tmp_path):
    reports = {}
    for name, arguments in (("whole", []), ("rest", [str(tmp_path / "whole" / "checkpoint-4")])):
        folder = tmp_path / name
        folder.mkdir()
        done = launch(folder, *arguments, script=__file__)
        assert done.returncode == 0, done.stderr[-3000:]
        reports[name] = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    whole, rest = reports["whole"], reports["rest"]
    features = mixed_features()
    wanted = {features[index]["document_id"] for index in range(len(features))}
    for epoch in (slice(0, 3), slice(3, 6)):
        batches = [batch for report in whole for batch in report["seen"][epoch]]
        assert Counter(rows for _, rows in batches) == {4: 3, 6: 2, 8: 1}
        assert {name for names, _ in batches for name in names} == wanted
    assert [report["seen"] for report in rest] == [report["seen"][4:] for report in whole]
    assert rest[0]["logs"] == whole[0]["logs"]
    assert whole[0]["metrics"]["eval_n_other"] == rest[1]["metrics"]["eval_n_other"] > 0
    alone = make_trainer(tmp_path / "alone", [HEAD_STAGE], make_model())
    assert alone.evaluate(features)["eval_n_other"] == whole[0]["metrics"]["eval_n_other"]


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A process that ends beside gloo's threads may abort.
    torch.distributed.destroy_process_group()
