"""The model under the `Trainer` of transformers, without `PDTTrainer`."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

ARGUMENTS = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}


@pytest.fixture
def examples():
    """Eight rows of three streams that read random notes."""
    ids = torch.randint(2, 97, (8, 10))
    return [
        {"input_ids": row, "labels": row, "stream_ids": torch.tensor(i % 3), "notes": torch.randn(5, 16)}
        for i, row in enumerate(ids)
    ]


def test_accumulated_steps_are_one_batch(make_model, examples, tmp_path):
    # Loss and gradient were those of one batch times the number of accumulated steps.
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            **ARGUMENTS,
        )
        trainer = Trainer(make_model("llama", trained=True), arguments, train_dataset=examples)
        trainer.train()
        logs.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_metrics_are_computed_from_logits(make_model, examples, tmp_path):
    # Evaluation ended in a TypeError over what the output has besides.
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=4, **ARGUMENTS)
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    trainer = Trainer(make_model("llama"), arguments, eval_dataset=examples, compute_metrics=metrics)
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert seen == [((8, 10, 97), (8, 10))]
