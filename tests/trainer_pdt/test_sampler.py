"""Datasets whose documents have different numbers of streams: every batch has one, no document is left out."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, ConcatDataset

from tests.tiny_training import HEAD_STAGE, make_arguments, make_features, make_model, make_trainer, weights
from trainer_pdt.sampler import StreamCountSampler, sampler_for, stream_counts

COUNTS = [2, 3, 3, 8, 2, 3, 2, 3, 3, 2, 2]
"""Of 11 documents: five of 2 streams, five of 3, one of 8."""


@pytest.fixture(scope="module")
def mixed():
    """Three documents of 2 streams and one of 4."""
    return ConcatDataset([make_features(3, streams=2), make_features(1, streams=4)])


def batches_of(sampler):
    order = list(sampler)
    assert len(order) == len(sampler)
    size = sampler.batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_batch_is_full_and_has_one_number(seed, batch_size):
    batches = batches_of(StreamCountSampler(COUNTS, batch_size, seed))
    assert {len(batch) for batch in batches} == {batch_size}
    assert all(len({COUNTS[index] for index in batch}) == 1 for batch in batches)
    assert {index for batch in batches for index in batch} == set(range(11))
    assert len(batches) == sum(-(-number // batch_size) for number in Counter(COUNTS).values())


def test_without_the_rest_nothing_is_doubled():
    seen = [index for batch in batches_of(StreamCountSampler(COUNTS, 2, seed=1, drop_last=True)) for index in batch]
    assert len(set(seen)) == len(seen) == 8
    assert list(StreamCountSampler(COUNTS, 8, seed=1, drop_last=True)) == []


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = StreamCountSampler(COUNTS, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 7) for epoch in (0, 1, 2)}) == 6


def test_new_documents_are_marked_once():
    sampler = StreamCountSampler(COUNTS, 4)
    new = [index for index, is_new in zip(sampler, sampler.new_documents(), strict=True) if is_new]
    assert sorted(new) == list(range(11))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_all_documents(processes):
    sampler = StreamCountSampler(COUNTS, 2, seed=0)
    shares = [list(BatchSamplerShard(BatchSampler(sampler, 2, False), processes, rank)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) == 2 for share in shares for batch in share)
    assert all(len({COUNTS[index] for index in batch}) == 1 for share in shares for batch in share)
    assert {index for share in shares for batch in share for index in batch} == set(range(11))


def test_one_number_of_streams_keeps_the_sampler_of_the_library(tmp_path, mixed):
    args = make_arguments(tmp_path)
    assert sampler_for(make_features(4), args, 2) is None
    assert stream_counts(mixed) == [2, 2, 2, 4]
    assert list(sampler_for(mixed, args, 2)) == [0, 1, 2, 0, 3, 3]


@pytest.mark.slow
def test_training_takes_a_mixed_dataset_and_goes_on_in_the_middle_of_an_epoch(tmp_path, mixed):
    seen = {}

    def run(folder, checkpoint=None):
        model = make_model()
        choices = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "train_dataset": mixed}
        trainer = make_trainer(folder, [HEAD_STAGE], model, **choices)
        compute, seen[folder] = trainer.compute_loss, []

        def named(model, inputs, *rest, **options):
            seen[folder].append((inputs["document_ids"], inputs["input_ids"].shape[0]))
            return compute(model, inputs, *rest, **options)

        trainer.compute_loss = named
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, weights(model)

    trainer, whole = run(tmp_path / "whole")
    first, second = seen[tmp_path / "whole"][:3], seen[tmp_path / "whole"][3:]
    for epoch in (first, second):
        assert {name for names, _ in epoch for name in names} == {mixed[index]["document_id"] for index in range(4)}
        assert sorted(rows for _, rows in epoch) == [4, 4, 8]
    assert first != second
    _, resumed = run(tmp_path / "rest", str(tmp_path / "whole" / "checkpoint-5"))
    assert seen[tmp_path / "rest"] == second[2:]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    check_evaluation(trainer, mixed)


def check_evaluation(trainer, mixed):
    """Every document counts once, however batches are filled up."""
    found = trainer.evaluate(mixed)
    trainer.args.per_device_eval_batch_size = 1
    expected = trainer.evaluate(mixed)
    names = [name for name in expected if "sibling" in name or "other" in name]
    assert len(names) > 5 and expected["eval_n_other"] > 0
    assert {name: found[name] for name in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-5)
