"""The cache of lower-trunk states: the same losses, no lower pass, nothing foreign, nothing half-written."""

import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tests.tiny_training import BUS_STAGE, HEAD_STAGE, make_collator, make_features, make_model, make_trainer, weights
from trainer_pdt.curriculum import LOSS_NAMES, Stage
from trainer_pdt.tap_cache import DESCRIPTION_FILE, TapCache

EPOCHS = {"max_steps": 6, "per_device_train_batch_size": 1, "num_train_epochs": 2}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def count_lower(trainer, monkeypatch):
    """Rows that go through the lower trunk, and how often short texts do."""
    calls = {"rows": 0, "texts": 0}

    def count(kind, original, **inputs):
        calls[kind] += 1
        return original(**inputs)

    stack = trainer.model.stack
    monkeypatch.setattr(stack, "embed", partial(count, "rows", stack.embed))
    monkeypatch.setattr(stack, "lower", partial(count, "texts", stack.lower))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("data", ["clean", "corrupted"])
def test_same_losses_and_weights_without_the_lower_pass(tmp_path, monkeypatch, data):
    documents, stages = [make_features(3)[index] for index in range(3)], [{**HEAD_STAGE, "data": data}]
    plain = make_trainer(tmp_path / "plain", stages, train_dataset=Documents(documents), **EPOCHS)
    plain.train()
    settings = {**EPOCHS, "lower_cache_dir": str(tmp_path / "cache")}
    for expected in (3, 0):
        cached = make_trainer(tmp_path / "cached", stages, train_dataset=Documents(documents), **settings)
        calls = count_lower(cached, monkeypatch)
        cached.train()
        assert calls["rows"] == expected and calls["texts"] > 0
        assert losses(cached) == losses(plain)
        for name, value in weights(plain.model).items():
            assert torch.equal(weights(cached.model)[name], value)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 9
    assert not list((tmp_path / "cache").rglob(".unfinished-*"))


class Documents(Dataset):
    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


def test_rows_are_found_in_other_batches_too(tmp_path):
    model, features = make_model(), make_features(4)
    collate, cache = make_collator(model), TapCache(tmp_path, model, "no")
    documents = [features[index] for index in range(4)]
    names = ("input_ids", "attention_mask", "position_ids")
    for pair in (documents[:2], documents[2:]):
        batch = collate(pair)
        assert cache.read(batch) is None
        cache.write(batch, model.stack.lower(**{name: batch[name] for name in names}))
    batch = collate([documents[3], documents[0]])
    found, computed = cache.read(batch), model.stack.lower(**{name: batch[name] for name in names})
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.hidden[real], computed.hidden[real], rtol=1e-5, atol=1e-6)
    assert not found.hidden[~real].any()
    assert (found.split, found.masks.keys()) == (computed.split, computed.masks.keys())
    assert torch.equal(found.position_ids, computed.position_ids)
    assert cache.read(collate([{**documents[0], "request_ids": documents[0]["request_ids"][1:]}])) is None


def test_only_stages_of_heads_use_it(tmp_path):
    assert TapCache.serves(Stage("a", 1, ("coverage",), {"cov": 1.0, "lm_ce": 0.0}))
    heads = {"planner", "kd_plan", "spec", "spec_kl", "red", "cov", "stream", "agree"}
    for loss in heads.symmetric_difference(LOSS_NAMES) & {"lm_ce", "kd", "keep_close", "block_start", "notes", "stab"}:
        assert not TapCache.serves(Stage("a", 1, ("snc",), {loss: 1.0, "red": 1.0}))
    trainer = make_trainer(tmp_path, [BUS_STAGE], lower_cache_dir=str(tmp_path / "cache"))
    trainer.train()
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_foreign_cache_is_refused_by_name(tmp_path):
    model = make_model()
    TapCache(tmp_path, model, "no")
    TapCache(tmp_path, make_model(gate_init=1.0), "no")
    with pytest.raises(ValueError, match=r"mixed_precision is 'no', allowed for this run: 'bf16'"):
        TapCache(tmp_path, model, "bf16")
    with pytest.raises(ValueError, match=r"cache\.json: weights is '.*', allowed for this run: '.*'"):
        TapCache(tmp_path, make_model(seed=1), "no")
    file = tmp_path / DESCRIPTION_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "split": 2}))
    with pytest.raises(ValueError, match="split is 2, allowed for this run: 1"):
        TapCache(tmp_path, model, "no")


def test_what_it_cannot_serve_is_refused(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.trunk.config, "attention_dropout", 0.1)
    with pytest.raises(ValueError, match=r"lower_cache_dir=.*, allowed with attention_dropout=0\.1: none"):
        TapCache(tmp_path, model, "no")
    monkeypatch.undo()
    monkeypatch.setattr("trainer_pdt.tap_cache.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="allowed with ZeRO-3 or FSDP2: none"):
        TapCache(tmp_path, model, "no")


def test_a_damaged_file_is_named_and_an_interrupted_one_never_seen(tmp_path, monkeypatch):
    model = make_model()
    batch, cache = make_collator(model)([make_features(1)[0]]), TapCache(tmp_path, model, "no")
    tap = model.stack.lower(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")})

    def interrupted(states, name):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer_pdt.tap_cache.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.write(batch, tap)
    assert cache.read(batch) is None and not [file for file in tmp_path.rglob("*/*") if file.is_file()]
    cache.write(batch, tap)
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .* delete it"):
        cache.read(batch)


def write_and_read(folder, start):
    torch.set_num_threads(1)
    model, features = make_model(), make_features(6)
    collate, cache = make_collator(model), TapCache(folder, model, "no")
    for index in [*range(start, 6), *range(start)] * 3:
        batch = collate([features[index]])
        if cache.read(batch) is None:
            names = ("input_ids", "attention_mask", "position_ids")
            cache.write(batch, model.stack.lower(**{name: batch[name] for name in names}))


@pytest.mark.multi
def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_and_read, args=(tmp_path, start)) for start in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 18
    assert not list(tmp_path.rglob(".unfinished-*"))
