"""Trunk pretraining: tokenizer, rows and their weights, corpus, collator, loss, saving."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM

from trainer_pdt.data.counting import count_document
from trainer_pdt.data.worlds import WorldOptions, generate_document
from trainer_pdt.data.worlds_lexicon import GIVEN_NAMES, POOLS, SURNAMES, values_of
from trainer_pdt.data.worlds_parser import parse_section
from trainer_pdt.trunk import FAMILIES, IGNORE, TrunkArguments, trunk_config, weighted_lm_loss
from trainer_pdt.trunk_corpus import (
    RowBuilder,
    TrunkCollator,
    TrunkCorpus,
    TrunkExample,
    prompt_lengths,
    train_tokenizer,
)
from trainer_pdt.trunk_evaluation import complete, evaluate_trunk, save_trunk, summarize, write_sequential

SHIPPED = Path(__file__).parents[2] / "recipes" / "tiny" / "trunk"

SMALL = TrunkArguments(
    vocab_size=700, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
    card_steps=1, card_every=4, single_every=4, rows_sequential=2, rows_single=2, rows_cards=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TrunkArguments().vocab_size, seed=1)


@pytest.fixture(scope="module")
def trunk(tokenizer):
    torch.manual_seed(0)
    return GptOssForCausalLM(trunk_config(SMALL, tokenizer)).eval()


def document(index=0, **options):
    return generate_document("trunk", index, WorldOptions(heldout_values=None, heldout_wordings=None, **options))


@pytest.mark.slow
def test_tokenizer_is_byte_level_and_values_take_one_to_four_tokens(tokenizer):
    assert len(tokenizer) == 1216 and tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "Größe 価\nThe main crop, barley."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    words = [word for pool in (*POOLS.values(), GIVEN_NAMES, SURNAMES) for word in pool]
    lengths = Counter(len(tokenizer.encode(" " + word)) for word in words)
    assert set(lengths) == {1, 2, 3, 4}
    assert 0.5 < lengths[1] / len(words) < 0.7 and lengths[3] + lengths[4] > 0.15 * len(words)


def test_prompts_are_short(tokenizer):
    lengths = prompt_lengths(tokenizer, [document(index) for index in range(100)])
    assert max(lengths) <= 85 and sum(lengths) / len(lengths) < 65


def test_sequential_row_weighs_repeats_and_ends_sections(tokenizer):
    builder = RowBuilder(tokenizer, TrunkArguments(p_permuted=0.0))
    for index in range(30):
        record = document(index)
        row = builder.sequential(record, random.Random(0))
        assert row.input_ids.count(tokenizer.eos_token_id) == 3
        heavy = tokenizer.decode([t for t, w in zip(row.input_ids, row.weights, strict=True) if w == 5.0])
        spans = [span for stream in record.streams for span in stream.spans]
        repeats = len(spans) - len({span.value for span in spans})
        assert len(heavy.split()) == repeats > 0
        assert set(heavy.split()) <= {span.value for span in spans}


def test_cut_rows_have_fewer_end_tokens(tokenizer):
    builder = RowBuilder(tokenizer, TrunkArguments(p_permuted=1.0, p_cut=1.0))
    ends = [builder.sequential(document(index), random.Random(index)).input_ids.count(1) for index in range(10)]
    assert min(ends) == 1 and max(ends) <= 3


def test_single_row_masks_request_and_header(tokenizer):
    record = document(1)
    row = RowBuilder(tokenizer, TrunkArguments(outline_weight=0.0)).single(record, 1)
    answer = [label for label in row.labels if label != IGNORE]
    assert tokenizer.decode(answer) == record.streams[1].text + "<eos>"
    with_outline = RowBuilder(tokenizer, TrunkArguments()).single(record, 1)
    assert sum(label != IGNORE for label in with_outline.labels) > len(answer)


def test_card_repeats_every_fact(tokenizer):
    builder = RowBuilder(tokenizer, TrunkArguments())
    for seed in range(20):
        card = builder.card(random.Random(seed), 0.1)
        mentions = [(mention.cue, mention.value) for mention in parse_section(tokenizer.decode(card.input_ids))]
        assert len(mentions) == 18 and len(set(mentions)) == 6


def test_corpus_is_deterministic_and_ordered(tokenizer):
    first, second = (list(itertools.islice(TrunkCorpus(tokenizer, SMALL, seed=3), 12)) for _ in range(2))
    assert first == second
    other = list(itertools.islice(TrunkCorpus(tokenizer, SMALL, seed=4), 12))
    assert first != other
    ends = [max(row.input_ids.count(tokenizer.eos_token_id) for row in batch) for batch in first]
    assert ends[:2] == [1, 1] and ends[3] == 1 and ends[9] == 1 and max(ends[2::2]) >= 2


def test_collator_pads_right_with_no_loss():
    rows = [TrunkExample([5, 6, 7], [IGNORE, 6, 7], [0.0, 1.0, 5.0]), TrunkExample([5], [5], [1.0])]
    batch = TrunkCollator(pad_token_id=0)([rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [5, IGNORE, IGNORE]]
    assert batch["weights"].tolist() == [[0.0, 1.0, 5.0], [1.0, 0.0, 0.0]]


def test_loss_by_hand():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(3.0)
    labels, weights = torch.tensor([[1, 2, 3]]), torch.tensor([[9.0, 1.0, 3.0]])
    expected = (1.0 * math.log(2.0) + 3.0 * math.log(4.0)) / 4.0
    assert weighted_lm_loss(logits, labels, weights).item() == pytest.approx(expected, abs=1e-6)
    assert weighted_lm_loss(logits, torch.full_like(labels, IGNORE), weights).item() == 0.0


def test_padding_does_not_change_the_loss(trunk, tokenizer):
    builder = RowBuilder(tokenizer, SMALL)
    rows = [builder.single(document(index), 0) for index in range(3)]
    together = TrunkCollator(0)([rows])

    def loss(batch):
        logits = trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return weighted_lm_loss(logits, batch["labels"], batch["weights"]).item()

    apart = [TrunkCollator(0)([[row]]) for row in rows]
    sizes = [batch["weights"][:, 1:].sum().item() for batch in apart]
    mean = sum(loss(batch) * size for batch, size in zip(apart, sizes, strict=True)) / sum(sizes)
    assert loss(together) == pytest.approx(mean, abs=1e-5)


def test_complete_does_not_depend_on_the_batch(trunk, tokenizer):
    prefixes = [tokenizer.encode("Describe Velmar.\n"), tokenizer.encode("The main crop is barley. The flag")]
    together = complete(trunk, tokenizer, prefixes, 6, temperature=0)
    assert together == [complete(trunk, tokenizer, [prefix], 6, temperature=0)[0] for prefix in prefixes]


@pytest.mark.slow
def test_evaluation_reports_every_split(trunk, tokenizer):
    report = evaluate_trunk(trunk, tokenizer, num_documents=1)
    assert set(report) == {"core", "hard", "heldout", "core_independent", "outline"}
    assert 0.0 <= report["core"]["ended"] <= 1.0


def test_saved_trunk_loads_in_float32(trunk, tokenizer, tmp_path):
    save_trunk(trunk, tokenizer, tmp_path / "trunk")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")
    assert again.dtype == torch.float32
    for name, value in trunk.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(torch.bfloat16).float()), name
    loaded = AutoTokenizer.from_pretrained(tmp_path / "trunk")
    assert loaded.encode("The main crop, barley.\n") == tokenizer.encode("The main crop, barley.\n")
    assert loaded.padding_side == "left" and loaded.eos_token == "<eos>"


@pytest.mark.slow
def test_shipped_trunk_copies_and_ends_its_sections():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), AutoTokenizer.from_pretrained(SHIPPED)
    assert model.dtype == torch.float32
    torch.manual_seed(0)
    documents = [generate_document("test", index, WorldOptions(), with_notes=False) for index in range(24)]
    texts, ended = write_sequential(model, tokenizer, documents)
    summary = summarize([count_document(document, text) for document, text in zip(documents, texts, strict=True)])
    assert ended == 1.0
    assert summary["consistent"] > 0.85 and summary["references"] > 40
    assert summary["on_plan"] > 0.8


@pytest.mark.slow
def test_shipped_tokenizer_is_the_recipe_s():
    telemetry = json.loads((SHIPPED / "telemetry.json").read_text())
    tokenizer = train_tokenizer(telemetry["recipe"]["vocab_size"], telemetry["recipe"]["seed"])
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert shipped.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_of_every_family_has_the_sizes_asked_for(tokenizer, family):
    config = trunk_config(replace(SMALL, model_type=family, intermediate_size=48), tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    assert model.config.model_type == family
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 48)
    ids = torch.tensor([tokenizer.encode("The main crop barley.")])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert config.eos_token_id == tokenizer.eos_token_id and config.tie_word_embeddings


def test_an_unknown_family_and_an_impossible_share_are_refused():
    with pytest.raises(ValueError, match="model_type: 'qwen' is unknown"):
        TrunkArguments(model_type="qwen")
    with pytest.raises(ValueError, match=r"p_foreign=1\.5"):
        TrunkArguments(p_foreign=1.5)
    with pytest.raises(ValueError, match="foreign_until"):
        TrunkArguments(foreign_from=5, foreign_until=3)


def test_cards_of_foreign_types_give_cues_values_of_other_types(tokenizer):
    def foreign(share):
        builder, rng = RowBuilder(tokenizer, SMALL), random.Random(0)
        weights = [builder.card(rng, share).weights for _ in range(20)]
        # A first mention of a foreign value cannot be known: weight 0, else .2.
        return sum(0.0 in row[:-1] for row in weights)

    assert foreign(0.0) == 0 and foreign(1.0) == 20


def test_a_first_mention_in_a_foreign_document_has_no_weight(tokenizer):
    builder = RowBuilder(tokenizer, replace(SMALL, p_permuted=0.0))
    for index in range(10):
        row = builder.sequential(document(index), random.Random(0), p_foreign=1.0)
        answer = [weight for weight, label in zip(row.weights, row.labels, strict=True) if label != IGNORE]
        assert min(answer) > 0 and row.weights.count(5.0) > 0
        silent = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE]
        plain = builder.sequential(document(index), random.Random(0))
        quiet = [token for token, label in zip(plain.input_ids, plain.labels, strict=True) if label == IGNORE]
        assert len(silent) > len(quiet)


def test_foreign_facts_come_in_their_stage_only(tokenizer):
    arguments = replace(SMALL, foreign_from=4, foreign_until=8, p_foreign=0.0, p_foreign_cards=1.0)
    arguments = replace(arguments, p_foreign_documents=1.0, p_cut=0.0)
    batches = list(itertools.islice(TrunkCorpus(tokenizer, arguments, seed=3), 2, 2 + 2 * 12, 2))

    def share_typed(batch):
        mentions = [mention for row in batch for mention in parse_section(tokenizer.decode(row.input_ids))]
        return sum(mention.value in values_of(mention.cue) for mention in mentions) / len(mentions)

    shares = [share_typed(batch) for batch in batches]
    # Words after a cue in a plan count too.
    assert min(shares[:4] + shares[8:]) > 0.8 and max(shares[4:8]) < 0.4
