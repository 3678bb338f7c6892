"""Batches: rounds of every position, padding on both sides, blocks, notes and targets by round."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pdt.rollout import write_notes
from tests.tiny_training import make_collator, make_features, make_maker, make_model, tokenizer
from trainer_pdt.branches import build_rollout
from trainer_pdt.collator import NO_SOURCE, SOURCE_NEVER, PDTDataCollator
from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.losses import supervised_positions

FEATURES = [make_features(6)[index] for index in range(6)]
PER_TOKEN = (
    "input_ids",
    "labels",
    "stream_ids",
    "write_round",
    "read_round",
    "block_offset",
    "reference",
    "source_round",
)


def collator(**choices):
    return PDTDataCollator(tokenizer().pad_token_id, 12, 16, 3, **choices)


def rows_of(batch):
    """Per row: (mask of real tokens, request and outline, header, section)."""
    for row in range(batch["input_ids"].shape[0]):
        real = batch["attention_mask"][row].bool()
        prompt, section = batch["prompt_mask"][row], batch["write_round"][row] >= 0
        yield row, real, prompt, real & ~prompt & ~section, section


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rounds_of_every_position(side):
    batch = collator(padding_side=side)(FEATURES)
    for row, real, prompt, header, section in rows_of(batch):
        ids = batch["input_ids"][row][section].tolist()
        assert ids == FEATURES[row // 3]["clean"]["section_ids"][row % 3]
        assert ids[-1] == tokenizer().eos_token_id
        write = torch.arange(len(ids)) // 12
        assert torch.equal(batch["write_round"][row][section], write)
        assert torch.equal(batch["read_round"][row][section], torch.cat([write[1:], write[-1:]]))
        assert (batch["read_round"][row][header] == 0).all()
        assert (batch["read_round"][row][prompt | ~real] == -1).all()
        assert torch.equal(batch["stream_ids"][row] >= 0, header | section)
        assert torch.equal(batch["labels"][row] != -100, section)
        assert torch.equal(batch["labels"][row][section], batch["input_ids"][row][section])
        assert torch.equal(batch["position_ids"][row][real], torch.arange(int(real.sum())))
        assert torch.equal(batch["block_offset"][row][section], torch.arange(len(ids)) % 12)


def test_prompts_end_in_one_column():
    batch = collator(with_text_teacher=True)(FEATURES)
    ends = [int(batch["prompt_mask"][row].nonzero().max()) for row in range(len(batch["labels"]))]
    assert len(set(ends)) == 1
    start, longest = ends[0] + 1, max(len(document["request_ids"] + document["outline_ids"]) for document in FEATURES)
    assert start == longest
    assert batch["attention_mask"][:, -1].any() and batch["attention_mask"][:, 0].any()
    prompts = batch["input_ids"][:, :start].unflatten(0, (-1, 3))
    assert torch.equal(prompts, prompts[:, :1].expand_as(prompts))
    texts, masks = batch["text_input_ids"][:, :start].unflatten(0, (-1, 3)), batch["text_attention_mask"]
    assert torch.equal(texts, prompts) and masks[:, start].all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 40))
def test_padding_side_and_order_do_not_change_a_row(order, block_size):
    documents = [FEATURES[index] for index in order]
    left = replace(collator(padding_side="left"), block_size=block_size)(documents)
    right = replace(collator(padding_side="right"), block_size=block_size)(documents)
    alone = replace(collator(), block_size=block_size)(documents[:1])
    for key in PER_TOKEN:
        for row in range(3 * len(documents)):
            real = [batch["attention_mask"][row].bool() for batch in (left, right)]
            assert torch.equal(left[key][row][real[0]], right[key][row][real[1]])
        assert torch.equal(
            left[key][0][left["attention_mask"][0].bool()], alone[key][0][alone["attention_mask"][0].bool()]
        )
    for key in left.keys() - {*PER_TOKEN, "attention_mask", "position_ids", "own_mask", "prompt_mask", "planner_mask"}:
        assert torch.equal(left[key], right[key])


def test_prompt_mask_is_request_and_outline_and_planner_mask_the_request():
    batch = collator()(FEATURES[:1])
    first = FEATURES[0]
    assert int(batch["prompt_mask"][0].sum()) == len(first["request_ids"]) + len(first["outline_ids"])
    assert batch["input_ids"][0][batch["planner_mask"][0]].tolist() == first["request_ids"]


def test_source_rounds_tell_feasible_references():
    batch = collator()(FEATURES)
    for row, document in ((row, FEATURES[row // 3]) for row in range(18)):
        view, stream = document["clean"], row % 3
        section = batch["write_round"][row] >= 0
        for token, number in enumerate(view["reference"][stream]):
            source = batch["source_round"][row][section][token].item()
            if number < 0:
                assert source in (NO_SOURCE, view["told_token"][stream][token] // 12)
            else:
                assert source == view["source_token"][stream][number] // 12
    never = {**FEATURES[0], "clean": {**FEATURES[0]["clean"], "source_token": [[-1] * 9] * 3}}
    assert (collator()([never])["source_round"].unique() == torch.tensor([NO_SOURCE, SOURCE_NEVER])).all()
    assert not collator()([never])["judgeable"].any()


@pytest.mark.parametrize("size", [4, 12])
def test_an_owner_repeats_what_a_sibling_told_in_an_earlier_round(size):
    documents = [made for made in make_features(40) if any(t >= 0 for s in made["clean"]["told_token"] for t in s)]
    batch = PDTDataCollator(tokenizer().pad_token_id, size, 16, 3)(documents)
    earlier = later = 0
    for row in range(3 * len(documents)):
        told = documents[row // 3]["clean"]["told_token"][row % 3]
        section = batch["write_round"][row] >= 0
        sources, owned = batch["source_round"][row][section].tolist(), batch["own_mask"][row][section].tolist()
        for token, place in enumerate(told):
            if place >= 0 and place // size < token // size:
                earlier += 1
                assert owned[token] and sources[token] == place // size
            elif owned[token]:
                later += place >= 0
                assert sources[token] == NO_SOURCE
    assert earlier and later


def test_coverage_targets_turn_on_in_the_round_that_states_the_item():
    batch = collator()(FEATURES)
    for index, document in enumerate(FEATURES):
        for item, (owner, token) in enumerate(
            zip(document["item_streams"], document["clean"]["item_token"], strict=True)
        ):
            for stream in range(3):
                row = 3 * index + stream
                exists = batch["block_exists"][row]
                assert torch.equal(batch["coverage_mask"][row, :, item], exists & (owner == stream))
                rounds = torch.arange(len(exists))
                stated = exists & (rounds >= token // 12) & (token >= 0) & (owner == stream)
                assert torch.equal(batch["coverage_targets"][row, :, item], stated)


def test_notes_of_a_round_are_the_facts_that_end_in_it():
    batch = collator()(FEATURES)
    for row in range(18):
        view, stream = FEATURES[row // 3]["clean"], row % 3
        for round_ in range(batch["note_ids"].shape[1]):
            facts = zip(view["fact_ids"][stream], view["fact_token"][stream], strict=True)
            expected = [token for ids, place in facts if place // 12 == round_ for token in ids]
            assert batch["note_ids"][row, round_][batch["note_mask"][row, round_]].tolist() == expected


def test_corrupted_view_masks_planted_tokens_and_flags_their_blocks():
    batch = collator(with_corrupted=True)(FEATURES)
    corrupted = batch["corrupted"]
    assert not batch["contradicts"].any()
    assert corrupted["contradicts"].any()
    assert not (corrupted["contradicts"] & ~corrupted["judgeable"]).any()
    for row in range(18):
        planted = torch.tensor(FEATURES[row // 3]["corrupted"]["planted"][row % 3])
        labels = corrupted["labels"][row][corrupted["write_round"][row] >= 0]
        assert torch.equal(labels == -100, planted)


def test_text_rows_predict_the_same_tokens():
    batch = collator(with_text_teacher=True)(FEATURES)
    own, text = batch["labels"], batch["text_labels"]
    assert torch.equal(own[own != -100], text[text != -100])
    assert torch.equal(supervised_positions(own).sum(1), supervised_positions(text).sum(1))
    for row in range(3):
        ids = batch["text_input_ids"][row][batch["text_attention_mask"][row].bool()].tolist()
        assert all(str(section)[1:-1] in str(ids) for section in FEATURES[0]["clean"]["section_ids"])


def test_more_streams_than_adapters_reuse_them():
    six = make_maker()(generate_document("train", 0, WorldOptions(6)))
    batch = collator()([six])
    assert batch["stream_ids"].amax(dim=1).tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["input_ids"].shape[0] // batch["item_ids"].shape[0] == 6


def test_mixed_numbers_of_streams_and_long_rows_are_refused():
    two = make_maker()(generate_document("train", 0, WorldOptions(2)))
    with pytest.raises(ValueError, match=r"one number of streams, got \[2, 3\]"):
        collator()([two, FEATURES[0]])
    with pytest.raises(ValueError, match="max_row_tokens = 50"):
        collator(max_row_tokens=50)(FEATURES)
    with pytest.raises(ValueError, match="padding_side is 'up'"):
        collator(padding_side="up")


def test_blocks_of_the_collator_are_the_models():
    model = make_model()
    batch = make_collator(model)(FEATURES)
    rollout = build_rollout(batch, model.config)
    tap = model.stack.lower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    _, exists = write_notes(model.stack, tap.hidden, rollout)
    assert torch.equal(exists, batch["block_exists"])
