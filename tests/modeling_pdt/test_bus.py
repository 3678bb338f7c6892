"""The notes bus against a plain dictionary; windows of training against windows of decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pdt.bus import NotesBus, training_window, visible_notes

PER_BLOCK, WIDTH = 2, 3


def stamp(row: int, round_: int) -> torch.Tensor:
    """Notes `[K, N]` that tell who wrote them and when."""
    return torch.tensor([[row, round_, place] for place in range(PER_BLOCK)], dtype=torch.float32)


def read(bus: NotesBus, row: int, read_round: int, lag: int, **choices) -> list[tuple[int, int]]:
    """`(row, round)` of the notes in a reader's window, in window order, each counted once."""
    notes, mask = bus.window(torch.tensor([row]), torch.tensor([read_round]), torch.tensor([lag]), **choices)
    seen = notes[0][mask[0]]
    assert [int(place) for *_, place in seen.tolist()] == list(range(PER_BLOCK)) * (len(seen) // PER_BLOCK)
    return [(int(writer), int(version)) for writer, version, place in seen.tolist() if place == 0]


def expected_notes(published, row, read_round, lag, streams, capacity) -> list[tuple[int, int]]:
    """The rule in words: siblings, not newer than `read_round - lag`, at most `capacity` rounds."""
    newest = read_round - lag
    return sorted(
        (writer, version)
        for writer, version in published
        if writer // streams == row // streams and writer != row and newest - capacity < version <= newest
    )


def publish(bus: NotesBus, *places: tuple[int, int]) -> None:
    rows, rounds = (torch.tensor(part) for part in zip(*places, strict=True))
    bus.publish(rows, rounds, torch.stack([stamp(row, round_) for row, round_ in places]))


def test_empty_bus_shows_nothing():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    notes, mask = bus.window(torch.tensor([0, 1]), torch.tensor([0, 5]), torch.tensor([1, 1]))
    assert notes.shape == (2, 0, WIDTH) and mask.shape == (2, 0)


def test_siblings_notes_in_order_after_the_lag():
    bus = NotesBus(1, 3, PER_BLOCK, WIDTH, capacity=8)
    publish(bus, (2, 1), (0, 0), (1, 0))
    publish(bus, (2, 0), (1, 1))
    assert read(bus, 0, 0, 1) == []
    assert read(bus, 0, 1, 1) == [(1, 0), (2, 0)]
    assert read(bus, 0, 2, 1) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert read(bus, 0, 2, 2) == [(1, 0), (2, 0)]
    assert read(bus, 0, 1, 0) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert read(bus, 1, 1, 1) == [(0, 0), (2, 0)]


def test_own_notes_only():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=8)
    publish(bus, (0, 0), (1, 0), (0, 1))
    assert read(bus, 0, 2, 1, own_notes=True) == [(0, 0), (0, 1)]


def test_capacity_counts_rounds_and_is_fair_to_producers():
    bus = NotesBus(1, 3, PER_BLOCK, WIDTH, capacity=2)
    publish(bus, *((row, round_) for row in (1, 2) for round_ in range(6)))
    assert read(bus, 0, 6, 1) == [(1, 4), (1, 5), (2, 4), (2, 5)]
    assert read(bus, 0, 3, 1) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    # A producer that ended early keeps no place of others, and its old notes leave the window.
    assert read(bus, 0, 7, 1) == [(1, 5), (2, 5)]
    assert read(bus, 0, 9, 1) == []


def test_prompts_are_separate():
    bus = NotesBus(2, 2, PER_BLOCK, WIDTH, capacity=4)
    publish(bus, (0, 0), (1, 0), (2, 0), (3, 0))
    assert read(bus, 0, 1, 1) == [(1, 0)] and read(bus, 3, 1, 1) == [(2, 0)]
    assert read(bus, 0, 1, 1, sources=torch.tensor([2])) == [(3, 0)]


def test_withdrawn_notes_are_gone_and_can_be_written_again():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    publish(bus, (1, 0), (1, 1))
    bus.withdraw(torch.tensor([1]), torch.tensor([0]))
    assert read(bus, 0, 2, 1) == [(1, 1)]
    bus.publish(torch.tensor([1]), torch.tensor([0]), stamp(7, 7)[None])
    assert read(bus, 0, 2, 1) == [(7, 7), (1, 1)]


def test_reader_ahead_of_the_storage():
    # The storage grows by 8 rounds; a reader judged in round 8 with lag 0 must not take round 7 for round 8,
    # and a reader far ahead must still see every stored round within capacity.
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=16)
    publish(bus, *((1, round_) for round_ in range(8)))
    assert bus.published_BSV.shape[2] == 8
    assert read(bus, 0, 8, 0) == [(1, round_) for round_ in range(8)]
    assert read(bus, 0, 12, 1) == [(1, round_) for round_ in range(8)]
    assert read(bus, 0, 20, 1) == [(1, round_) for round_ in range(4, 8)]


@pytest.mark.parametrize("places", [[(0, 0), (0, 0)], [(0, 1)]])
def test_publishing_a_round_twice_is_refused(places):
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    publish(bus, (0, 1), (1, 0))
    with pytest.raises(ValueError, match="published once"):
        publish(bus, *places)
    assert read(bus, 1, 3, 1) == [(0, 1)]


def test_negative_rounds_are_refused():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    with pytest.raises(ValueError, match=r"round.*>= 0"):
        publish(bus, (0, -1))


def test_misshapen_notes_and_plans_are_refused():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    for shape in ((1, PER_BLOCK, WIDTH + 1), (1, PER_BLOCK + 1, WIDTH)):
        with pytest.raises(ValueError, match=rf"\[M, {PER_BLOCK}, {WIDTH}\], got"):
            bus.publish(torch.tensor([0]), torch.tensor([0]), torch.zeros(shape))
    for shape in ((2, 5, WIDTH), (1, 5, WIDTH + 1)):
        with pytest.raises(ValueError, match=rf"plan must have shape \[1, P, {WIDTH}\]"):
            NotesBus(1, 2, PER_BLOCK, WIDTH, 4, torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool))


def test_plan_is_pinned():
    plan, mask = torch.randn(2, 3, WIDTH), torch.tensor([[True, True, False], [True, False, False]])
    bus = NotesBus(2, 2, PER_BLOCK, WIDTH, 1, plan, mask)
    publish(bus, (1, 0), (1, 1), (1, 2))
    for read_round in (0, 1, 5):
        notes, seen = bus.window(torch.tensor([0, 3]), torch.full((2,), read_round), torch.ones(2, dtype=torch.long))
        assert torch.equal(notes[:, :3], plan) and torch.equal(seen[:, :3], mask)
    # Reading in another prompt's place keeps the reader's own plan.
    notes, _ = bus.window(torch.tensor([0]), torch.tensor([2]), torch.tensor([1]), sources=torch.tensor([2]))
    assert torch.equal(notes[:, :3], plan[:1])


def test_no_rows():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    none = torch.zeros(0, dtype=torch.long)
    bus.publish(none, none, torch.zeros(0, PER_BLOCK, WIDTH))
    notes, mask = bus.window(none, none, none)
    assert notes.shape == (0, 0, WIDTH) and mask.shape == (0, 0)


def test_stored_notes_are_copies():
    bus = NotesBus(1, 2, PER_BLOCK, WIDTH, capacity=4)
    notes = stamp(1, 0)[None]
    bus.publish(torch.tensor([1]), torch.tensor([0]), notes)
    notes.fill_(9)
    assert read(bus, 0, 1, 1) == [(1, 0)]


ROUNDS = st.integers(0, 20)


@settings(max_examples=60)
@given(
    streams=st.integers(1, 4),
    capacity=st.integers(1, 6),
    operations=st.lists(st.tuples(st.integers(0, 7), ROUNDS, st.booleans()), max_size=40),
    readers=st.lists(st.tuples(st.integers(0, 7), ROUNDS, st.integers(0, 3)), min_size=1, max_size=6),
)
def test_bus_equals_a_dictionary(streams, capacity, operations, readers):
    bus = NotesBus(2, streams, PER_BLOCK, WIDTH, capacity)
    published: set[tuple[int, int]] = set()
    for row, round_, withdraw in operations:
        place = (row % (2 * streams), round_)
        if withdraw and place in published:
            bus.withdraw(torch.tensor([place[0]]), torch.tensor([place[1]]))
            published.remove(place)
        elif not withdraw and place not in published:
            publish(bus, place)
            published.add(place)
    readers = [(row % (2 * streams), read_round, lag) for row, read_round, lag in readers]
    notes, mask = bus.window(*(torch.tensor(part) for part in zip(*readers, strict=True)))
    for index, (row, read_round, lag) in enumerate(readers):
        seen = sorted({(int(w), int(v)) for w, v, _ in notes[index][mask[index]].tolist()})
        assert seen == expected_notes(published, row, read_round, lag, streams, capacity)
        assert int(mask[index].sum()) == PER_BLOCK * len(seen)
        assert read(bus, row, read_round, lag) == seen


@settings(max_examples=60)
@given(
    documents=st.integers(1, 2),
    streams=st.integers(1, 4),
    rounds=st.integers(1, 10),
    capacity=st.integers(1, 6),
    with_plan=st.booleans(),
    data=st.data(),
)
def test_windows_of_training_are_windows_of_decoding(documents, streams, rounds, capacity, with_plan, data):
    rows, tokens = documents * streams, 6
    written = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * rounds, max_size=rows * rounds)))
    written = written.view(rows, rounds)
    numbers = st.integers(0, rounds + 2)
    read_round = torch.tensor(data.draw(st.lists(numbers, min_size=rows * tokens, max_size=rows * tokens)))
    read_round = read_round.view(rows, tokens)
    lag = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))[:, None]
    plan = torch.full((documents, 2, WIDTH), -1.0) if with_plan else None
    plan_mask = torch.tensor([[True, False]] * documents) if with_plan else None

    all_notes = torch.stack([torch.stack([stamp(r, v) for v in range(rounds)]) for r in range(rows)])
    window, mask = training_window(all_notes, written, read_round, lag, streams, capacity, plan, plan_mask)
    bus = NotesBus(documents, streams, PER_BLOCK, WIDTH, capacity, plan, plan_mask)
    places = [(r, v) for r in range(rows) for v in range(rounds) if written[r, v]]
    if places:
        publish(bus, *places)
    everyone = torch.arange(rows)
    for token in range(tokens):
        notes, seen = bus.window(everyone, read_round[:, token], lag[:, 0])
        for row in range(rows):
            training = window[row // streams][mask[row, token]]
            assert torch.equal(notes[row][seen[row]], training)
            own = (training[:, 0] == row) & (training[:, 0] >= 0)
            too_new = (training[:, 0] >= 0) & (training[:, 1] > read_round[row, token] - lag[row, 0])
            assert not own.any() and not too_new.any()


def test_training_window_before_the_section_sees_nothing():
    notes, written = torch.randn(2, 3, PER_BLOCK, WIDTH), torch.ones(2, 3, dtype=torch.bool)
    read_round = torch.tensor([[-1, -1, 0, 3], [-1, 0, 1, 2]])
    plan, plan_mask = torch.randn(1, 2, WIDTH), torch.tensor([[True, True]])
    window, mask = training_window(
        notes, written, read_round, torch.ones(2, 1, dtype=torch.long), 2, 4, plan, plan_mask
    )
    assert window.shape == (1, 2 + 2 * 3 * PER_BLOCK, WIDTH) and mask.shape == (2, 4, 14)
    assert mask.sum(-1).tolist() == [[0, 0, 2, 2 + 3 * PER_BLOCK], [0, 2, 2 + PER_BLOCK, 2 + 2 * PER_BLOCK]]


def test_visible_notes_broadcasts_over_rows_and_tokens():
    reader, producer = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1, 1])
    version = torch.tensor([0, 0, -1])
    seen = visible_notes(
        reader, torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long), producer, version, 4
    )
    assert seen.shape == (2, 3, 3) and seen[0, 0].tolist() == [False, True, False]
