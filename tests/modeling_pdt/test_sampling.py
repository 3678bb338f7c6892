"""Keyed randomness, processors on each row's own history, inverse-CDF choice."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from modeling_pdt.sampling import choose_tokens, history_free, keyed_uniform, mix, process_logits, prompt_keys


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
