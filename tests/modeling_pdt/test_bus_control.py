"""Topology, own notes, retention, dtype and memory of the notes bus: each changes what is read, and only that."""

import pytest
import torch

from modeling_pdt.bus import NotesBus, topology_matrix
from modeling_pdt.generation_inputs import merge_generation_config, prepare_inputs
from modeling_pdt.generation_pdt import ParallelDecoder
from modeling_pdt.interventions import Ablate, SelfOnly
from modeling_pdt.retention import merge_rounds, novelty, retained_places, select_older

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(make_model):
    """A tiny PDT model on Llama whose parameters have moved."""
    return make_model("llama", trained=True)


def decoder_for(model, **kwargs):
    seed = kwargs.pop("seed", 0)
    interventions = kwargs.pop("interventions", None)
    config = merge_generation_config(model, None, {"eos_token_id": None, "max_new_tokens": 20, **kwargs})
    return ParallelDecoder(model, *prepare_inputs(model, config, IDS, interventions=interventions, seed=seed))


@torch.no_grad()
def tokens(model, **kwargs):
    """Section tokens `[row][token]` of a greedy call."""
    output = decoder_for(model, **kwargs).run()
    return [stream.token_ids for streams in output.streams for stream in streams]


def filled_bus(rounds=6, streams=3, capacity=3, **choices):
    """One prompt; note = [1, stream, round]."""
    bus = NotesBus(1, streams, 1, 3, capacity, **choices)
    for version in range(rounds):
        notes = torch.tensor([[[1.0, stream, version]] for stream in range(streams)])
        bus.publish(torch.arange(streams), torch.full((streams,), version), notes)
    return bus


def read(bus, row, read_round, lag=1, **choices):
    notes, mask = bus.window(torch.tensor([row]), torch.tensor([read_round]), torch.tensor([lag]), **choices)
    return [tuple(map(int, note[1:])) for note in notes[0][mask[0]]]


def test_topology_names_who_reads_whom():
    bus = filled_bus(rounds=1, reads_SS=topology_matrix([(0, 1), (1, 2), (2, 2)], 3))
    assert read(bus, 0, 1) == []
    assert read(bus, 1, 1) == [(0, 0)]
    assert read(bus, 2, 1) == [(1, 0), (2, 0)]
    assert topology_matrix(None, 3) is None
    with pytest.raises(ValueError, match=r"streams must be in \[0, 2\], got the edge \(0, 3\)"):
        topology_matrix([(0, 3)], 3)


def test_own_notes_come_beside_the_siblings_and_never_from_the_same_round():
    bus = filled_bus(rounds=2, reads_SS=topology_matrix(None, 3, self_notes=True))
    assert read(bus, 1, 1) == [(0, 0), (1, 0), (2, 0)]
    assert read(bus, 1, 1, lag=0) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert read(bus, 1, 1, lag=0, own_notes=True) == [(1, 0)]
    assert read(bus, 1, 1, own_notes=torch.tensor([True])) == [(1, 0)]


def test_a_stream_without_writers_writes_as_if_the_bus_were_off(model):
    alone, plain = tokens(model, interventions=[Ablate()]), tokens(model)
    chain = tokens(model, topology=[(0, 1), (1, 2)])
    assert alone != plain and chain != plain
    assert [chain[0], chain[3]] == [alone[0], alone[3]]
    assert [chain[1], chain[2]] != [alone[1], alone[2]]
    everybody = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert tokens(model, topology=everybody) == plain
    assert tokens(model, self_notes=True) != plain


def test_the_warm_up_is_self_only_and_then_ends(model):
    own, plain = tokens(model, interventions=[SelfOnly()]), tokens(model)
    assert tokens(model, self_only_rounds=0) == plain
    assert tokens(model, self_only_rounds=9) == own != plain
    warm, block = tokens(model, self_only_rounds=2), model.config.block_size
    assert [row[: 2 * block] for row in warm] == [row[: 2 * block] for row in own]
    assert warm != own


@pytest.mark.parametrize(
    ("retention", "expected"),
    [("fifo", (5, 0, 0)), ("scored", (3, 2, 0)), ("compressed", (4, 0, 1)), ("hybrid", (2, 2, 1))],
)
def test_places_of_a_producer_add_up_to_the_capacity(retention, expected):
    assert retained_places(retention, 5) == expected


def test_novelty_is_one_minus_the_closest_earlier_round():
    stored = torch.tensor([[[[1.0, 0]], [[0, 1]], [[3, 4]], [[1, 0]]]])
    published = torch.tensor([[True, True, True, False]])
    assert novelty(torch.tensor([[[2.0, 0]]]), stored, published, torch.tensor([0])).item() == 1
    assert novelty(torch.tensor([[[0.0, -2]]]), stored, published, torch.tensor([1])).item() == 1
    assert novelty(torch.tensor([[[3.0, 4]]]), stored, published, torch.tensor([2])).item() == pytest.approx(0.2)
    assert novelty(torch.tensor([[[3.0, 4]]]), stored, published, torch.tensor([3])).item() < 1e-6


def test_the_most_novel_old_rounds_are_chosen_in_order():
    old = torch.tensor([[[True, True, True, False]], [[False, True, False, False]]])
    scores = torch.tensor([[[0.3, 0.9, 0.3, 2.0]], [[1.0, 0.1, 1.0, 1.0]]])
    chosen, rest = select_older(old, scores, 2)
    assert chosen.tolist() == [[[0, 1]], [[-1, 1]]]
    assert rest.tolist() == [[[False, False, True, False]], [[False] * 4]]


def test_merged_rounds_keep_the_mean_norm():
    notes = torch.tensor([[[[[3.0, 0]], [[0, 5]], [[9, 9]]]]])
    merged, version = merge_rounds(notes, torch.tensor([[[True, True, False]]]))
    assert version.tolist() == [[[1]]]
    assert merged.norm().item() == pytest.approx(4)
    assert torch.allclose(merged / merged.norm(), torch.tensor([3.0, 5]) / 34**0.5)
    assert merge_rounds(notes, torch.zeros(1, 1, 3, dtype=torch.bool))[1].item() == -1


def test_every_retention_shows_its_rounds():
    assert read(filled_bus(), 0, 6)[:3] == [(1, 3), (1, 4), (1, 5)]
    bus = filled_bus(retention="scored")
    bus.score_BSV[0, 1, :3] = torch.tensor([0.1, 0.9, 0.5])
    assert read(bus, 0, 6)[:3] == [(1, 1), (1, 4), (1, 5)]
    assert read(bus, 0, 3)[:3] == [(1, 0), (1, 1), (1, 2)]
    notes, mask = filled_bus(retention="compressed").window(*torch.tensor([[0], [6], [1]]))
    seen = notes[0][mask[0]]
    assert seen[1:3].tolist() == [[1, 1, 4], [1, 1, 5]]
    older = torch.tensor([[1.0, 1, version] for version in range(4)])
    expected = older.mean(0) * (older.norm(dim=1).mean() / older.mean(0).norm())
    assert torch.allclose(seen[0], expected)
    hybrid = filled_bus(rounds=9, capacity=3, retention="hybrid")
    assert len(read(hybrid, 0, 9)) == 6
    hybrid.withdraw(torch.tensor([1]), torch.tensor([8]))
    assert (1, 8) not in read(hybrid, 0, 9)


@pytest.mark.parametrize("retention", ["scored", "compressed", "hybrid"])
def test_retention_changes_nothing_until_the_places_are_taken(model, retention):
    plain, changed = ({"bus_capacity": 3, "retention": kind, "max_new_tokens": 32} for kind in ("fifo", retention))
    before, after = tokens(model, **plain), tokens(model, **changed)
    # Rounds 0 to 3 read at most three rounds.
    kept = 4 * model.config.block_size
    assert [row[:kept] for row in before] == [row[:kept] for row in after]
    assert before != after


def test_notes_are_stored_in_the_dtype_asked_for(model):
    decoder = decoder_for(model, bus_dtype="bfloat16")
    with torch.no_grad():
        decoder.run()
    assert decoder.bus.notes_BSVKN.dtype is torch.bfloat16
    assert decoder_for(model).bus.notes_BSVKN.dtype is torch.float32


@pytest.mark.parametrize(
    "choices",
    [{}, {"bus_dtype": "float16"}, {"bus_capacity": 2, "num_streams": 2}, {"retention": "hybrid", "bus_capacity": 4}],
)
def test_the_memory_estimate_is_what_a_call_holds(model, choices):
    decoder = decoder_for(model, max_new_tokens=21, **choices)
    with torch.no_grad():
        estimate, states = decoder.run().trace.model["notes_memory"], decoder.note_states
    bus, rows = decoder.bus.notes_BSVKN, len(decoder.streams.sections)
    assert estimate["bus"] * rows == bus.numel() * bus.element_size()
    tensors = (*states.keys, *states.values, *states.biases)
    held = sum(part.numel() * part.element_size() for part in tensors)
    assert estimate["window"] * states.mask.shape[0] == held


def test_impossible_choices_of_the_bus_are_refused(model):
    for choice, message in (
        ({"retention": "lru"}, "retention must be one of"),
        ({"topology": [(0, 1, 2)]}, "topology must be a list of edges"),
        ({"topology": [(0, 7)]}, r"streams must be in \[0, 2\]"),
        ({"retention": "hybrid", "bus_capacity": 2}, "bus_capacity must be >= 3 with retention='hybrid', got 2"),
        ({"bus_dtype": "int8"}, "bus_dtype must be one of"),
        ({"self_only_rounds": -1}, "self_only_rounds"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder_for(model, **choice)
