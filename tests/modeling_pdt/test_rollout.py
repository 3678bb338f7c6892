"""Whole rows at once: notes, what reaches whom, heads, gradients."""

import copy
from dataclasses import replace

import pytest
import torch

from modeling_pdt.rollout import gather_blocks, plan_vectors, run_bus, write_notes

VOCAB = 97
EPS = 1e-5


@torch.no_grad()
def run(model, batch, **changes):
    rollout = replace(batch.rollout, **changes)
    return model(**{**batch.inputs, "rollout": rollout})


def perturbed(batch, row: int, position: int):
    """The same batch with one other token; a function of the arguments only."""
    other = copy.copy(batch)
    ids = batch.ids.clone()
    ids[row, position] = 2 + (ids[row, position] - 2 + 31) % (VOCAB - 2)
    other.ids, other.inputs = ids, {**batch.inputs, "input_ids": ids}
    return other


def moved(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Largest change over the vocabulary, `[R, T]`."""
    return (one - other).abs().amax(dim=-1)


# --- notes ---


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@torch.no_grad()
def test_notes_of_all_blocks_equal_notes_block_by_block(make_model, make_rollout, name):
    model, batch = make_model(name, trained=True), make_rollout(lengths=[12, 14, 3, 9, 4, 1])
    notes = run(model, batch).speculation
    assert notes.shape == (6, 4, 4, 16)
    size = batch.rollout.block_size
    for row, (start, length) in enumerate(zip(batch.start, batch.lengths, strict=True)):
        for index in range(4):
            begin, end = start + index * size, start + min(length, (index + 1) * size)
            if begin >= end:
                assert torch.equal(notes[row, index], torch.zeros(4, 16))
                continue
            tap = model.stack.lower(input_ids=batch.ids[row : row + 1, :end])
            block = tap.hidden[:, begin:end]
            alone = model.stack.heads.write(block, torch.ones(1, end - begin, dtype=torch.bool), size)[0]
            torch.testing.assert_close(notes[row, index], alone, atol=EPS, rtol=EPS)


@torch.no_grad()
def test_gathered_blocks_hold_their_tokens(make_rollout):
    batch = make_rollout(lengths=[12, 14, 3, 9, 4, 0])
    write = batch.rollout.write_round_RT
    place = torch.arange(write.shape[1], dtype=torch.float32).expand_as(write)[..., None]
    states, mask = gather_blocks(place, write, 4, 4)
    for row in range(6):
        for index in range(4):
            expected = (write[row] == index).nonzero().flatten().tolist()
            assert states[row, index][mask[row, index]].flatten().tolist() == expected


@torch.no_grad()
def test_notes_are_normalised_and_of_their_own_text_only(model, make_rollout):
    batch = make_rollout()
    notes = run(model, batch).speculation
    other = run(model, perturbed(batch, 0, batch.start[0] + 5)).speculation
    change = (notes - other).abs().amax(dim=(2, 3))
    assert change[0, 0] == 0 and change[0, 1] > 1e-3 and change[1:].max() < EPS
    scale = model.stack.heads.note_norm.weight
    torch.testing.assert_close((notes[:, :3] / scale).pow(2).mean(-1), torch.ones(6, 3, 4), atol=1e-3, rtol=1e-3)


# --- who reads what ---


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@pytest.mark.parametrize("lag", [1, 2])
def test_a_block_reaches_siblings_after_the_lag_and_nobody_earlier(make_model, make_rollout, name, lag):
    model, batch = make_model(name, trained=True), make_rollout(lag=lag)
    base = run(model, batch).logits
    read = batch.rollout.read_round_RT
    real = batch.inputs["attention_mask"].bool()
    for block in (0, 1):
        position = batch.start[1] + block * 4 + 2
        change = moved(run(model, perturbed(batch, 1, position)).logits, base)
        for sibling in (0, 2):
            early, late = read[sibling] < block + lag, (read[sibling] >= block + lag) & real[sibling]
            assert late.any() and change[sibling][early & real[sibling]].max() < EPS
            assert change[sibling][late].min() > 1e-4
        assert change[1, :position].max() < EPS and change[1, position] > 1e-3
        assert change[3:][real[3:]].max() < EPS, "another document's rows"


def test_capacity_ends_the_influence(make_model, make_rollout):
    model, batch = make_model("llama", trained=True), make_rollout(capacity=1, lengths=[16] * 6)
    noise = torch.zeros(6, 4, 4, 16)
    noise[1, 0] = 2.0
    read = batch.rollout.read_round_RT
    change = moved(run(model, batch, perturbation_RVKN=noise).logits, run(model, batch).logits)
    assert change[0][read[0] == 1].min() > 1e-4
    # Later tokens still attend to states that read in round 1; a row that reads nothing then never meets the note.
    late = read.clone()
    late[0][late[0] == 1] = -1
    base = run(model, batch, read_round_RT=late).logits
    change = moved(run(model, batch, read_round_RT=late, perturbation_RVKN=noise).logits, base)
    assert change[0].max() < EPS and change[2][read[2] == 1].min() > 1e-4


def test_gate_zero_or_lone_streams_pass_nothing(make_model, make_rollout):
    model, batch = make_model("llama", trained=True), make_rollout()
    other = perturbed(batch, 1, batch.start[1] + 1)
    with torch.no_grad():
        silent = [model(**part.inputs, gate_scale=0.0).logits for part in (batch, other)]
    assert moved(*silent)[[0, 2]].max() < EPS
    alone = [run(model, part, num_streams=1).logits for part in (batch, other)]
    assert moved(*alone)[[0, 2]].max() < EPS


def test_dropped_notes_reach_nobody(model, make_rollout):
    batch = make_rollout()
    keep = torch.ones(6, batch.rollout.rounds, dtype=torch.bool)
    keep[1, 0] = False
    one, other = (run(model, part, keep_RV=keep).logits for part in (batch, perturbed(batch, 1, batch.start[1] + 1)))
    read = batch.rollout.read_round_RT
    assert moved(one, other)[0][read[0] == 1].max() < EPS
    assert moved(one, run(model, batch).logits)[0][read[0] == 1].min() > 1e-4


def test_donors_swap_what_documents_read(model, make_rollout):
    batch = make_rollout()
    donor = torch.tensor([3, 4, 5, 0, 1, 2])
    base = run(model, batch, donor_R=donor).logits
    assert moved(base, run(model, batch).logits)[:, -4:].max() > 1e-3
    change = moved(run(model, perturbed(batch, 1, batch.start[1] + 1), donor_R=donor).logits, base)
    read, real = batch.rollout.read_round_RT, batch.inputs["attention_mask"].bool()
    assert change[[0, 2]][real[[0, 2]]].max() < EPS
    for reader in (3, 5):
        assert change[reader][(read[reader] >= 1) & real[reader]].min() > 1e-4
    same = run(model, batch, donor_R=torch.arange(6)).logits
    assert torch.equal(same, run(model, batch).logits)


def test_donors_reach_the_agreement_head(model, make_rollout):
    # Rows of document 1 have one block only: readers that borrow their notes must not be judged against the zero
    # vectors of blocks that the donor never wrote.
    batch = make_rollout(lengths=[12, 12, 12, 4, 4, 4])
    donor = torch.tensor([3, 4, 5, 3, 4, 5])
    swapped = run(model, batch, donor_R=donor, wants_agreement=True).agreement_logits
    keep = torch.ones(6, 3, dtype=torch.bool)
    keep[:, 1:] = False
    one_block = run(model, batch, donor_R=donor, keep_RV=keep, wants_agreement=True).agreement_logits
    torch.testing.assert_close(swapped, one_block, atol=EPS, rtol=EPS)


# --- teacher notes and perturbations ---


def test_teacher_notes_replace_the_chosen_blocks(model, make_rollout):
    batch = make_rollout(true_notes=True)
    ids = batch.rollout.note_ids_RVL
    rounds = batch.rollout.rounds
    nowhere, everywhere = torch.zeros(6, rounds, dtype=torch.bool), torch.ones(6, rounds, dtype=torch.bool)
    self_written = run(model, batch, note_ids_RVL=None, note_mask_RVL=None).logits
    output = run(model, batch, teacher_RV=nowhere)
    assert output.notes.shape == output.speculation.shape == (6, rounds, 4, 16)
    assert torch.equal(output.logits, self_written)
    assert torch.equal(run(model, batch).logits, self_written)

    taught = run(model, batch, teacher_RV=everywhere).logits
    read = batch.rollout.read_round_RT
    assert moved(taught, self_written)[0][read[0] >= 1].min() > 1e-4
    assert moved(taught, self_written)[0, : batch.start[0]][read[0, : batch.start[0]] < 1].max() < EPS
    # A taught block no longer depends on the text of its row, only on its true note.
    change = moved(run(model, perturbed(batch, 1, batch.start[1] + 1), teacher_RV=everywhere).logits, taught)
    assert change[[0, 2]].max() < EPS
    chosen = nowhere.clone()
    chosen[1, 0] = True
    base = run(model, batch, teacher_RV=chosen).logits
    for row, block, reaches in ((1, 0, True), (1, 1, False), (2, 0, False)):
        other_ids = ids.clone()
        other_ids[row, block, 0] = 2 + (other_ids[row, block, 0] + 17) % 90
        change = moved(run(model, batch, teacher_RV=chosen, note_ids_RVL=other_ids).logits, base)
        assert (change[0].max() > 1e-4) == reaches, (row, block)


def test_padding_of_texts_does_not_matter(model, make_rollout):
    batch = make_rollout(true_notes=True, items=4)
    teacher = torch.ones(6, batch.rollout.rounds, dtype=torch.bool)
    base = run(model, batch, teacher_RV=teacher)
    rollout = batch.rollout
    pad = torch.nn.functional.pad
    wider = run(
        model,
        batch,
        teacher_RV=teacher,
        note_ids_RVL=pad(rollout.note_ids_RVL, (0, 5)),
        note_mask_RVL=pad(rollout.note_mask_RVL, (0, 5)),
        item_ids_BPL=pad(rollout.item_ids_BPL, (0, 3)),
        item_mask_BPL=pad(rollout.item_mask_BPL, (0, 3)),
    )
    torch.testing.assert_close(wider.notes, base.notes, atol=EPS, rtol=EPS)
    torch.testing.assert_close(wider.logits, base.logits, atol=EPS, rtol=EPS)


def test_a_block_without_true_notes_has_none(model, make_rollout):
    batch = make_rollout(true_notes=True)
    mask = batch.rollout.note_mask_RVL.clone()
    mask[2, 1] = False
    notes = run(model, batch, note_mask_RVL=mask).notes
    assert torch.equal(notes[2, 1], torch.zeros(4, 16)) and notes[2, 0].abs().sum() > 0
    # A batch without any true note at all (every text dropped) is not an error.
    assert not run(model, batch, note_mask_RVL=torch.zeros_like(mask)).notes.any()


def test_perturbation_is_added_to_the_published_notes(model, make_rollout):
    batch = make_rollout()
    shape = (6, batch.rollout.rounds, 4, 16)
    zero = run(model, batch, perturbation_RVKN=torch.zeros(shape)).logits
    assert torch.equal(zero, run(model, batch).logits)
    noise = torch.zeros(shape)
    noise[1, 0] = 3.0
    change = moved(run(model, batch, perturbation_RVKN=noise).logits, zero)
    assert change[0].max() > 1e-4 and change[1].max() < EPS


# --- plan, coverage, agreement ---


def test_plan_items_reach_every_conditioned_token(model, make_rollout):
    batch = make_rollout(items=4)
    base = run(model, batch).logits
    items = batch.rollout.item_ids_BPL.clone()
    items[0, 0, 0] = 2 + (items[0, 0, 0] + 17) % 90
    change = moved(run(model, batch, item_ids_BPL=items).logits, base)
    read, real = batch.rollout.read_round_RT[:3], batch.inputs["attention_mask"][:3].bool()
    assert change[:3][(read >= 0) & real].min() > 1e-5 and change[:3][(read < 0) & real].max() < EPS
    assert change[3:].max() < EPS
    # The absent item (0, 3) is not visible.
    items = batch.rollout.item_ids_BPL.clone()
    items[0, 3] = 5
    assert moved(run(model, batch, item_ids_BPL=items).logits, base).max() < EPS


@torch.no_grad()
def test_plan_from_buckets(model, make_rollout):
    slots, mask = torch.randint(0, 512, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    batch = make_rollout(plan_slots_BP=slots, plan_mask_BP=mask)
    vectors, present = plan_vectors(model.stack, batch.rollout)
    assert vectors.shape == (2, 8, 16) and torch.equal(present, mask)
    assert plan_vectors(model.stack, make_rollout().rollout) == (None, None)
    assert moved(run(model, batch).logits, run(model, make_rollout()).logits).max() > 1e-4


def test_shapes_of_the_heads(model, make_rollout):
    batch = make_rollout(items=4, wants_coverage=True, wants_agreement=True)
    output, rounds = run(model, batch), batch.rollout.rounds
    assert output.coverage_logits.shape == (6, rounds, 4)
    assert output.agreement_logits.shape == (6, rounds)
    assert output.stream_logits.shape == (6, 3)
    assert output.speculation.shape == (6, rounds, 4, 16)
    assert all(part.isfinite().all() for part in (output.coverage_logits, output.agreement_logits))
    silent = run(model, make_rollout())
    assert silent.coverage_logits is None and silent.agreement_logits is None and silent.notes is None
    planless = run(model, make_rollout(), wants_coverage=True, wants_agreement=True)
    assert planless.coverage_logits is None and planless.agreement_logits.shape == (6, rounds)


def test_planner_logits_read_the_prompt_only(model, make_rollout):
    batch = make_rollout()
    prompt = torch.zeros_like(batch.ids, dtype=torch.bool)
    prompt[:, :4] = True
    with torch.no_grad():
        one = model(**batch.inputs, planner_mask=prompt).planner_logits
        other = model(**perturbed(batch, 0, 7).inputs, planner_mask=prompt).planner_logits
    assert one.shape == (6, 8, 512)
    torch.testing.assert_close(one, other, atol=EPS, rtol=EPS)


@pytest.mark.parametrize("block", [0, 1])
def test_verdicts_do_not_depend_on_later_tokens(model, make_rollout, block):
    batch = make_rollout(lengths=[12] * 6, items=4, wants_coverage=True, wants_agreement=True)
    base = run(model, batch)
    later = copy.copy(batch)
    changed = batch.rollout.write_round_RT > block
    ids = torch.where(changed, 2 + (batch.ids + 40) % 90, batch.ids)
    later.inputs = {**batch.inputs, "input_ids": ids}
    output = run(model, later)
    for name in ("agreement_logits", "coverage_logits", "speculation"):
        one, other = getattr(base, name), getattr(output, name)
        torch.testing.assert_close(one[:, : block + 1], other[:, : block + 1], atol=EPS, rtol=EPS)
        assert (one[:, block + 1 :] - other[:, block + 1 :]).abs().max() > 1e-4, name


def test_agreement_reads_siblings_of_the_same_round(model, make_rollout):
    batch = make_rollout(lengths=[12] * 6, wants_agreement=True)
    base = run(model, batch).agreement_logits
    change = (run(model, perturbed(batch, 1, batch.start[1] + 5)).agreement_logits - base).abs()
    assert change[[0, 2], 1].min() > 1e-5 and change[[0, 2], 0].max() < EPS and change[3:].max() < EPS


def test_coverage_accumulates_own_text_only(model, make_rollout):
    batch = make_rollout(lengths=[12] * 6, items=4, wants_coverage=True)
    base = run(model, batch).coverage_logits
    change = (run(model, perturbed(batch, 1, batch.start[1] + 1)).coverage_logits - base).abs().amax(-1)
    assert change[1].min() > 1e-5 and change[[0, 2, 3, 4, 5]].max() < EPS


# --- forms of the call ---


def test_padding_side_does_not_matter(model, make_rollout):
    batch = make_rollout(items=4, wants_coverage=True, wants_agreement=True)
    real = batch.inputs["attention_mask"].bool()
    shift = (~real).sum(dim=1)

    def to_the_right(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(int(by), 0) for row, by in zip(tensor, shift, strict=True)])

    rollout = replace(
        batch.rollout,
        write_round_RT=to_the_right(batch.rollout.write_round_RT),
        read_round_RT=to_the_right(batch.rollout.read_round_RT),
    )
    inputs = {key: to_the_right(batch.inputs[key]) for key in ("input_ids", "attention_mask", "stream_ids")}
    with torch.no_grad():
        left = model(**inputs, rollout=rollout, labels=to_the_right(batch.labels))
        right = model(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(left.loss, right.loss, atol=EPS, rtol=EPS)
    for name in ("speculation", "agreement_logits", "coverage_logits", "stream_logits"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), atol=EPS, rtol=EPS)
    moved_logits = to_the_right(right.logits)
    torch.testing.assert_close(left.logits[to_the_right(real)], moved_logits[to_the_right(real)], atol=EPS, rtol=EPS)


def test_loss_is_the_shifted_cross_entropy(model, make_rollout):
    batch = make_rollout()
    with torch.no_grad():
        output = model(**batch.inputs, labels=batch.labels)
    total, count = 0.0, 0
    for row in range(6):
        for position in range(1, batch.ids.shape[1]):
            if batch.labels[row, position] >= 0:
                total -= float(output.logits[row, position - 1].log_softmax(-1)[batch.ids[row, position]])
                count += 1
    assert count == sum(batch.lengths)
    torch.testing.assert_close(float(output.loss), total / count, atol=1e-4, rtol=1e-4)


def test_shared_lower_half_and_wanted_logits(model, make_rollout):
    batch = make_rollout()
    with torch.no_grad():
        full = model(**batch.inputs)
        wanted = batch.rollout.write_round_RT >= 0
        inputs = {"stream_ids": batch.inputs["stream_ids"], "rollout": batch.rollout, "tap": full.tap}
        assert torch.equal(model(**inputs).logits, full.logits)
        some = model(**inputs, logits_mask=wanted).logits
    torch.testing.assert_close(some, full.logits[wanted])
    with pytest.raises(ValueError, match="no logits_mask"):
        model(**inputs, logits_mask=wanted, labels=batch.labels)


def test_hidden_states_cover_the_upper_half(model, make_rollout):
    batch = make_rollout()
    with torch.no_grad():
        output = model(**batch.inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert all(state.shape == (*batch.ids.shape, 32) for state in output.hidden_states)


@torch.no_grad()
def test_parts_of_the_bus_rollout(model, make_rollout):
    batch = make_rollout(lengths=[12, 12, 12, 4, 4, 4])
    tap = model.stack.lower(input_ids=batch.ids, attention_mask=batch.inputs["attention_mask"])
    notes, exists = write_notes(model.stack, tap.hidden, batch.rollout)
    bus = run_bus(model.stack, tap, batch.rollout)
    assert exists.tolist() == [[True] * 3] * 3 + [[True, False, False]] * 3
    assert torch.equal(bus.written_RVKN, notes) and torch.equal(bus.published_RVKN, notes)
    assert bus.teacher_RVKN is None and bus.plan_BPN is None
    assert bus.note_states.rows_per_group == 3 and bus.note_states.mask.shape == (*batch.ids.shape, 9 * 4)
