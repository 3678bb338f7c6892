"""`writer_tap="top"`: notes from last hidden states, in decoding and of whole rows."""

import json
from dataclasses import replace

import pytest
import torch

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.callbacks import MemoryRecorder
from tests.decoding_shadow import decoder_for, whole_rows
from trainer_pdt.notes_gap import notes_gap, sequential_notes

EPS = 1e-5
HEADERS = [[11, 12, 13], [14], []]


@pytest.fixture
def model(make_model):
    """A tiny model whose writer reads last hidden states, and whose parameters have moved."""
    return make_model(trained=True, writer_tap="top")


def written(model, **options):
    """A decoder that has run without rollback, and its notes `[R, V, K, N]`."""
    prompts, plan = [[5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3]], (torch.randn(2, 2, 16), torch.tensor([[True, True]] * 2))
    decoder = decoder_for(model, prompts, HEADERS, plan, num_streams=3, max_new_tokens=15, **options)
    with torch.no_grad():
        decoder.run()
    assert decoder.bus.published_BSV.flatten(0, 1)[:, :4].all()
    return decoder, decoder.bus.notes_BSVKN.flatten(0, 1)[:, :4]


def of_whole_rows(model, decoder):
    """Notes of the rows that a decoder has written: of one forward, and written in sequence."""
    inputs, _ = whole_rows(decoder, plan_slots_BP=torch.zeros(2, 2, dtype=torch.long))
    inputs["rollout"] = replace(inputs["rollout"], plan_mask_BP=decoder.inputs.plan_mask_BP)
    model.stack.heads.embed_slots = lambda slots: decoder.inputs.plan_BPN
    try:
        with torch.no_grad():
            output = model(**inputs, gate_scale=decoder.settings.gate_scale)
            return output.speculation, sequential_notes(
                model.stack, output.tap, inputs["rollout"], inputs["stream_ids"]
            )
    finally:
        del model.stack.heads.embed_slots


@pytest.mark.parametrize(("name", "lag", "plan_on_bus"), [("gpt_oss", 1, True), ("llama", 2, False)])
def test_notes_in_sequence_are_those_of_decoding(make_model, name, lag, plan_on_bus):
    model = make_model(name, trained=True, writer_tap="top", plan_on_bus=plan_on_bus)
    decoder, notes = written(model, bus_lag=lag)
    two_pass, sequential = of_whole_rows(model, decoder)
    torch.testing.assert_close(sequential, notes, atol=EPS, rtol=EPS)
    gap = notes_gap(two_pass, sequential).amax(dim=(0, 2))
    assert gap[:lag].max() < EPS, "blocks that read the plan alone"
    assert gap[lag:].min() > 1e-3


def test_one_forward_is_exact_where_the_gate_is_shut(model):
    decoder, notes = written(model, gate_scale=0.0)
    two_pass, _ = of_whole_rows(model, decoder)
    torch.testing.assert_close(two_pass, notes, atol=EPS, rtol=EPS)


def test_notes_in_sequence_need_a_lag(model, make_rollout):
    batch = make_rollout(lag=0)
    tap = model(**batch.inputs).tap
    with pytest.raises(ValueError, match=r"lag_R1 must be >= 1 .* got 0"):
        sequential_notes(model.stack, tap, batch.rollout, batch.inputs["stream_ids"])


def test_notes_hold_what_their_stream_has_read(make_model, make_rollout):
    """Two hops: a word of one stream, read by a second, reaches the notes of the second."""
    batch, changed = make_rollout(), {}
    for tap in ("mid", "top"):
        model = make_model("llama", trained=True, writer_tap=tap)
        noise = torch.zeros(6, 4, 4, 16)
        noise[0, 0] = 1.0
        changed[tap] = []
        for rollout in (batch.rollout, replace(batch.rollout, perturbation_RVKN=noise)):
            inputs = {**batch.inputs, "rollout": rollout}
            with torch.no_grad():
                notes = sequential_notes(model.stack, model(**inputs).tap, rollout, inputs["stream_ids"])
            changed[tap].append(notes)
    assert torch.equal(*changed["mid"])
    moved = (changed["top"][0] - changed["top"][1]).abs().amax(dim=(2, 3))
    assert moved[:, 0].max() == 0 and moved[1:3, 1:3].min() > 1e-3 and moved[3:].max() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_writer_and_all_that_reads(model, make_rollout, autocast):
    """Also in mixed precision, where weights that a pass without gradient has cast must not serve the next one."""
    batch = make_rollout(items=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch.inputs, labels=batch.labels).loss.backward()
    grads = {name: 0.0 if p.grad is None else float(p.grad.abs().sum()) for name, p in model.pdt_parameters().items()}
    for name, value in grads.items():
        reads = "pdt_snc" in name or "pdt_stream_adapters" in name or ".writer." in name
        assert value > 0 or not reads or "dynamic" in name, name
    assert all(p.grad is None for name, p in model.named_parameters() if "pdt_" not in name)


def test_the_writer_learns_through_the_notes(model, make_rollout):
    batch, losses = make_rollout(documents=1), []
    writer = torch.optim.Adam(model.stack.heads.writer.parameters(), lr=0.02)
    for _ in range(12):
        loss = model(**batch.inputs, labels=batch.labels).loss
        losses.append(float(loss))
        writer.zero_grad()
        loss.backward()
        writer.step()
    assert losses[-1] < losses[0] - 0.02, losses


@torch.no_grad()
def test_whole_rows_do_not_depend_on_what_is_shared(model, make_rollout):
    """Without the upper half's logits, with the tap of an earlier forward, and row by row of the prefix."""
    batch = make_rollout(items=4)
    full = model(**batch.inputs)
    heads = model(**batch.inputs, heads_only=True)
    again = model(stream_ids=batch.inputs["stream_ids"], rollout=batch.rollout, tap=replace(full.tap, prefix=None))
    assert full.tap.prefix is not None and heads.logits is None
    for output in (heads, again):
        torch.testing.assert_close(output.speculation, full.speculation, atol=EPS, rtol=EPS)
    torch.testing.assert_close(again.logits, full.logits, atol=EPS, rtol=EPS)


def test_checkpointing_leaves_gradients_as_they_are(model, make_rollout):
    batch, found = make_rollout(items=4), []
    model.train()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(**batch.inputs, labels=batch.labels).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.pdt_parameters().items() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_saved_and_loaded(make_trunk, make_model, make_rollout, tmp_path):
    model, batch = make_model("llama", trained=True, writer_tap="top"), make_rollout()
    model.save_pretrained(tmp_path, include_trunk=True)
    file = tmp_path / "adapter/adapter_config.json"
    adapter = json.loads(file.read_text())
    assert adapter["writer_tap"] == "top"
    loaded = PDTForParallelDecoding.from_pretrained(tmp_path)
    expected = model(**batch.inputs)
    assert loaded.config.writer_tap == "top"
    assert torch.equal(loaded(**batch.inputs).logits, expected.logits)
    del adapter["writer_tap"]
    file.write_text(json.dumps(adapter))
    older = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert older.config.writer_tap == "mid"
    assert not torch.allclose(older(**batch.inputs).speculation, expected.speculation, atol=1e-2)


def test_states_of_both_taps_count_as_memory(make_model):
    held = {}
    for tap in ("mid", "top"):
        output = make_model("llama", writer_tap=tap).generate(
            torch.tensor([[5, 6, 7]]),
            num_streams=2,
            max_new_tokens=5,
            plan=None,
            callbacks=[MemoryRecorder()],
            return_dict_in_generate=True,
        )
        held[tap] = output.trace.memory["tap_bytes"]
        assert output.trace.model["writer_tap"] == tap
    assert held["top"] == 2 * held["mid"] == 2 * 2 * 6 * 32 * 4
