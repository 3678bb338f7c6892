"""`plan_on_bus=False`: no window holds plan items, in training, scoring and decoding; the coverage head still does."""

from dataclasses import replace

import pytest
import torch

from modeling_pdt import PDTConfig
from modeling_pdt.readings import ReadingRecorder
from modeling_pdt.rollout import run_bus
from trainer_pdt.replay import ReplayRecorder, replay


@pytest.fixture
def model(make_model):
    model = make_model("gpt_oss", trained=True, plan_on_bus=False)
    model.config._adapter_config.trained_parts = ["agreement", "coverage"]
    return model


@torch.no_grad()
def test_training_reads_no_item_and_judges_coverage_of_all(model, make_rollout):
    batch = make_rollout(items=4, wants_coverage=True, wants_agreement=True, plan_on_bus=False)
    base = model(**batch.inputs)
    bus = run_bus(model.stack, base.tap, batch.rollout)
    assert bus.note_states.mask.shape[-1] == batch.rollout.rounds * 3 * 4
    assert bus.plan_BPN.shape == (2, 4, 16)
    items = batch.rollout.item_ids_BPL.clone()
    items[0, 0, 0] = 2 + (items[0, 0, 0] + 17) % 90
    other = model(**{**batch.inputs, "rollout": replace(batch.rollout, item_ids_BPL=items)})
    assert torch.equal(other.logits, base.logits)
    change = (other.coverage_logits - base.coverage_logits).abs()
    assert change[:3, :, 0].max() > 1e-4 and change[:, :, 1:].max() == 0 and change[3:].max() == 0
    planless = replace(batch.rollout, item_ids_BPL=None, item_mask_BPL=None, wants_coverage=False)
    assert torch.equal(model(**{**batch.inputs, "rollout": planless}).logits, base.logits)


@pytest.mark.parametrize("plan_on_bus", [False, True])
@torch.no_grad()
def test_agreement_learns_of_items_through_coverage_alone(model, make_rollout, monkeypatch, plan_on_bus):
    batch = make_rollout(items=4, wants_agreement=True, plan_on_bus=plan_on_bus)
    items = batch.rollout.item_ids_BPL.clone()
    items[0, 0, 0] = 2 + (items[0, 0, 0] + 17) % 90
    monkeypatch.setattr(model.stack.heads.coverage, "forward", lambda text, mask, items: torch.zeros(6, 4, 4))
    one, other = (
        model(**{**batch.inputs, "rollout": replace(batch.rollout, item_ids_BPL=ids)}, heads_only=True)
        for ids in (batch.rollout.item_ids_BPL, items)
    )
    assert torch.equal(one.agreement_logits, other.agreement_logits) is not plan_on_bus


PLAN = [{"text": "mayor", "stream": 1}, {"text": "river", "stream": 0}]


class Letters:
    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}


def write(model, **options):
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 10, "agreement_threshold": None, "return_dict_in_generate": True, **options}
    return model.generate(ids, tokenizer=Letters(), stream_prefixes=["a", "bc", "def"], **options)


def test_decoding_reads_no_item_and_tells_coverage(model):
    planned = write(model, plan_texts=PLAN, callbacks=[ReadingRecorder()])
    assert torch.equal(planned.sequences, write(model).sequences)
    assert [sorted(row.coverage) for row in planned.streams[0]] == [[1], [0], []]
    assert {entry["plan"] for entry in planned.trace.readings} == {0.0}
    assert any(entry["notes"] for entry in planned.trace.readings)
    # Seeds are the caller's own, and stay readable.
    seeded = write(model, plan_texts=PLAN, seed_texts=["xyz", "", ""], callbacks=[ReadingRecorder()])
    assert min(entry["plan"] for entry in seeded.trace.readings) > 0
    assert [sorted(row.coverage) for row in seeded.streams[0]] == [[1], [0], []]


def test_the_same_weights_read_the_plan_where_it_is_on_the_bus(model):
    without = write(model, plan_texts=PLAN).sequences
    model.config.plan_on_bus = True
    try:
        assert not torch.equal(write(model, plan_texts=PLAN).sequences, without)
    finally:
        model.config.plan_on_bus = False


def test_a_replay_keeps_the_plan_off_the_bus(model, tmp_path):
    with ReplayRecorder(tmp_path / "replay") as recorder:
        output = write(model, plan_texts=PLAN, agreement_threshold=0.5, callbacks=[recorder])
    assert torch.equal(replay(tmp_path / "replay").sequences, output.sequences)


def test_it_is_saved_with_the_model(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert PDTConfig.from_pretrained(tmp_path).plan_on_bus is False
    assert PDTConfig().plan_on_bus is True


def test_slots_of_a_window_are_refused(model):
    with pytest.raises(ValueError, match="plan_slots were given, allowed: none, this model has plan_on_bus=False"):
        model(torch.tensor([[5, 6]]), plan_slots=torch.tensor([[1, 2]]))
