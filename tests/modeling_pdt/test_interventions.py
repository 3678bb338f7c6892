"""Each intervention changes what it says, nothing else, alone and with others."""

import pytest
import torch

from modeling_pdt.bus import NotesBus
from modeling_pdt.interventions import (
    INTERVENTIONS,
    Ablate,
    GateZero,
    Intervention,
    NormScramble,
    SelfOnly,
    Stale,
    Swap,
    WindowRequest,
    ZeroNotes,
    check_interventions,
    make_interventions,
)

PLAN = 2


@pytest.fixture
def bus():
    """Two prompts of three streams, three rounds published; note = [1, prompt, stream, round] and a plan of 9s."""
    plan = torch.full((2, PLAN, 4), 9.0)
    bus = NotesBus(2, 3, 1, 4, 8, plan, torch.ones(2, PLAN, dtype=torch.bool))
    rows = torch.arange(6)
    for version in range(3):
        values = torch.stack([torch.ones(6), rows // 3, rows % 3, torch.full((6,), version)], dim=1)
        bus.publish(rows, torch.full((6,), version), values[:, None].float())
    return bus


def read(bus, interventions, row=0, read_round=3, lag=1):
    """`(plan places visible, {(prompt, stream, round)}, notes, mask)` of one row after the interventions."""
    index = torch.tensor([row])
    request = WindowRequest(index, index, torch.tensor([read_round]), torch.tensor([lag]))
    for intervention in interventions:
        request = intervention.request(request, 3, 2)
    notes, mask = bus.window(request.rows, request.read_round, request.lag, request.sources, request.own_notes)
    for intervention in interventions:
        notes, mask = intervention.window(notes, mask, PLAN)
    visible = [
        tuple(int(x) for x in note[1:]) for note, seen in zip(notes[0, PLAN:], mask[0, PLAN:], strict=True) if seen
    ]
    return int(mask[0, :PLAN].sum()), set(visible), notes, mask


def test_without_intervention_siblings_are_read(bus):
    plan, visible, *_ = read(bus, [])
    assert plan == PLAN
    assert visible == {(0, stream, version) for stream in (1, 2) for version in range(3)}
    assert read(bus, [Intervention()])[1] == visible


def test_ablate_hides_the_bus_and_keeps_the_plan(bus):
    assert read(bus, [Ablate()])[:2] == (PLAN, set())
    assert read(bus, [Ablate(plan=True)])[:2] == (0, set())


def test_zero_notes_keeps_the_mask(bus):
    _, _, notes, mask = read(bus, [ZeroNotes()])
    _, _, plain, plain_mask = read(bus, [])
    assert torch.equal(mask, plain_mask)
    assert not notes[:, PLAN:].any()
    assert torch.equal(notes[:, :PLAN], plain[:, :PLAN])


def test_swap_reads_the_donors_siblings(bus):
    _, visible, notes, _ = read(bus, [Swap()], row=1)
    assert visible == {(1, stream, version) for stream in (0, 2) for version in range(3)}
    assert (notes[:, :PLAN] == 9).all()
    assert read(bus, [Swap([0, 0])], row=4)[1] == {(0, stream, version) for stream in (0, 2) for version in range(3)}


def test_stale_hides_the_newest_rounds(bus):
    assert {version for *_, version in read(bus, [Stale()])[1]} == {0, 1}
    assert {version for *_, version in read(bus, [Stale(2)])[1]} == {0}
    assert {version for *_, version in read(bus, [Stale(1), Stale(1)])[1]} == {0}
    assert read(bus, [Stale(9)])[1] == set()


def test_self_only_reads_the_rows_own_notes(bus):
    assert read(bus, [SelfOnly()], row=2)[1] == {(0, 2, version) for version in range(3)}


def test_norm_scramble_keeps_norms_and_mask_and_plan(bus):
    _, _, notes, mask = read(bus, [NormScramble()])
    _, _, plain, plain_mask = read(bus, [])
    assert torch.equal(mask, plain_mask)
    assert torch.allclose(notes.norm(dim=-1), plain.norm(dim=-1))
    assert torch.equal(notes[:, :PLAN], plain[:, :PLAN])
    assert not torch.equal(notes, plain)
    assert not torch.equal(read(bus, [NormScramble(1)])[2], notes)


def test_norm_scramble_gives_a_note_one_new_direction_wherever_it_stands(bus):
    early = read(bus, [NormScramble()], read_round=1)
    late = read(bus, [NormScramble()], read_round=3)
    first = early[2][0, PLAN:][early[3][0, PLAN:]]
    assert all(any(torch.equal(note, other) for other in late[2][0, PLAN:]) for note in first)


def test_a_scrambled_note_is_nearly_orthogonal_to_itself():
    notes = torch.randn(1, 50, 256)
    scrambled, _ = NormScramble().window(notes, torch.ones(1, 50, dtype=torch.bool), 0)
    assert torch.nn.functional.cosine_similarity(notes, scrambled, dim=-1).abs().max() < 0.35


def test_gate_zero_is_scale_zero():
    assert GateZero().gate_scale(0.7) == 0.0
    assert Ablate().gate_scale(0.7) == 0.7


def test_interventions_combine(bus):
    _, visible, notes, _ = read(bus, [Swap(), Stale(), ZeroNotes()], row=0)
    assert visible == {(0, 0, 0)}
    assert not notes[:, PLAN:].any()
    assert read(bus, [SelfOnly(), Stale()], row=0)[1] == {(0, 0, 0), (0, 0, 1)}
    assert read(bus, [Swap(), Swap()], row=0)[1] == read(bus, [], row=0)[1]


def test_windows_given_are_left_as_they_are(bus):
    notes, mask = torch.randn(1, 6, 4), torch.ones(1, 6, dtype=torch.bool)
    copies = notes.clone(), mask.clone()
    for kind in INTERVENTIONS.values():
        kind().window(notes, mask, PLAN)
    assert torch.equal(notes, copies[0]) and torch.equal(mask, copies[1])


def test_interventions_by_name():
    made = make_interventions(["swap", "gate_zero"])
    assert [type(one) for one in made] == [Swap, GateZero]
    assert set(INTERVENTIONS) == {
        *("ablate", "zero_notes", "gate_zero", "swap", "stale", "norm_scramble", "self_only", "random_gate")
    }
    with pytest.raises(ValueError, match=r"interventions must be of \['ablate', .*\], got \['swop'\]"):
        make_interventions(["swap", "swop"])


def test_impossible_interventions_are_named():
    with pytest.raises(ValueError, match=r"Stale\.rounds must be >= 1, got 0"):
        Stale(0)
    with pytest.raises(ValueError, match=r"Swap needs a batch of >= 2 prompts .*, got 1"):
        check_interventions([Swap()], 1)
    for donors in ([0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"Swap\.donors must name one prompt in \[0, 1\] per prompt, got"):
            check_interventions([Swap(donors)], 2)
    for wrong in ("swap", Swap):
        with pytest.raises(ValueError, match="interventions must hold Intervention objects, got"):
            check_interventions([wrong], 2)
