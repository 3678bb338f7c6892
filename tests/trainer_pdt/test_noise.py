import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_pdt.curriculum import Stage
from trainer_pdt.noise import (
    add_gaussian,
    draw_noise,
    drop_notes,
    drop_streams,
    jitter_lag,
    mix_bus,
    swap_documents,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_probability_zero_and_one():
    exists = torch.tensor([[True, False], [True, True]])
    assert torch.equal(drop_notes(exists, 0.0, seeded()), exists)
    assert not drop_notes(exists, 1.0, seeded()).any()
    assert not mix_bus(3, 4, 0.0, seeded()).any()
    assert mix_bus(3, 4, 1.0, seeded()).all()
    assert drop_streams(5, 0.0, seeded()).all()
    assert not drop_streams(5, 1.0, seeded()).any()
    assert jitter_lag(4, 2, 0.0, seeded()).tolist() == [2, 2, 2, 2]
    assert jitter_lag(4, 2, 1.0, seeded()).tolist() == [0, 0, 0, 0]
    assert swap_documents(3, 2, 0.0, seeded()).tolist() == [0, 1, 2, 3, 4, 5]
    assert swap_documents(2, 3, 1.0, seeded()).tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    "rate",
    [
        lambda p: mix_bus(200, 100, p, seeded()).float().mean(),
        lambda p: 1 - drop_notes(torch.ones(200, 100, dtype=torch.bool), p, seeded()).float().mean(),
        lambda p: 1 - drop_streams(20000, p, seeded()).float().mean(),
        lambda p: (jitter_lag(20000, 1, p, seeded()) == 0).float().mean(),
        lambda p: (swap_documents(20000, 1, p, seeded()) != torch.arange(20000)).float().mean(),
    ],
)
@pytest.mark.parametrize("probability", [0.25, 0.7])
def test_rates(rate, probability):
    assert float(rate(probability)) == pytest.approx(probability, abs=0.015)


def test_drop_never_creates_a_note():
    exists = torch.rand(20, 20, generator=seeded(1)) < 0.5
    left = drop_notes(exists, 0.3, seeded(2))
    assert not (left & ~exists).any() and 0 < left.sum() < exists.sum()


@settings(max_examples=40, deadline=None)
@given(
    documents=st.integers(1, 6), streams=st.integers(1, 5), probability=st.floats(0, 1), seed=st.integers(0, 2**31 - 1)
)
def test_swaps_keep_documents_whole(documents, streams, probability, seed):
    source = swap_documents(documents, streams, probability, seeded(seed)).reshape(documents, streams)
    origin, stream = source // streams, source % streams
    assert torch.equal(stream, torch.arange(streams).expand(documents, streams))
    assert (origin == origin[:, :1]).all()
    assert (origin < documents).all()
    if probability == 1 and documents > 1:
        assert (origin[:, 0] != torch.arange(documents)).all()
    if documents == 1:
        assert (origin == 0).all()


def test_every_other_document_can_be_the_source():
    sources = {swap_documents(4, 1, 1.0, seeded(seed))[0].item() for seed in range(60)}
    assert sources == {1, 2, 3}


def test_gaussian():
    notes = torch.zeros(100, 100, requires_grad=True)
    noisy = add_gaussian(notes, 0.5, seeded())
    assert noisy.std().item() == pytest.approx(0.5, abs=0.02)
    assert noisy.mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.equal(noisy, add_gaussian(notes, 0.5, seeded()))
    noisy.sum().backward()
    assert (notes.grad == 1).all()
    assert add_gaussian(notes, 0.0, seeded()) is notes
    assert add_gaussian(notes.bfloat16(), 0.5, seeded()).dtype == torch.bfloat16


def stage(**noise):
    return Stage(name="a", until=1, train=("snc",), losses={"lm_ce": 1.0}, **noise)


def test_a_draw_is_determined_by_its_seed():
    noise = stage(bus_mix=0.5, note_drop=0.5, note_swap=0.5, stream_dropout=0.5, lag_jitter=0.5)
    one, same, other = (draw_noise(noise, 5, 3, 7, lag=1, generator=seeded(seed)) for seed in (3, 3, 4))
    for name in ("teacher_RK", "keep_RK", "producer_R", "source_R", "lag_R"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert one.teacher_RK.shape == one.keep_RK.shape == (15, 7)
    assert one.producer_R.shape == one.source_R.shape == one.lag_R.shape == one.swapped_R.shape == (15,)
    assert torch.equal(one.swapped_R, one.source_R != torch.arange(15))


def test_one_probability_leaves_the_other_draws_alone():
    plain = draw_noise(stage(lag_jitter=0.5), 4, 3, 6, lag=1, generator=seeded())
    mixed = draw_noise(stage(lag_jitter=0.5, bus_mix=1.0, note_swap=1.0), 4, 3, 6, lag=1, generator=seeded())
    assert torch.equal(plain.lag_R, mixed.lag_R)
    assert mixed.teacher_RK.all() and mixed.swapped_R.all()


def test_a_quiet_stage_changes_nothing():
    quiet = draw_noise(stage(), 4, 3, 6, lag=1, generator=seeded())
    assert quiet.keep_RK.all() and quiet.producer_R.all() and not quiet.teacher_RK.any() and not quiet.swapped_R.any()
    assert (quiet.lag_R == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix_bus(1, 1, 1.5, seeded()), "bus_mix=1.5, allowed: a number at least 0.0 and at most 1.0"),
        (lambda: drop_notes(torch.ones(1).bool(), -0.1, seeded()), "note_drop=-0.1"),
        (lambda: drop_streams(1, float("nan"), seeded()), "stream_dropout=nan"),
        (lambda: swap_documents(1, 1, 2, seeded()), "note_swap=2"),
        (lambda: jitter_lag(1, 0, 0.5, seeded()), "lag=0, allowed: a number at least 1"),
        (lambda: add_gaussian(torch.zeros(1), -1.0, seeded()), "note_noise=-1.0"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
