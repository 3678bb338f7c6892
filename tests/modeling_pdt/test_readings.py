"""Who read which note: shares of attention per block, from the same windows that the streams read."""

import pytest
import torch

from modeling_pdt.bus import NotesBus
from modeling_pdt.callbacks import ParallelDecodingCallback
from modeling_pdt.interventions import Ablate, GateZero, RandomGate, Swap
from modeling_pdt.readings import Reading, ReadingRecorder, ReceivedAttention

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
    return decode(model, [ReadingRecorder()], **options)


def test_listening_changes_nothing_and_every_block_is_recorded(model):
    output, silent = read(model), decode(model)
    assert torch.equal(output.sequences, silent.sequences)
    assert silent.trace.readings == [] and "readings" not in silent.trace.to_manifest()
    judged = [event for event in output.trace.events if event["kind"] in ("commit", "rollback")]
    assert output.trace.of_kind("rollback")
    place = ("prompt", "stream", "round", "attempt")
    blocks = [tuple(event[name] for name in place) for event in judged]
    assert sorted(tuple(record[name] for name in place) for record in output.trace.readings) == sorted(blocks)


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

    recorder = ReadingRecorder()
    output = decode(model, [recorder], stream_prefixes=["a", "", "bcd"], tokenizer=Letters())
    bare = decode(model, [recorder], logit_blend=0.0)
    first = {record["stream"]: record for record in output.trace.readings if record["round"] == 0}
    assert len(first) == 3 and all(record["sink"] > 0 for record in first.values())
    assert bare.trace.readings == []


def reading(rows, rounds, shares, prompts=None):
    """Rows of two streams that see two places of stream 1."""
    rounds, shares = (torch.tensor([[[-1, -1], two] for two in values]) for values in (rounds, shares))
    nothing = torch.zeros(len(rows))
    prompts = torch.tensor([row // 2 for row in rows] if prompts is None else prompts)
    return Reading(rows, prompts, nothing, nothing, nothing, shares.float(), rounds)


def test_scores_by_attention_follow_blocks_that_stand():
    """0.9 of the score and 0.1 of what a block gave, worked out by hand; withdrawn blocks give nothing."""
    bus = NotesBus(2, 2, 1, 4, 4, retention="scored", retention_score="attention")
    bus.publish(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.randn(2, 1, 4))
    received = ReceivedAttention(bus, rows=4)
    score = bus.score_BSV[:, 1, :3]
    first, later = torch.tensor([0]), torch.tensor([0, 2])
    received.add(reading([2, 0], [[-1, -1], [0, -1]], [[9, 9], [0.2, 9]]), first)
    received.add(reading([0], [[0, 1]], [[0.4, 0.5]]), first)
    assert not score.any()
    received.commit(first)
    assert score.tolist() == [pytest.approx([0.3, 0.5, 0]), [0, 0, 0]]
    received.add(reading([0], [[0, 1]], [[0.9, 0.9]]), first)
    received.forget(first)
    # Row 2 reads the notes of the other prompt.
    received.add(reading([0, 2], [[0, -1], [1, 0]], [[0.1, 0], [0.3, 0.7]], [0, 0]), later)
    received.commit(later)
    assert score.tolist() == [pytest.approx([0.9 * 0.3 + 0.1 * 0.4, 0.9 * 0.5 + 0.1 * 0.3, 0]), [0, 0, 0]]
    bus.withdraw(torch.tensor([1]), torch.tensor([1]))
    bus.publish(torch.tensor([1]), torch.tensor([1]), torch.randn(1, 1, 4))
    assert bus.score_BSV[0, 1, 1] == 0


def test_merged_rounds_get_no_attention_of_their_own():
    bus = NotesBus(1, 2, 1, 4, 3, retention="hybrid", retention_score="attention")
    bus.publish(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.randn(2, 1, 4))
    received = ReceivedAttention(bus, rows=2)
    received.add(reading([0], [[0, 1]], [[0.4, 0.5]]), torch.tensor([0]))
    received.commit(torch.tensor([0]))
    assert bus.score_BSV[0, 1, :2].tolist() == [0, 0.5]


def test_nothing_is_collected_unless_somebody_wants_it(model):
    class Look(ParallelDecodingCallback):
        def on_token(self, decoder, *_):
            assert decoder.readings.meter is None and decoder.note_states.collected is None

    decode(model, [Look()])
    with pytest.raises(
        ValueError, match="retention_score='attention' needs retention='scored' or 'hybrid', got 'fifo'"
    ):
        decode(model, retention_score="attention")
