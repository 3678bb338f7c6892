"""Who read which note: shares of attention per block, from the same windows that the streams read."""

import threading

import pytest
import torch

from modeling_pdt.callbacks import ParallelDecodingCallback
from modeling_pdt.interventions import Ablate, GateZero, RandomGate, Swap
from modeling_pdt.readings import ReadingRecorder

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(make_model):
    model = make_model("llama", trained=True, notes_per_block=2)
    model.config._adapter_config.trained_parts = ["agreement"]
    return model


def decode(model, callbacks=(), **options):
    options = {"max_new_tokens": 14, "do_sample": True, "agreement_threshold": 0.999, **options}
    call = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "callbacks": list(callbacks)}
    return model.generate(IDS, **call, **options)


def read(model, **options):
    with ReadingRecorder() as recorder:
        return decode(model, [recorder], **options)


def test_listening_changes_nothing_and_every_block_is_recorded(model):
    output, silent = read(model), decode(model)
    assert torch.equal(output.sequences, silent.sequences)
    assert silent.trace.readings == [] and "readings" not in silent.trace.to_manifest()
    judged = [event for event in output.trace.events if event["kind"] in ("commit", "rollback")]
    assert output.trace.of_kind("rollback")
    place = ("prompt", "stream", "round", "attempt")
    blocks = [tuple(event[name] for name in place) for event in judged]
    assert sorted(tuple(record[name] for name in place) for record in output.trace.readings) == sorted(blocks)


def test_a_call_in_another_thread_is_not_listened_to(model):
    class Visitor(ParallelDecodingCallback):
        def on_token(self, *_):
            thread = threading.Thread(target=decode, args=(model,), kwargs={"max_new_tokens": 3})
            thread.start()
            thread.join()

    with ReadingRecorder() as recorder:
        visited = decode(model, [Visitor(), recorder])
    assert visited.trace.readings == read(model).trace.readings != []


@pytest.mark.parametrize(("retention", "capacity"), [("fifo", 2), ("hybrid", 3)])
def test_shares_add_up_and_keep_to_the_window(model, retention, capacity):
    records = read(model, retention=retention, bus_capacity=capacity, retry_policy="stale").trace.readings
    for record in records:
        shares = [record["sink"], record["plan"], *(note["weight"] for note in record["notes"])]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert all(note["prompt"] == record["prompt"] for note in record["notes"])
        assert all(note["stream"] != record["stream"] for note in record["notes"])
        rounds = {note["round"] for note in record["notes"]}
        newest = range(max(0, record["round"] - 2), record["round"])
        assert rounds == set(newest) if retention == "fifo" else rounds <= set(range(record["round"]))
    assert any(record["notes"] for record in records)


def test_without_scores_every_visible_note_has_the_same_share(model):
    """Keys of zero and a sink of zero: 1 / (notes + plan + sink), worked out by hand; the gate is its logit's."""
    with torch.no_grad():
        for site in model.stack.snc:
            site.k_proj.weight.zero_()
            site.sink.zero_()
            site.gate.logit.fill_(1.0)
    plan = {"seed_notes": torch.randn(3, 16), "gate_scale": 0.5, "num_streams": 3}
    for record in read(model, agreement_threshold=None, max_new_tokens=12, **plan).trace.readings:
        share = 1 / (1 + 3 + 2 * 2 * record["round"])
        # Without a header the first of four tokens is chosen behind the prompt, where nothing is read.
        blind = 0.25 if record["round"] == 0 else 0.0
        assert record["sink"] == pytest.approx(blind + (1 - blind) * share, abs=1e-5)
        assert record["plan"] == pytest.approx((1 - blind) * 3 * share, abs=1e-5)
        assert [note["weight"] for note in record["notes"]] == pytest.approx([2 * share] * (2 * record["round"]))
        assert record["gate"] == pytest.approx(0.5 * torch.sigmoid(torch.tensor(1.0)).item(), abs=1e-5)


def test_a_rewriting_reads_its_own_round(model):
    """Under the policy `refresh` a second attempt sees the notes that siblings wrote in the same round."""
    readings = read(model, interventions=[RandomGate(rate=0.5)]).trace.readings
    records = [record for record in readings if record["attempt"]]
    assert any(note["round"] == record["round"] for record in records for note in record["notes"])


def test_interventions_are_seen(model):
    assert all(record["notes"] == [] for record in read(model, interventions=[Ablate()]).trace.readings)
    assert {record["gate"] for record in read(model, interventions=[GateZero()]).trace.readings} == {0.0}
    swapped = read(model, interventions=[Swap()]).trace.readings
    assert all(note["prompt"] == 1 - record["prompt"] for record in swapped for note in record["notes"])


def test_headers_and_the_bare_trunk(model):
    class Letters:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    with ReadingRecorder() as recorder:
        output = decode(model, [recorder], stream_prefixes=["a", "", "bcd"], tokenizer=Letters())
        bare = decode(model, [recorder], logit_blend=0.0)
    first = {record["stream"]: record for record in output.trace.readings if record["round"] == 0}
    assert len(first) == 3 and all(record["sink"] > 0 for record in first.values())
    assert bare.trace.readings == []


def test_nothing_stays_on_the_model(model):
    with pytest.raises(ValueError, match="inside a `with` statement"):
        decode(model, [ReadingRecorder()])

    class Interrupt(ReadingRecorder):
        def on_commit(self, decoder, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupt() as recorder:
        decode(model, [recorder])
    assert not any(site._forward_pre_hooks for site in model.stack.snc)
