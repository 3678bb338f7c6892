"""Settings that must give the same training: alike documents at once, or one by one with accumulation."""

import pytest
import torch

from tests.tiny_training import BUS_STAGE, make_features, make_model, make_trainer, weights

STEADY = [{**BUS_STAGE, "losses": {"lm_ce": 1.0, "keep_close": 0.5}, "lag_jitter": 0.0}]


class Alike(torch.utils.data.Dataset):
    """Documents whose losses have equal denominators, so that a mean of means is the mean over all of them."""

    def __init__(self, count):
        pool = make_features(600)
        groups = {}
        for index in range(len(pool)):
            features = pool[index]
            view = features["clean"]
            siblings = sum(number >= 0 for s in range(3) for number in view["reference"][s])
            key = (sum(map(len, view["section_ids"])), siblings)
            groups.setdefault(key, []).append(features)
            if len(groups[key]) == count:
                self.items = groups[key]
                return
        raise AssertionError("no group of alike documents")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def alike():
    return Alike(2)


def run(folder, dataset, batch, accumulation):
    model = make_model()
    trainer = make_trainer(
        folder,
        STEADY,
        model,
        max_steps=3,
        train_dataset=dataset,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=3,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        sibling_weight=1.0,
    )
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return weights(model), logs


@pytest.mark.slow
def test_two_at_once_equal_two_accumulated(tmp_path, alike):
    assert len({tuple(map(tuple, item["clean"]["section_ids"])) for item in alike.items}) == 2
    at_once, logs_at_once = run(tmp_path / "a", alike, 2, 1)
    accumulated, logs_accumulated = run(tmp_path / "b", alike, 1, 2)
    assert logs_at_once == pytest.approx(logs_accumulated, abs=1e-4)
    start = weights(make_model())
    moved = 0
    for name, value in at_once.items():
        assert torch.allclose(value, accumulated[name], atol=2e-5), name
        moved += not torch.equal(value, start[name])
    assert moved > 10
