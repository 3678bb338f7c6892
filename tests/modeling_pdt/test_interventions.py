"""Each intervention changes what it says, nothing else, alone and with others."""

import pytest
import torch

from modeling_pdt.bus import NotesBus
from modeling_pdt.intervention_chain import InterventionChain
from modeling_pdt.interventions import (
    INTERVENTIONS,
    Ablate,
    Freeze,
    GateZero,
    Intervention,
    NormScramble,
    RandomGate,
    SelfOnly,
    Shuffle,
    Stale,
    Swap,
    Tag,
    WindowRequest,
    ZeroNotes,
    check_interventions,
    intervention_from_dict,
    make_intervention,
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
        *("ablate", "zero_notes", "gate_zero", "swap", "stale", "freeze", "shuffle", "norm_scramble", "self_only"),
        *("random_gate", "tag"),
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


def test_a_frozen_window_stays_as_it_was(bus):
    assert read(bus, [Freeze(2)], read_round=3)[1] == read(bus, [], read_round=2)[1]
    assert read(bus, [Freeze(2)], read_round=1)[1] == read(bus, [], read_round=1)[1]
    assert read(bus, [Freeze(0)])[1] == set()
    assert {version for *_, version in read(bus, [Freeze(2), Stale()])[1]} == {0}


def test_shuffled_notes_keep_what_the_window_holds_and_lose_what_a_note_holds():
    plain, mask = torch.arange(32.0).view(1, 8, 4), torch.tensor([[True, False, True, True, False, True, True, False]])
    notes, after = Shuffle().window(plain, mask, PLAN)
    seen = mask[0].clone()
    seen[:PLAN] = False
    assert torch.equal(after, mask)
    assert torch.equal(notes[0, ~seen], plain[0, ~seen])
    assert torch.equal(notes[0, seen].sort(dim=0).values, plain[0, seen])
    kept = {tuple(note) for note in notes[0, seen].tolist()} & {tuple(note) for note in plain[0, seen].tolist()}
    assert len(kept) < 2
    assert not torch.equal(Shuffle(1).window(plain, mask, PLAN)[0], notes)


def test_places_that_are_empty_do_not_change_how_notes_are_shuffled():
    notes, mask = torch.randn(2, 6, 4), torch.tensor([[True] * 6, [True, True, True, False, True, True]])
    # The window of the same rows beside one that is further: more places, in front of every producer's.
    wider = torch.cat([notes[:, :PLAN], torch.randn(2, 3, 4), notes[:, PLAN:]], dim=1)
    wider_mask = torch.cat([mask[:, :PLAN], torch.zeros(2, 3, dtype=torch.bool), mask[:, PLAN:]], dim=1)
    shuffled, among_more = Shuffle().window(notes, mask, PLAN)[0], Shuffle().window(wider, wider_mask, PLAN)[0]
    for row in range(2):
        assert torch.equal(among_more[row][wider_mask[row]], shuffled[row][mask[row]])


def chain_read(bus, interventions, lag=1):
    """Streams and rounds that every row of the first prompt reads after a chain, and the chain's gate scales."""
    chain, rows = InterventionChain(tuple(interventions), 3, 2), torch.arange(3)
    request = chain.request(WindowRequest(rows, rows, torch.full((3,), 3), torch.full((3,), lag)))
    window = bus.window(request.rows, request.read_round, request.lag, request.sources, request.own_notes)
    notes, mask = chain.window(rows, *window, PLAN)
    seen = [{tuple(map(int, note[1:])) for note in notes[row, PLAN:][mask[row, PLAN:]]} for row in range(3)]
    return seen, chain.gate_scale(rows, 0.5)


def test_streams_that_are_not_named_read_as_ever(bus):
    plain, scale = chain_read(bus, [])
    assert scale == 0.5
    for kind in (Ablate(), ZeroNotes(), Swap(), Stale(), Freeze(), Shuffle(), NormScramble(), SelfOnly()):
        everybody, _ = chain_read(bus, [kind])
        assert everybody != plain
        assert chain_read(bus, [kind.on(1)])[0] == [plain[0], everybody[1], plain[2]]
        assert chain_read(bus, [kind.on(0, 2), kind.on(1)])[0] == everybody
        assert kind.streams is None
    assert chain_read(bus, [GateZero().on(2)])[1].tolist() == [0.5, 0.5, 0.0]
    agreement = torch.tensor([0.3, 0.4, 0.6])
    for rate, expected in ((1.0, 0.0), (0.0, 1.0)):
        chain = InterventionChain((RandomGate(rate).on(1),), 3, 2)
        edited = chain.agreement(agreement, *torch.zeros(3, 3, dtype=torch.long).add(torch.arange(3)))
        assert edited.tolist() == [agreement[0], expected, agreement[2]]


def test_words_make_interventions_and_dictionaries_make_them_again():
    for word, made in (
        ("stale:2", Stale(2)),
        ("ablate@0,2", Ablate().on(0, 2)),
        ("freeze:3@1", Freeze(3).on(1)),
        ("swap:1,0", Swap([1, 0])),
        ("random_gate:0.25", RandomGate(0.25)),
        ("tag:second run", Tag("second run")),
        ("shuffle:4", Shuffle(4)),
    ):
        one = make_intervention(word)
        assert type(one) is type(made) and one.to_dict() == made.to_dict()
        again = intervention_from_dict(one.to_dict())
        assert type(again) is type(made) and again.to_dict() == made.to_dict()
    for word, message in (
        ("ablate:1", "ablate takes no argument"),
        ("stale:x", r"'stale:x' must be name\[:argument\]\[@streams\]"),
        ("stale:0", "Stale.rounds must be >= 1, got 0"),
        ("stale@-1", "Stale.on needs one stream >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_intervention(word)
    with pytest.raises(ValueError, match=r"Ablate\.streams must be in \[0, 1\], got \(2,\)"):
        check_interventions([Ablate().on(2)], 1, 2)
