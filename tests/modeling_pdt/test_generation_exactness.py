"""Cached, batched, rolled-back decoding computes what a fresh forward over each finished row computes."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from modeling_pdt import PDTForParallelDecoding, Rollout
from modeling_pdt.cache import RollbackCache
from modeling_pdt.generation_inputs import encode_plan
from modeling_pdt.plan import PlanEntry
from modeling_pdt.rollout import plan_vectors
from tests.decoding_shadow import Shadow, decoder_for, whole_rows

TRUNKS = ("gpt_oss", "llama", "qwen3")
TOLERANCE = 1e-5
HEADERS = [[11, 12, 13], [14], [15, 16, 17, 18, 19]]
# Sections without a header take another path of ours, not of the trunk.
WITH_HEADERS = [(name, HEADERS) for name in TRUNKS]


def trained(make_model, name="gpt_oss", **overrides):
    model = make_model(name, trained=True, **overrides)
    model.config._adapter_config.trained_parts = ["agreement", "coverage"]
    return model


@pytest.mark.parametrize("padding", [0, 5])
def test_one_silent_stream_is_the_trunk(trunk, padding):
    ids, mask = torch.randint(2, 97, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    mask[0, :padding] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 23, "do_sample": False, "pad_token_id": 0}
    reference = trunk.generate(input_ids=ids, eos_token_id=1, **arguments)[:, 14:]
    model = PDTForParallelDecoding.from_trunk(trunk, block_size=4).eval()
    output = model.generate(
        ids, num_streams=1, gate_scale=0.0, plan=None, eos_token_id=1, return_dict_in_generate=True, **arguments
    )
    for row, streams in enumerate(output.streams):
        tokens = streams[0].token_ids
        assert tokens == reference[row, : len(tokens)].tolist()
        assert len(tokens) == 23 or tokens[-1] == 1


@pytest.mark.parametrize(("name", "streams"), [*((name, 3) for name in TRUNKS), ("gpt_oss", 1)])
def test_batch_of_prompts_is_the_prompts_one_by_one(make_model, name, streams):
    model = make_model(name, trained=True)
    prompts = [torch.randint(2, 97, (length,)).tolist() for length in (3, 11, 7)]
    headers = HEADERS[:streams]

    def decode(chosen):
        shadow = Shadow(decoder_for(model, chosen, headers, num_streams=streams, max_new_tokens=18))
        with torch.no_grad():
            shadow.run()
        return shadow

    together, ties = decode(prompts), 0
    for index, prompt in enumerate(prompts):
        alone = decode([prompt])
        for stream in range(streams):
            row = index * streams + stream
            left, right = together.decoder.streams.sections[row], alone.decoder.streams.sections[stream]
            for place in range(len(left.tokens)):
                top = alone.logits[stream][place].topk(2).values
                if top[0] - top[1] < 1e-5:
                    ties += 1
                    break
                assert left.tokens[place] == right.tokens[place]
                assert (together.logits[row][place] - alone.logits[stream][place]).abs().max() < TOLERANCE
    assert ties <= 1


@pytest.mark.parametrize(
    ("name", "headers", "plan_on_bus"),
    [*((*case, True) for case in WITH_HEADERS), ("gpt_oss", [[], [14], []], True), ("gpt_oss", [[], [14], []], False)],
)
def test_decoding_is_one_training_forward(make_model, name, headers, plan_on_bus):
    model = trained(make_model, name, plan_on_bus=plan_on_bus)
    prompts = [torch.randint(2, 97, (length,)).tolist() for length in (5, 12)]
    items = torch.randn(2, 2, 16)
    present = torch.tensor([[True, True], [True, False]])
    shadow = Shadow(
        decoder_for(
            model, prompts, headers, (items, present), max_new_tokens=18, max_retries=0, do_sample=True, seed=3
        )
    )
    with torch.no_grad():
        shadow.run()
        logits, start = training_logits(model, shadow.decoder, items, present)
    for row, section in enumerate(shadow.decoder.streams.sections):
        for place in range(len(section.tokens)):
            difference = (shadow.logits[row][place] - logits[row, start[row] - 1 + place]).abs().max()
            assert difference < TOLERANCE, (row, place)


def training_logits(model, decoder, items, present):
    """One forward with a `Rollout` over the rows that a decoder has written; the plan is given as planner vectors."""
    inputs, start = whole_rows(decoder, plan_slots_BP=torch.zeros(2, items.shape[1], dtype=torch.long))
    rollout = replace(inputs.pop("rollout"), plan_mask_BP=present)
    heads = model.stack.heads
    heads.embed_slots = lambda slots: items
    try:
        output = model(**inputs, rollout=rollout)
    finally:
        del heads.embed_slots
    notes = decoder.bus.notes_BSVKN.flatten(0, 1)[:, : output.speculation.shape[1]]
    published = decoder.bus.published_BSV.flatten(0, 1)[:, : output.speculation.shape[1]]
    assert published.all()
    assert torch.allclose(notes, output.speculation, atol=TOLERANCE)
    return output.logits, start


@pytest.mark.parametrize(("name", "headers"), [*WITH_HEADERS, ("gpt_oss", [[], [], []])])
def test_rolled_back_rows_continue_as_fresh_ones(make_model, name, headers):
    model = trained(make_model, name)
    prompts = [torch.randint(2, 97, (length,)).tolist() for length in (6, 13)]
    plan = (torch.randn(2, 2, 16), torch.ones(2, 2, dtype=torch.bool))
    decoder = decoder_for(
        model,
        prompts,
        headers,
        plan,
        max_new_tokens=26,
        max_retries=2,
        agreement_threshold=0.999,
        do_sample=True,
        seed=5,
    )
    shadow = Shadow(decoder)
    with torch.no_grad():
        output = shadow.run()
        for row in range(6):
            assert shadow.largest_difference(row) < TOLERANCE, row
    assert len(output.trace.of_kind("rollback")) > 20
    assert any(row.retries > 2 for rows in output.streams for row in rows)


@pytest.mark.parametrize("name", TRUNKS)
def test_rows_that_outlive_others_continue_as_fresh_ones(make_model, name):
    model = trained(make_model, name)
    prompts = [torch.randint(2, 97, (length,)).tolist() for length in (6, 13)]
    plan = (torch.randn(2, 2, 16), torch.ones(2, 2, dtype=torch.bool))
    arguments = {"max_new_tokens": 26, "do_sample": True, "agreement_threshold": 0.999}
    with torch.no_grad():
        plain = decoder_for(model, prompts, HEADERS, plan, **arguments).run()
        ends = [row.token_ids[3 + 5 * stream] for stream, row in enumerate(plain.streams[0])]
        decoder = decoder_for(model, prompts, HEADERS, plan, eos_token_id=ends, **arguments)
        shadow, sizes = Shadow(decoder), set()
        choose = decoder._choose

        def on_choose(rows, logits):
            sizes.add(len(decoder.streams.batch_rows))
            return choose(rows, logits)

        decoder._choose = on_choose
        output = shadow.run()
        for row in range(6):
            assert shadow.largest_difference(row) < TOLERANCE, row
    assert len(sizes) > 2 and output.trace.of_kind("rollback")


def test_unread_prompt_token_stays_unread_when_the_first_block_is_rewritten(make_model):
    model = trained(make_model, "llama")
    plan = (torch.randn(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
    decoder = decoder_for(
        model, [[5, 6, 7, 8]], [[], [], []], plan, max_new_tokens=4, max_retries=1, agreement_threshold=1.0
    )
    first = {}
    choose = decoder._choose

    def on_choose(rows, logits):
        for row, values in zip(rows.tolist(), logits, strict=True):
            if int(decoder.streams.fed_R[row]) == 0:
                first.setdefault(row, []).append(values.clone())
        return choose(rows, logits)

    decoder._choose = on_choose
    with torch.no_grad():
        decoder.run()
    assert [len(values) for values in first.values()] == [2, 2, 2]
    for before, after in first.values():
        assert torch.allclose(before, after, atol=TOLERANCE)


def test_headers_more_unequal_than_a_block_is_long_leave_room_for_a_rollback(make_model):
    model, headers = trained(make_model), [[], [14], [15, 16, 17, 18, 19, 20]]
    choices = {"block_size": 2, "commit_horizon": 2, "max_new_tokens": 4, "agreement_threshold": 1.0}
    shadow = Shadow(decoder_for(model, [list(range(2, 16))], headers, **choices))
    with torch.no_grad():
        assert shadow.run().trace.of_kind("rollback")
        assert max(shadow.largest_difference(row) for row in range(3)) < TOLERANCE


def test_too_small_a_margin_is_an_error(make_model):
    model = make_model()
    cache = RollbackCache(model.trunk.config, margin=2)
    with torch.no_grad():
        model.stack.upper(model.stack.lower(input_ids=torch.randint(2, 97, (2, 30)), past_key_values=cache))
    cache.rollback(torch.tensor([2, 0]))
    with pytest.raises(RuntimeError, match=r"rollback of 1 tokens is deeper than the cache margin 2"):
        cache.rollback(torch.tensor([1, 0]))


def test_dead_rows_leave_live_rows_finite(make_model):
    model = make_model("llama", trained=True)
    prompts = [torch.randint(2, 97, (5,)).tolist() for _ in range(4)]
    with torch.no_grad():
        alone = decoder_for(model, prompts, num_streams=2, max_new_tokens=40, do_sample=True).run()
        every = [token for rows in alone.streams for row in rows for token in row.token_ids[:8]]
        end = max(set(every), key=every.count)
        output = decoder_for(model, prompts, num_streams=2, max_new_tokens=40, do_sample=True, eos_token_id=end).run()
    lengths = [len(row.token_ids) for rows in output.streams for row in rows]
    assert min(lengths) < 10
    for before, after in zip(chain(*alone.streams), chain(*output.streams), strict=True):
        assert after.token_ids[: min(4, len(after.token_ids))] == before.token_ids[: min(4, len(after.token_ids))]
        assert after.finished == (after.token_ids[-1] == end)


def test_plan_vectors_are_those_of_a_training_forward(make_model):
    model = make_model(trained=True)

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(letter) % 90 + 2 for letter in text]}

    texts = [["main crop", "mayor"], ["river"]]
    with torch.no_grad():
        vectors, mask = encode_plan(
            model, tokenizer, [[PlanEntry(text) for text in row] for row in texts], torch.device("cpu")
        )
        ids = torch.zeros(2, 2, 9, dtype=torch.long)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, items in enumerate(texts):
            for place, text in enumerate(items):
                ids[row, place, : len(text)] = torch.tensor(tokenizer(text, False)["input_ids"])
                present[row, place, : len(text)] = True
        fields = {"item_ids_BPL": ids, "item_mask_BPL": present}
        empty = torch.full((6, 4), -1)
        rollout = Rollout(3, 4, 16, empty, empty, torch.ones(6, 1), **fields)
        reference, reference_mask = plan_vectors(model.stack, rollout)
    assert torch.equal(mask, reference_mask)
    assert torch.allclose(vectors, reference, atol=1e-6)
