"""Notes in other words and with other values, contradicting plan items, and labels of the agreement head."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_training import (
    BUS_STAGE,
    HEAD_STAGE,
    make_arguments,
    make_collator,
    make_maker,
    make_model,
    make_trainer,
    tokenizer,
)
from trainer_pdt.agreement_labels import automatic_labels, planted_labels, readiness_labels
from trainer_pdt.branches import build_targets, run_branches, student_rollout
from trainer_pdt.contradictions import contrary_items, disputed_tokens, exchange_texts
from trainer_pdt.curriculum import Stage
from trainer_pdt.data.worlds import WorldOptions, generate_documents
from trainer_pdt.features import WorldFeatures
from trainer_pdt.losses import IGNORE_INDEX, supervised_values
from trainer_pdt.noise import draw_noise
from trainer_pdt.objective import loss_parts
from trainer_pdt.variants import FACT_FORMAT, FACT_WORDINGS, collect_items

DOCUMENTS = list(generate_documents("train", 0, 4))
POOL = collect_items(generate_documents("train", 0, 60, with_notes=False))
MAKER = replace(make_maker(), items=POOL)
FEATURES = [MAKER(document) for document in DOCUMENTS]
READING = ("snc", "stream_adapters", "writer", "encoder")


def stage(losses=("lm_ce",), train=READING, **changes):
    return Stage("test", 10, tuple(train), dict.fromkeys(losses, 1.0), **changes)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def batch(model):
    return make_collator(model, with_corrupted=True, with_variants=True)(FEATURES)


def draws(batch, one, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rounds, items = batch["block_exists"].shape[1], batch["item_ids"].shape[1]
    return draw_noise(one, 4, 3, rounds, 1, generator, items), generator


def texts(ids):
    return [tokenizer().decode(fact) for fact in ids]


def test_second_wordings_and_other_values_of_facts():
    paraphrased, changed = set(), 0
    for document, features in zip(DOCUMENTS, FEATURES, strict=True):
        view = features["clean"]
        assert MAKER(document) == features
        for stream in document.streams:
            number = stream.stream_id
            told, other = texts(view["noisy_ids"][number]), texts(view["paraphrase_ids"][number])
            assert len(told) == len(other) == len(view["noisy_token"][number])
            for plain, second in zip(told, other, strict=True):
                cue, value = plain.removeprefix(" The ").removesuffix(".").split(" is ")
                (form,) = (form for form in FACT_WORDINGS if form.format(cue=cue, value=value) == second)
                paraphrased.add(form)
            contrary = texts(view["contrary_ids"][number])
            for span, text in zip(stream.spans, contrary, strict=True):
                same = text == FACT_FORMAT.format(cue=span.cue, value=span.value)
                assert text.startswith(f" The {span.cue} is ")
                assert same == (span.owner != number)
                changed += not same
        assert all(flag for flags in view["disputable"] for flag in flags)
    assert changed and paraphrased == set(FACT_WORDINGS)


def test_contrary_items_are_about_what_a_document_does_not_say():
    for document, features in zip(DOCUMENTS, FEATURES, strict=True):
        topics = {item.item_id.split("/")[1] for item in document.items}
        banned = {text for topic in topics for text in POOL.get(topic, ())}
        found = texts(features["contrary_item_ids"])
        assert len(found) == len(document.items)
        assert all(found) and not banned & set(found)
        assert make_maker()(document)["contrary_item_ids"] == [[]] * len(document.items)


def test_new_draws_move_no_other_ones_and_are_functions_of_the_seed(batch):
    noisy = {"bus_mix": 0.5, "note_drop": 0.5, "note_swap": 0.5, "lag_jitter": 0.5, "stream_dropout": 0.5}
    more = {"note_paraphrase": 0.3, "note_contradict": 0.4, "item_contradict": 0.5}
    plain, after = draws(batch, stage(("lm_ce", "cov"), **noisy))
    full, also = draws(batch, stage(("lm_ce", "cov"), **noisy, **more))
    for name in ("teacher_RK", "keep_RK", "producer_R", "source_R", "lag_R"):
        assert torch.equal(getattr(plain, name), getattr(full, name))
    assert torch.equal(torch.rand(3, generator=after), torch.rand(3, generator=also))
    one, _ = draws(batch, stage(("lm_ce", "cov"), bus_mix=1.0, item_contradict=0.5))
    again, _ = draws(batch, stage(("lm_ce", "cov"), **noisy, **more))
    other, _ = draws(batch, stage(("lm_ce", "cov"), **noisy, **more), seed=4)
    assert torch.equal(one.contradict_BP, full.contradict_BP)
    for name in ("paraphrase_RK", "contradict_RK", "contradict_BP"):
        assert not getattr(plain, name).any()
        assert torch.equal(getattr(full, name), getattr(again, name))
        assert not torch.equal(getattr(full, name), getattr(other, name))
    wide = draw_noise(stage(**noisy, note_paraphrase=0.3, note_contradict=0.7), 50, 3, 100, 1, torch.Generator())
    assert wide.paraphrase_RK.float().mean() == pytest.approx(0.3, abs=0.02)
    assert wide.contradict_RK.float().mean() == pytest.approx(0.7, abs=0.02)


def test_exchanged_texts_keep_the_others():
    ids, mask = torch.tensor([[[1, 2], [3, 0]]]), torch.tensor([[[True, True], [True, False]]])
    others = torch.tensor([[[7, 8, 9], [5, 6, 4]]]), torch.ones(1, 2, 3, dtype=torch.bool)
    changed = exchange_texts((ids, mask), others, torch.tensor([[False, True]]))
    assert changed[0].tolist() == [[[1, 2, 0], [5, 6, 4]]]
    assert changed[1].tolist() == [[[True, True, False], [True, True, True]]]


def test_students_read_the_drawn_notes_and_the_teacher_the_true_ones(model, batch, tmp_path):
    other = stage(bus_mix=1.0, note_paraphrase=1.0)
    noise, generator = draws(batch, other)
    rollout = student_rollout(batch, other, noise, model.config, generator)
    shown = batch["paraphrased_note_mask"].any(2)
    assert torch.equal(shown, batch["noisy_note_mask"].any(2))
    width = batch["paraphrased_note_ids"].shape[2]
    assert torch.equal(rollout.note_ids_RVL[shown][:, :width], batch["paraphrased_note_ids"][shown])
    quiet = replace(other, note_paraphrase=0.0)
    plain = student_rollout(batch, quiet, noise, model.config, generator)
    assert plain.note_ids_RVL is batch["noisy_note_ids"]
    arguments = make_arguments(tmp_path)
    with torch.no_grad():
        notes = [
            run_branches(model, batch, one, noise, arguments, model.config, generator)
            for one in (replace(one, losses={"lm_ce": 1.0, "kd": 1.0}) for one in (other, quiet))
        ]
    assert torch.equal(notes[0].teacher.notes, notes[1].teacher.notes)
    assert not torch.allclose(notes[0].student.notes[shown], notes[1].student.notes[shown], atol=1e-3)


def test_contradicted_facts_do_not_count_and_are_refused(model, batch):
    one = stage(bus_mix=1.0, note_contradict=1.0)
    noise, generator = draws(batch, one)
    rollout = student_rollout(batch, one, noise, model.config, generator)
    disputed = disputed_tokens(batch, noise, rollout)
    judged = (batch["reference"] >= 0) & batch["judgeable"].gather(1, batch["write_round"].clamp(min=0))
    visible = batch["source_round"] <= batch["write_round"]
    assert disputed.any() and torch.equal(disputed, judged & visible & (batch["source_round"] >= 0))
    plain, counted = (build_targets(batch, rollout, 5.0, disputed_RT=d) for d in (None, disputed))
    assert (plain.weights_M[plain.feasible_M] == 5.0).all()
    # What a note contradicts is the owner's statement. An owner that repeats a sibling reads the truth.
    owned_M = supervised_values(batch["own_mask"], batch["labels"])
    disputed_M = plain.feasible_M & ~owned_M
    assert (plain.feasible_M & owned_M).any() and (counted.weights_M[disputed_M] == 0.0).all()
    assert torch.equal(counted.weights_M[~disputed_M], plain.weights_M[~disputed_M])
    labels = planted_labels(batch, disputed)
    assert torch.equal(labels.refused_RV, batch["judgeable"])
    assert torch.equal(labels.refused_RT, disputed)
    for changed in (
        replace(rollout, keep_RV=torch.zeros_like(rollout.teacher_RV)),
        replace(rollout, teacher_RV=torch.zeros_like(rollout.teacher_RV)),
        replace(rollout, donor_R=(torch.arange(12) + 3) % 12),
    ):
        assert not disputed_tokens(batch, noise, changed).any()


def test_contrary_items_are_negatives_of_coverage(model, batch, tmp_path):
    one = stage(("cov",), ("coverage",), item_contradict=0.5)
    noise, generator = draws(batch, one)
    arguments = make_arguments(tmp_path)
    branches = run_branches(model, batch, one, noise, arguments, model.config, generator)
    chosen = contrary_items(batch, noise)
    assert torch.equal(branches.contrary_BP, chosen)
    assert 0 < chosen.sum() < batch["item_mask"].any(2).sum()
    rollout = student_rollout(batch, one, noise, model.config, generator)
    width = batch["item_ids"].shape[2]
    assert torch.equal(rollout.item_ids_BPL[~chosen][:, :width], batch["item_ids"][~chosen])
    width = batch["contrary_item_ids"].shape[2]
    assert torch.equal(rollout.item_ids_BPL[chosen][:, :width], batch["contrary_item_ids"][chosen])
    # By hand: logit 0 costs ln 2 everywhere; a confident "stated" costs 10 on every block of a contrary item.
    rows = chosen.repeat_interleave(3, dim=0)[:, None].expand_as(batch["coverage_targets"])
    right = torch.where(batch["coverage_targets"] & ~rows, 10.0, -10.0)
    wrong = torch.where(rows, 10.0, right)
    counted = batch["coverage_mask"]
    for logits, expected in ((right, 0.0), (wrong, 10 * (rows & counted).sum() / counted.sum())):
        output = type(branches.student)(**{**branches.student, "coverage_logits": logits})
        loss = loss_parts(replace(branches, student=output), batch, one, arguments)["cov"]
        assert loss.item() == pytest.approx(float(expected), abs=1e-3)
    bare = {**batch, "contrary_item_mask": torch.zeros_like(batch["contrary_item_mask"])}
    with pytest.raises(ValueError, match="item_contradict is above 0, allowed: features of a FeatureMaker"):
        contrary_items(bare, noise)


def small_view():
    """One row of three blocks of two tokens; both tokens of block 1 and the last of block 2 repeat facts."""
    return {
        "write_round": torch.tensor([[-1, 0, 0, 1, 1, 2, 2]]),
        "labels": torch.tensor([[IGNORE_INDEX, 5, 5, 5, 5, 5, 5]]),
        "reference": torch.tensor([[-1, -1, -1, 0, 0, -1, 1]]),
        "ready": torch.tensor([[-1, -1, -1, 0, 0, -1, 1]]),
        "judgeable": torch.tensor([[False, True, True]]),
        "contradicts": torch.tensor([[False, False, False]]),
    }


def test_readiness_labels_are_the_datas():
    view = small_view()
    labels = readiness_labels(view, planted_labels(view))
    assert labels.judged_RV.tolist() == [[False, True, True]]
    assert labels.refused_RV.tolist() == [[False, True, False]]
    assert labels.refused_RT.nonzero()[:, 1].tolist() == [3, 4]
    assert labels.judged_RT.nonzero()[:, 1].tolist() == [3, 4, 6]
    with pytest.raises(ValueError, match="agreement_labels='readiness', allowed: documents whose streams"):
        readiness_labels({**view, "ready": torch.full((1, 7), -1)}, planted_labels(view))


def test_automatic_labels_compare_sums_of_blocks_with_the_margin():
    view = small_view()
    # Blocks gain 4.0, 0.7 + 0.6 = 1.3 and 2.0 - 1.5 = 0.5 nats; block 0 is not judged.
    gain = torch.tensor([2.0, 2.0, 0.7, 0.6, 2.0, -1.5])
    labels = automatic_labels(view, planted_labels(view), gain, 1.0)
    assert labels.refused_RV.tolist() == [[False, True, False]]
    assert labels.judged_RV.tolist() == [[False, True, True]]
    assert labels.judged_RT.nonzero()[:, 1].tolist() == [6]
    assert not labels.refused_RT.any()
    assert not automatic_labels(view, planted_labels(view), gain, 1.31).refused_RV.any()
    planted = {**view, "contradicts": torch.tensor([[False, False, True]])}
    both = automatic_labels(planted, planted_labels(planted), gain, 1.0)
    assert both.refused_RV.tolist() == [[False, True, True]]


def test_fresh_notes_are_compared_with_those_of_decodings_lag(model, batch, tmp_path):
    one = stage(("agree",), ("agreement",), agreement_labels="auto", lag_jitter=1.0)
    noise, generator = draws(batch, one)
    branches = run_branches(model, batch, one, noise, make_arguments(tmp_path), model.config, generator)
    gain = branches.fresh_gain_M
    assert gain.shape == branches.targets.tokens_M.shape and not gain.requires_grad
    assert gain.abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {**BUS_STAGE, "bus_mix": 0.5, "note_paraphrase": 0.5, "note_contradict": 0.5, "losses": {"lm_ce": 1, "kd": 1}},
        {**HEAD_STAGE, "agreement_labels": "auto", "item_contradict": 0.3},
        {**HEAD_STAGE, "agreement_labels": "readiness", "bus_mix": 0.5, "note_contradict": 0.5},
    ],
)
def test_a_step_trains(tmp_path, changes):
    dataset = WorldFeatures("train", 4, MAKER, WorldOptions(3))
    trainer = make_trainer(tmp_path, [changes], max_steps=1, train_dataset=dataset, agreement_margin=0.0)
    trainer.train()
    first = trainer.state.log_history[0]
    assert all(first[f"loss_{name}"] > 0 for name in changes["losses"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"note_paraphrase": 0.1}, r"note_paraphrase=0.1 does nothing, allowed: with bus_mix above 0"),
        ({"note_contradict": 0.1}, r"note_contradict=0.1 does nothing, allowed: with bus_mix above 0"),
        ({"item_contradict": 0.1}, r"item_contradict=0.1 does nothing, allowed: with a weight of cov"),
        ({"agreement_labels": "auto"}, r"agreement_labels='auto' does nothing, allowed: with a weight of agree"),
        ({"agreement_labels": "manual"}, r"agreement_labels: 'manual' is unknown"),
        ({"note_paraphrase": 1.1, "bus_mix": 1.0}, r"note_paraphrase=1.1, allowed: a number at least 0.0"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)
