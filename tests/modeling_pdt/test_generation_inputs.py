"""Arguments of generate(): text, plans, seeds, and what is said about impossible ones."""

import logging

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from modeling_pdt import PDTForParallelDecoding, PDTGenerationConfig
from modeling_pdt.generation_inputs import merge_generation_config, prepare_inputs, write_outlines
from tests.modeling_pdt.conftest import llama_trunk

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ALPHABET = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;#'-"


class Letters:
    """A tokenizer of single characters: pad 0, end 1, the alphabet from 2 on."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ALPHABET.index(letter) + 2 for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(ALPHABET[i - 2] for i in ids if 2 <= i < len(ALPHABET) + 2)


@pytest.fixture
def model(make_model):
    return make_model("llama", trained=True)


@pytest.fixture(scope="module")
def untouched():
    """A model that refusals leave as it is."""
    return PDTForParallelDecoding.from_trunk(llama_trunk(), notes_dim=16, block_size=4)


def prepare(model, ids=IDS, seed=0, **kwargs):
    arguments = ("attention_mask", "tokenizer", "plan_texts", "stream_prefixes", "seed_texts", "seed_notes")
    given = {name: kwargs.pop(name) for name in (*arguments, "interventions") if name in kwargs}
    with torch.no_grad():
        return prepare_inputs(model, merge_generation_config(model, None, kwargs), ids, seed=seed, **given)


BAD = [
    ({"ids": None}, r"input_ids must have shape \[prompts >= 1, tokens >= 1\], got None"),
    ({"ids": torch.tensor([1, 2])}, r"input_ids must have shape .*, got \[2\]"),
    ({"ids": torch.zeros(0, 3).long()}, r"input_ids must have shape .*, got \[0, 3\]"),
    ({"ids": torch.zeros(1, 0).long()}, "prompt 0 is empty; every prompt needs at least one token"),
    ({"ids": [[5, 6]]}, r"input_ids must be a tensor of integers, got list"),
    ({"ids": IDS.float()}, r"input_ids must be a tensor of integers, got torch.float32"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "prompt 1 is empty"),
    ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have the shape of input_ids \[2, 4\], got \[2, 3\]"),
    ({"num_streams": 0}, r"num_streams.*0"),
    ({"block_size": 0}, "block_size"),
    ({"block_size": 5}, r"block_size must be in \[1, commit_horizon=4\], got 5"),
    ({"bus_lag": 0}, "bus_lag"),
    ({"bus_capacity": 0}, "bus_capacity"),
    ({"max_retries": -1}, "max_retries"),
    ({"retry_policy": "again"}, "retry_policy.*again"),
    ({"agreement_threshold": 1.5}, "agreement_threshold.*1.5"),
    ({"gate_scale": -1.0}, "gate_scale.*-1"),
    ({"plan": "oracle"}, "plan.*oracle"),
    ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
    ({"max_new_tokens": "5"}, "max_new_tokens must be an integer >= 1, got '5'"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, got 2.5"),
    ({"max_length": 40}, "max_length counts the prompt: use max_new_tokens, got 40"),
    ({"eos_token_id": "end"}, "eos_token_id must be an integer or a list of integers, got 'end'"),
    ({"pad_token_id": -5}, "pad_token_id must be an integer >= 0, got -5"),
    ({"num_beams": 4}, "num_beams must be None or 1: parallel decoding .*, got 4"),
    ({"num_return_sequences": 2}, "num_return_sequences must be None or 1: .*, got 2"),
    ({"output_scores": True}, "output_scores must be None or False: .*, got True"),
    ({"use_cache": False}, "use_cache must be None or True: .*, got False"),
    # Without a word these had no effect.
    ({"penalty_alpha": 0.6}, "penalty_alpha must be None: .*, got 0.6"),
    ({"use_mtp": True}, "use_mtp must be None or False: .*, got True"),
    ({"dola_layers": "low"}, "dola_layers must be None: .*, got 'low'"),
    ({"force_words_ids": [[5]]}, r"force_words_ids must be None: .*, got \[\[5\]\]"),
    ({"guidance_scale": 1.5}, "guidance_scale must be None or 1: .*, got 1.5"),
    ({"stream_count": 3}, r"generate\(\) got unknown arguments \['stream_count'\]"),
    ({"stop_strings": ["end"]}, r"stop_strings=\['end'\] is text: pass tokenizer="),
    ({"seed": "7"}, r"seed must be an integer in .*, got '7'"),
    ({"plan": "trunk"}, 'plan="trunk" reads the outline as text: pass tokenizer='),
    ({"plan_texts": [{"text": "mayor"}]}, "plan_texts is text: pass tokenizer="),
    ({"stream_prefixes": ["a", "b", "c"]}, "stream_prefixes is text: pass tokenizer="),
    ({"seed_texts": ["a", "b", "c"]}, "seed_texts is text: pass tokenizer="),
    ({"stream_prefixes": ["a", "b"]}, r"stream_prefixes must be \[stream\] .* 2 prompts and 3 streams, got 2 texts"),
    ({"stream_prefixes": [["a", "b", "c"]]}, r"stream_prefixes must be .* 2 prompts and 3 streams, got \[3\] texts"),
    ({"stream_prefixes": "abc"}, r"stream_prefixes must be a list of texts, .*, got 'abc'"),
    ({"stream_prefixes": ["a", 1, "c"]}, "stream_prefixes must hold texts, got 1"),
    ({"seed_texts": ["a"]}, "seed_texts must be"),
    ({"plan_texts": "mayor"}, "plan_texts must be a list of .*, got 'mayor'"),
    ({"plan_texts": [[{"text": "mayor"}]]}, r"plan_texts must be a list of entries, or one per prompt \(2\), got 1"),
    ({"plan_texts": [{"text": "mayor", "stream": 3}]}, r"plan_texts: stream must be in \[0, 2\], got 3"),
    ({"plan_texts": [{"stream": 1}]}, "a plan_texts entry must be"),
    ({"seed_notes": torch.zeros(2, 3, 5)}, r"seed_notes must have shape \[prompts=2, places, notes_dim=16\], got"),
    ({"seed_notes": torch.zeros(16)}, r"seed_notes must have shape .*, got \[16\]"),
    ({"interventions": ["swap"]}, "interventions must hold Intervention objects, got 'swap'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_impossible_arguments_are_named(untouched, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(untouched, **arguments)


def test_a_generation_config_is_one(untouched):
    # A mapping failed without a word of which argument was meant.
    with pytest.raises(ValueError, match=r"generation_config must be a GenerationConfig, got \{'top_k': 3\}"):
        merge_generation_config(untouched, {"top_k": 3}, {})


def test_none_means_the_models_value(model):
    _, settings = prepare(model)
    assert (settings.num_streams, settings.block_size, settings.bus_lag, settings.bus_capacity) == (3, 4, 1, 16)
    _, settings = prepare(model, num_streams=5, block_size=2, bus_lag=2, bus_capacity=3, seed=9)
    assert (settings.num_streams, settings.block_size, settings.bus_lag, settings.bus_capacity) == (5, 2, 2, 3)
    assert settings.seed == 9


def test_the_nearest_configuration_wins(model):
    model.generation_config.max_retries = 4
    model.generation_config.eos_token_id = 17
    assert merge_generation_config(model, None, {}).max_retries == 4
    plain = merge_generation_config(model, GenerationConfig(top_k=3), {})
    assert (plain.max_retries, plain.top_k, plain.eos_token_id) == (4, 3, 17)
    own = merge_generation_config(model, PDTGenerationConfig(max_retries=2, plan="planner"), {"plan": None})
    assert (own.max_retries, own.plan, own.eos_token_id) == (2, None, 17)
    assert merge_generation_config(model, None, {"eos_token_id": None}).eos_token_id is None
    assert model.generation_config.max_retries == 4


def test_headers_are_per_stream_or_per_prompt(model):
    letters = Letters()
    inputs, _ = prepare(model, tokenizer=letters, stream_prefixes=["ab", "", "c"])
    assert inputs.headers == [letters("ab")["input_ids"], [], letters("c")["input_ids"]] * 2
    inputs, _ = prepare(model, tokenizer=letters, stream_prefixes=[["a", "b", "c"], ["d", "e", "f"]])
    assert inputs.headers == [letters(letter)["input_ids"] for letter in "abcdef"]


def test_plan_texts_are_per_call_or_per_prompt(model):
    items = [{"text": "mayor", "stream": 1}, {"text": "river"}]
    inputs, _ = prepare(model, tokenizer=Letters(), plan_texts=items)
    assert inputs.plan_BPN.shape == (2, 2, 16) and inputs.plan_mask_BP.all()
    assert torch.allclose(inputs.plan_BPN[0], inputs.plan_BPN[1])
    assert (inputs.num_items, inputs.plan_source) == (2, "external")
    ragged, _ = prepare(model, tokenizer=Letters(), plan_texts=[items, items[1:]])
    assert ragged.plan_mask_BP.tolist() == [[True, True], [True, False]]
    assert torch.allclose(ragged.plan_BPN[1, 0], inputs.plan_BPN[0, 1], atol=1e-6)
    none, _ = prepare(model, plan_texts=[])
    assert none.plan_BPN is None


def test_seeds_become_places_of_snapshot_0(model):
    inputs, _ = prepare(model, seed_notes=torch.randn(5, 16))
    assert inputs.plan_BPN.shape == (2, 5, 16) and inputs.num_items == 0
    inputs, _ = prepare(model, tokenizer=Letters(), plan_texts=[{"text": "mayor"}], seed_texts=["barley", "", "river"])
    per_text = model.config.notes_per_block
    assert inputs.plan_BPN.shape == (2, 1 + 3 * per_text, 16)
    assert inputs.plan_mask_BP[0].tolist() == [True] * (1 + per_text) + [False] * per_text + [True] * per_text
    assert inputs.num_items == 1
    assert torch.isfinite(inputs.plan_BPN).all()


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
def test_seeds_and_plans_change_what_is_written(make_model, name):
    model = make_model(name, trained=True)
    arguments = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "tokenizer": Letters()}
    ways = [
        {},
        {"seed_notes": torch.randn(3, 16)},
        {"seed_texts": ["barley", "", "the river"]},
        {"plan_texts": [{"text": "mayor", "stream": 0}]},
        {"plan": "planner"},
    ]
    written = [model.generate(IDS, **arguments, **way).tolist() for way in ways]
    assert all(left != right for index, left in enumerate(written) for right in written[:index])
    again = model.generate(IDS, **arguments, **ways[2]).tolist()
    assert again == written[2]


def test_coverage_is_told_for_own_and_unowned_items(model):
    items = [{"text": "mayor", "stream": 1}, {"text": "river"}, {"text": "crop", "stream": 0}]
    output = model.generate(IDS, tokenizer=Letters(), plan_texts=items, max_new_tokens=6, return_dict_in_generate=True)
    assert [sorted(row.coverage) for row in output.streams[0]] == [[1, 2], [0, 1], [1]]
    assert all(0 <= value <= 1 for row in output.streams[1] for value in row.coverage.values())
    planned = output.trace.of_kind("plan")
    assert [event["prompt"] for event in planned] == [0, 1]
    assert planned[0]["items"][0].items() >= {"text": "mayor", "stream": 1}.items()


def fake_outline(model, monkeypatch, text):
    """Lets the trunk write `text` when it is asked for an outline."""
    generate = model.trunk.generate

    def write(input_ids, generation_config, custom_generate=None, **kwargs):
        if custom_generate is not None:
            return generate(
                input_ids=input_ids, generation_config=generation_config, custom_generate=custom_generate, **kwargs
            )
        write.calls.append(generation_config)
        ids = torch.tensor(Letters()(text)["input_ids"])
        return torch.cat([input_ids, ids.expand(len(input_ids), -1)], dim=1)

    write.calls = []
    monkeypatch.setattr(model.trunk, "generate", write)
    return write.calls


def test_the_trunk_writes_the_plan(model, monkeypatch):
    calls = fake_outline(model, monkeypatch, "1. Farming: main crop; soil\n2. Places: river\n\n## Fa")
    inputs, _ = prepare(model, IDS[:1], tokenizer=Letters(), plan="trunk", outline_max_new_tokens=64)
    assert calls[0].max_new_tokens == 64
    assert [(entry.text, entry.stream) for entry in inputs.entries[0]] == [("main crop", 0), ("soil", 0), ("river", 1)]
    assert [Letters().decode(header) for header in inputs.headers] == ["## Farming\n", "## Places\n", "## Part 3\n"]
    assert inputs.prompts[0][:4] == IDS[0].tolist()
    assert Letters().decode(inputs.prompts[0][4:]) == "1. Farming: main crop; soil\n2. Places: river\n\n"
    assert inputs.plan_source == "trunk" and inputs.num_items == 3
    own, _ = prepare(model, IDS[:1], tokenizer=Letters(), plan="trunk", stream_prefixes=["a", "b", "c"])
    assert [Letters().decode(header) for header in own.headers] == ["a", "b", "c"]
    output = model.generate(
        IDS, tokenizer=Letters(), plan="trunk", max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True
    )
    assert Letters().decode(output.merged[0].tolist()).count("## Farming\n") >= 1
    assert output.trace.settings["plan"] == "trunk"
    assert len(calls) == 3


def test_an_outline_for_another_number_of_streams_is_told(model, monkeypatch, caplog):
    # With 2 streams the third line was dropped, with 4 the last stream got no items, and nothing was said.
    fake_outline(model, monkeypatch, "1. Farming: main crop\n2. Places: river\n3. People: mayor\n\n")
    call = {"ids": IDS[:1], "tokenizer": Letters(), "plan": "trunk"}
    with caplog.at_level(logging.WARNING):
        prepare(model, **call, num_streams=3)
        assert not caplog.records
        for streams in (2, 4):
            prepare(model, **call, num_streams=streams)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the trunk wrote an outline of 3 lines for num_streams=2",
        "the trunk wrote an outline of 3 lines for num_streams=4",
    ]


def test_outlines_of_a_batch_are_those_of_the_prompts_one_by_one(model, monkeypatch):
    generate = model.trunk.generate

    def without_stop_strings(generation_config, tokenizer, **inputs):
        generation_config.stop_strings = None
        return generate(generation_config=generation_config, **inputs)

    monkeypatch.setattr(model.trunk, "generate", without_stop_strings)
    prompts = [torch.randint(2, 97, (length,)).tolist() for length in (4, 9, 6)]

    class Numbers(Letters):
        def decode(self, ids, **kwargs):
            return "1. A: " + " ".join(str(int(i)) for i in ids if i > 1) + "\n\n"

    config = PDTGenerationConfig(outline_max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    _, together = write_outlines(model, Numbers(), prompts, config)
    alone = [write_outlines(model, Numbers(), [prompt], config)[1][0] for prompt in prompts]
    assert together == alone and len({str(plan) for plan in alone}) == 3


def test_a_trunk_that_writes_no_outline_is_told(model, monkeypatch):
    fake_outline(model, monkeypatch, "no idea\n\n")
    with pytest.raises(ValueError, match=r"the trunk wrote no outline of the form '1. Header: item; item', but 'no"):
        prepare(model, IDS[:1], tokenizer=Letters(), plan="trunk")


def test_stop_strings_end_a_row(model):
    letters = Tokenizer(models.WordLevel({chr(33 + index): index for index in range(97)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="!", pad_token="!")
    free = model.generate(IDS, max_new_tokens=9, eos_token_id=None, do_sample=True, return_dict_in_generate=True)
    token = free.streams[0][0].token_ids[4]
    output = model.generate(
        IDS,
        max_new_tokens=9,
        eos_token_id=None,
        do_sample=True,
        stop_strings=[chr(33 + token)],
        tokenizer=tokenizer,
        return_dict_in_generate=True,
    )
    for row in output.streams[0]:
        assert len(row.token_ids) == (row.token_ids.index(token) + 1 if token in row.token_ids else 9)
    assert len(output.streams[0][0].token_ids) <= 5


def test_no_warning_without_a_reason(model, caplog):
    with caplog.at_level(logging.WARNING):
        model.generate(IDS, max_new_tokens=3, do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=1)
    assert not [record for record in caplog.records if "modeling_pdt" in record.name]
