"""Keyed randomness, processors on each row's own history, inverse-CDF choice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from modeling_pdt.generation_inputs import merge_generation_config
from modeling_pdt.sampling import (
    capture_processors,
    choose_tokens,
    history_free,
    keyed_uniform,
    mix,
    process_logits,
    prompt_keys,
    row_processors,
)


def uniforms(seed, count=4096, attempt=0):
    position = torch.arange(count)
    return keyed_uniform(
        *(torch.full_like(position, value) for value in (seed, 12345, 1)), position, position * 0 + attempt
    )


def test_uniform_numbers_are_uniform_and_independent():
    sample = uniforms(0)
    assert sample.min() >= 0 and sample.max() < 1
    counts = torch.histc(sample.float(), 16, 0, 1)
    assert ((counts - 256) ** 2 / 256).sum() < 37.7  # chi-square, 15 degrees of freedom, p = 0.001
    others = torch.stack([sample, uniforms(1), uniforms(0, attempt=1), sample.roll(1)])
    correlation = torch.corrcoef(others) - torch.eye(4)
    assert correlation.abs().max() < 0.06


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5), st.integers(0, 4))
def test_every_key_counts_and_only_the_keys(keys, changed):
    tensors = [torch.tensor([key, key]) for key in keys]
    first = keyed_uniform(*tensors)
    assert first[0] == first[1]
    tensors[changed] = tensors[changed] ^ 1
    assert keyed_uniform(*tensors)[0] != first[0]


def test_keys_do_not_commute():
    a, b = torch.tensor([1]), torch.tensor([2])
    assert keyed_uniform(a, b) != keyed_uniform(b, a)


def test_mix_is_the_published_generator():
    # First outputs of SplitMix64 seeded with 0.
    state = torch.tensor([0])
    assert [int(mix(state)) & (2**64 - 1)] == [0xE220A8397B1DCDAF]
    assert int(mix(state + (0x9E3779B97F4A7C15 - (1 << 64)))) & (2**64 - 1) == 0x6E789E6AA1B965F4


def test_prompt_keys_tell_prompts_and_repetitions_apart():
    keys = prompt_keys([[1, 2], [2, 1], [1, 2], [1], [1, 2]])
    assert len(set(keys)) == 5
    assert prompt_keys([[1], [1, 2], [1, 2], [1, 2]])[1:] == [keys[0], keys[2], keys[4]]


def test_choice_follows_the_distribution():
    scores = torch.tensor([[1.0, -float("inf"), 0.0, 2.0]]).expand(8192, -1)
    tokens = choose_tokens(scores, True, uniforms(3, 8192))
    frequency = torch.bincount(tokens, minlength=4) / 8192
    assert frequency[1] == 0
    assert (frequency - scores[0].softmax(0)).abs().max() < 0.02
    assert choose_tokens(scores[:1], False, None).tolist() == [3]
    edges = choose_tokens(scores[:2], True, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.double))
    assert edges.tolist() == [0, 3]


def test_processors_see_each_rows_own_history():
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])
    histories = [torch.tensor([1]), torch.tensor([2, 2]), torch.tensor([3])]
    scores = process_logits(torch.ones(3, 5), [processors] * 3, histories)
    expected = torch.ones(3, 5)
    for row, token in enumerate((1, 2, 3)):
        expected[row, token] = 0.5
    assert torch.equal(scores, expected)
    assert not history_free([processors] * 3)


def test_history_free_processors_need_no_history():
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopKLogitsWarper(1)])
    assert history_free([processors] * 2)
    assert not history_free([processors, LogitsProcessorList(processors)])
    scores = process_logits(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), [processors] * 2, [])
    assert scores.tolist() == [[-float("inf"), 4.0], [8.0, -float("inf")]]
    assert torch.equal(process_logits(torch.ones(1, 2), [LogitsProcessorList()], []), torch.ones(1, 2))


PROMPTS = torch.tensor([[0, 0, 0, 0, 5, 6], [7, 8, 9, 10, 11, 12]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def sections(model, **arguments):
    """What one stream per prompt writes, prompts of two lengths in a batch; and what the trunk's `generate` does."""
    values = {**GREEDY, **arguments}
    output = model.generate(
        PROMPTS, attention_mask=(PROMPTS > 0).long(), num_streams=1, return_dict_in_generate=True, **values
    )
    expected = []
    for prompt in PROMPTS:
        ids = prompt[prompt > 0][None]
        with model.disable_adapter():
            written = model.trunk.generate(ids, attention_mask=torch.ones_like(ids), **values)
        expected.append(written[0, ids.shape[1] :].tolist())
    return [row.token_ids for rows in output.streams for row in rows], expected


@pytest.mark.parametrize(
    "arguments",
    [
        # These were taken for the loop's own and dropped.
        {"stopping_criteria": [MaxLengthCriteria(7)]},
        {"stopping_criteria": [EosTokenCriteria(list(range(2, 60)))]},
        # The processor of the first prompt served every row.
        {"begin_suppress_tokens": list(range(1, 96))},
        {"encoder_repetition_penalty": 9.0},
    ],
    ids=["length", "end", "begin", "penalty"],
)
def test_criteria_and_processors_act_as_in_the_trunks_generate(make_model, arguments):
    model = make_model("llama")
    written, expected = sections(model, **arguments)
    assert written == expected
    assert expected != sections(model)[1]


def test_processors_that_keep_a_prompt_are_each_rows_own(make_model):
    model = make_model("llama")
    config = merge_generation_config(model, None, {"encoder_no_repeat_ngram_size": 1})
    processors, _ = row_processors(model, config, [[5, 6], [7, 8]], 4)
    for row, prompt in enumerate(([5, 6], [7, 8])):
        scores = processors[row](torch.tensor([prompt]), torch.zeros(1, 97))
        assert scores.isinf().nonzero()[:, 1].tolist() == prompt


def test_what_the_trunks_configuration_counts_serves_every_length(make_model):
    # Only the model's own configuration was looked at, and the first prompt's processor served every row.
    model = make_model("llama")
    model.trunk.generation_config.min_new_tokens = 4
    written, expected = sections(model, eos_token_id=list(range(1, 90)))
    assert written == expected and {len(tokens) for tokens in written} == {5}


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.7), ("top_k", 20), ("top_p", 0.8), ("min_p", 0.1), ("repetition_penalty", 1.1)],
)
def test_none_switches_a_choice_of_the_trunk_off(make_model, field, value):
    # The trunk's value came back.
    model = make_model("llama")
    model.trunk.generation_config = GenerationConfig(do_sample=True, **{field: value})
    kept = capture(model, do_sample=True)
    assert field in kept
    assert field not in capture(model, do_sample=True, **{field: None})


def capture(model, **arguments):
    """Names of the choices whose processors a call uses, those that change nothing left out."""
    neutral = {"temperature": 1.0, "min_p": 0.0, "penalty": 1.0, "top_k": 0, "top_p": 1.0}
    names = {"penalty": "repetition_penalty"}
    config = merge_generation_config(model, None, arguments)
    processors, _ = capture_processors(model, config, [5, 6], 4)
    pairs = [(name, value) for processor in processors for name, value in vars(processor).items() if name in neutral]
    return {names.get(name, name) for name, value in pairs if value != neutral[name]}


def test_stop_strings_of_the_trunk_are_refused(make_model):
    # The message asked for a tokenizer, also when one was given.
    model = make_model("llama")
    model.trunk.generation_config.stop_strings = ["end"]
    with pytest.raises(ValueError, match=r"trunk's generation_config.stop_strings=\['end'\], allowed: None"):
        model.generate(PROMPTS, **GREEDY)


def test_a_processor_derived_from_a_warper_sees_the_history(make_model):
    # Taken for one that looks at the scores only, it got a history of no tokens.
    lengths = []

    class Watching(TopKLogitsWarper):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    make_model("llama").generate(PROMPTS[1:], num_streams=1, logits_processor=[Watching(3)], **GREEDY)
    assert lengths == [6, 7, 8, 9, 10, 11]
