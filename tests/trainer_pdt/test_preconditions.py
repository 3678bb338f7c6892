"""What a training is refused for before its first step."""

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import ConstantLR

from tests.tiny_training import (
    BUS_STAGE,
    make_arguments,
    make_collator,
    make_features,
    make_model,
    make_trainer,
    tokenizer,
)
from trainer_pdt import PDTTrainer
from trainer_pdt.curriculum import Curriculum
from trainer_pdt.optimizer import parameter_groups


def without_repeats(features):
    """Features of documents in which no section repeats a sibling's fact."""
    rows = [dict(row) for row in features]
    for row in rows:
        row["clean"] = {**row["clean"], "source_token": [[] for _ in row["clean"]["source_token"]]}
    return rows


def test_repeated_facts_alone_need_documents_that_repeat_some(tmp_path):
    features = list(make_features(4))
    silent = without_repeats(features)
    make_trainer(tmp_path / "a", [BUS_STAGE], train_dataset=[*silent, *features], other_weight=0.0)
    make_trainer(tmp_path / "b", [BUS_STAGE], train_dataset=silent, other_weight=1.0)
    message = (
        r"other_weight=0\.0, allowed where none of the first 4 documents repeats a sibling's fact: a number above 0"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "c", [BUS_STAGE], train_dataset=silent, other_weight=0.0)


def build(folder, **choices):
    """A trainer with further arguments of `Trainer`, which may be functions of the model and its arguments."""
    model, args = make_model(), make_arguments(folder, max_steps=1)
    made = {name: choice(model, args) for name, choice in choices.items()}
    data = {"train_dataset": make_features(4), "data_collator": make_collator(model), "processing_class": tokenizer()}
    return PDTTrainer(model, args, Curriculum.from_list([BUS_STAGE], 1), **data, **made)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    # They were accepted and ignored.
    with pytest.raises(ValueError, match=rf"{name}=<.*>, allowed: None, .*: override"):
        build(tmp_path, **{name: lambda model, args: lambda *values: {}})


def adam(model, args):
    return torch.optim.AdamW(parameter_groups(model.pdt_parameters(), args))


def test_an_optimizer_is_taken_with_the_groups_that_stages_turn_on_and_off(tmp_path):
    def with_schedule(model, args):
        optimizer = adam(model, args)
        return optimizer, ConstantLR(optimizer, 1.0)

    def plain(model, args):
        return torch.optim.SGD(model.pdt_parameters().values(), lr=0.1), None

    def of_another(model, args):
        return None, ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.1))

    for choice in (lambda model, args: (adam(model, args), None), with_schedule):
        trainer = build(tmp_path, optimizers=choice)
        trainer.train()
        assert trainer.state.global_step == 1
    # The first step ended in "KeyError: 'pdt_group'".
    with pytest.raises(ValueError, match=r"optimizers=\(SGD, None\), allowed: .*[.]parameter_groups"):
        build(tmp_path, optimizers=plain)
    # The first step ended in "zip() argument 2 is shorter than argument 1".
    with pytest.raises(ValueError, match=r"optimizers=\(None, ConstantLR\), allowed: .* schedule of that optimizer"):
        build(tmp_path, optimizers=of_another)


def row_lengths(document):
    prompt = len(document["request_ids"]) + len(document["outline_ids"])
    rows = zip(document["header_ids"], document["clean"]["section_ids"], strict=True)
    return [prompt + len(header) + len(section) for header, section in rows]


def with_datasets(trainer, train, evaluation, args=None, **choices):
    """A trainer like another one, with other datasets."""
    collator, args = make_collator(trainer.model, **choices), args or trainer.args
    datasets = {"train_dataset": train, "eval_dataset": evaluation}
    return PDTTrainer(trainer.model, args, trainer.curriculum, collator, **datasets)


@pytest.mark.parametrize("published", [False, True])
def test_too_long_rows_are_found_at_the_start(tmp_path, published):
    # A row of the validation split was met after all steps, and no model was written.
    rows = sorted(make_features(6), key=lambda row: max(row_lengths(row)))
    rows = [{name: value for name, value in row.items() if name != "document"} for row in rows]
    longest, allowed = max(row_lengths(rows[-1])), max(row_lengths(rows[2]))
    assert longest > allowed
    long, short = (Dataset.from_list(part) if published else part for part in (rows, rows[:3]))
    trainer = make_trainer(tmp_path, [BUS_STAGE])
    with_datasets(trainer, long, {"held_out": long}, max_row_tokens=longest)
    for train, evaluation in ((long, short), (short, long), (short, {"held_out": long})):
        with pytest.raises(ValueError, match=rf"a row has \d+ tokens, allowed: max_row_tokens = {allowed}"):
            with_datasets(trainer, train, evaluation, max_row_tokens=allowed)


@pytest.mark.parametrize(
    ("documents", "changes", "least"),
    [(0, {}, 1), (4, {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}, 8)],
)
def test_evaluation_without_a_batch_is_refused_by_name(tmp_path, documents, changes, least):
    # All steps were trained, then a KeyError named 'sibling_ce'.
    args, features = make_arguments(tmp_path, **changes), make_features(documents, split="validation")
    trainer = make_trainer(tmp_path, [BUS_STAGE])
    message = rf"eval_dataset has {documents} documents, .* at least {least}"
    with pytest.raises(ValueError, match=message):
        with_datasets(trainer, trainer.train_dataset, features, args)
    ready = with_datasets(trainer, trainer.train_dataset, make_features(least, split="validation"), args)
    with pytest.raises(ValueError, match=message):
        ready.evaluate(features)
