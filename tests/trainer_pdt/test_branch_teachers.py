"""Teachers of a step: what notes, averaged weights, a text or the trunk aim at, and what they leave alone."""

from dataclasses import replace

import pytest
import torch

from tests.step_passes import READING, branches_of, drifted_teacher, full_batch, moved_model, stage
from trainer_pdt.callbacks import parameter_group
from trainer_pdt.losses import TopKTeacher, supervised_positions, weighted_total
from trainer_pdt.objective import loss_parts
from trainer_pdt.teacher import EmaTeacher, predict


class Wrapped(torch.nn.DataParallel):
    """What DDP and DeepSpeed do to a model: another module around it."""

    @property
    def config(self):
        return self.module.config


@pytest.fixture(scope="module")
def model():
    return moved_model()


@pytest.fixture(scope="module")
def batch(model):
    return full_batch(model)


@pytest.fixture(scope="module")
def ema(model):
    return drifted_teacher(model)


def test_teacher_publishes_only_blocks_that_have_true_notes(model, batch, tmp_path):
    rollouts = []

    class Spy(Wrapped):
        def forward(self, **inputs):
            rollouts.append(inputs.get("rollout"))
            return super().forward(**inputs)

    branches_of(Spy(model), batch, stage(["lm_ce", "notes"]), tmp_path)
    told = batch["note_mask"].any(dim=2)
    assert (batch["block_exists"] & ~told).any()
    student, teacher = rollouts
    assert student.keep_RV is None and student.teacher_RV is None
    assert torch.equal(teacher.teacher_RV, told) and torch.equal(teacher.keep_RV, told)


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.pdt_parameters().items()}


@pytest.mark.parametrize("kind", ["notes", "ema", "text", "trunk"])
def test_every_teacher_distils_into_the_readers(model, batch, ema, tmp_path, kind):
    one = stage(["kd"])
    branches, arguments = branches_of(model, batch, one, tmp_path, ema, teacher_kind=kind)
    kd = loss_parts(branches, batch, one, arguments)["kd"]
    assert kd > 0
    moved = {parameter_group(name) for name, g in gradients(model, kd).items() if g is not None and g.abs().sum() > 0}
    assert moved == READING
    wrapped, _ = branches_of(Wrapped(model), batch, one, tmp_path, ema, teacher_kind=kind)
    assert torch.equal(loss_parts(wrapped, batch, one, arguments)["kd"], kd)


@pytest.mark.parametrize("loss", ["kd", "kd_plan", "spec", "spec_kl"])
def test_averaged_weights_are_the_aim(model, batch, ema, tmp_path, loss):
    one = stage([loss])
    live, arguments = branches_of(model, batch, one, tmp_path)
    averaged, _ = branches_of(model, batch, one, tmp_path, ema, teacher_kind="ema")
    assert (averaged.teacher is None) == (loss != "kd_plan")
    assert not averaged.averaged.logits.requires_grad
    assert torch.equal(averaged.student.speculation, live.student.speculation)
    parts = [loss_parts(branches, batch, one, arguments)[loss] for branches in (live, averaged)]
    assert not torch.allclose(*parts)


def test_a_pass_with_averaged_weights_leaves_the_students_gradient_alone(model, batch, ema, tmp_path):
    plain = stage(["lm_ce"])
    branches, arguments = branches_of(model, batch, plain, tmp_path)
    alone = gradients(model, loss_parts(branches, batch, plain, arguments)["lm_ce"])
    both = stage(["lm_ce", "kd"])
    branches, arguments = branches_of(model, batch, both, tmp_path, ema, teacher_kind="ema")
    beside = gradients(model, loss_parts(branches, batch, both, arguments)["lm_ce"])
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone if alone[name] is not None)


@pytest.mark.parametrize("kind", ["notes", "ema"])
def test_distillation_is_zero_where_notes_and_weights_agree(model, batch, tmp_path, kind):
    ema = EmaTeacher(model, 0.5)
    ema.start()
    nothing = {**batch, "note_mask": torch.zeros_like(batch["note_mask"])}
    silent = stage(["kd"], note_drop=1.0)
    branches, arguments = branches_of(model, nothing, silent, tmp_path, ema, teacher_kind=kind)
    assert loss_parts(branches, nothing, silent, arguments)["kd"].abs() < 1e-6
    branches, _ = branches_of(model, batch, silent, tmp_path, ema, teacher_kind=kind)
    assert loss_parts(branches, batch, silent, arguments)["kd"] > 1e-4


def test_the_trunk_teaches_nothing_about_repeated_facts(model, batch, tmp_path):
    one = stage(["kd"])
    branches, arguments = branches_of(model, batch, one, tmp_path, teacher_kind="trunk")
    flat_MV = branches.aim.masked_fill(branches.targets.sibling_M[:, None], 0.0)
    other = replace(branches, aim=flat_MV)
    assert not torch.equal(flat_MV, branches.aim)
    parts = [loss_parts(b, batch, one, arguments)["kd"] for b in (branches, other)]
    assert torch.equal(*parts)


def bucketed(logits, teacher):
    """Log-probabilities of a teacher's kept tokens and of the rest in full logits."""
    log_probs = torch.log_softmax(logits / teacher.temperature, dim=-1)
    rest = log_probs.scatter(1, teacher.indices_Mk, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, teacher.indices_Mk), rest], dim=1)


@pytest.mark.parametrize("kind", ["notes", "ema", "text", "trunk"])
def test_best_tokens_are_those_of_all_logits_and_never_exist_together(model, batch, ema, tmp_path, monkeypatch, kind):
    rows = []
    head = model.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr("trainer_pdt.teacher.LOGIT_ROWS", 16)
    losses = stage(["kd", "keep_close", "stab", "use"])
    chosen = {"teacher_kind": kind, "kd_temperature": 2.0, "usage_sensitivity": 0.0}
    full, _ = branches_of(model, batch, losses, tmp_path, ema, **chosen)
    monkeypatch.setattr(head, "forward", lambda hidden: rows.append(len(hidden)) or forward(hidden))
    small, _ = branches_of(model, batch, losses, tmp_path, ema, kd_top_k=5, **chosen)
    assert len(full.targets.tokens_M) > max(rows) == 16
    for name in ("aim", "trunk", "stale"):
        teacher, logits = getattr(small, name), getattr(full, name)
        assert isinstance(teacher, TopKTeacher)
        assert teacher.temperature == (1.0 if name == "trunk" else 2.0)
        assert torch.allclose(teacher.log_probs_MC, bucketed(logits, teacher), atol=1e-4)
    for name in ("silent_ce_M", "informed_ce_M"):
        assert torch.allclose(getattr(small, name), getattr(full, name), atol=1e-5)
    assert small.target is None or small.target.logits.shape[0] == 0
    assert torch.equal(small.student.logits.whole(), full.student.logits.whole())


@pytest.mark.usefixtures("process_group")
def test_best_tokens_of_a_model_that_is_wrapped(model, batch, tmp_path):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "stream_ids")}
    for top_k in (0, 5):
        seen = [
            predict(m, supervised_positions(batch["labels"]), top_k, (1.0,), **inputs)[1].distributions[0]
            for m in (model, wrapped)
        ]
        tensors = [one.log_probs_MC if top_k else one for one in seen]
        assert torch.equal(*tensors)
    one = stage(["lm_ce", "kd"])
    parts = []
    for m in (model, wrapped):
        model.zero_grad()
        branches, arguments = branches_of(m, batch, one, tmp_path, config=model.config)
        weighted_total(loss_parts(branches, batch, one, arguments), one.losses).total.backward()
        parts.append([p.grad.clone() for p in model.pdt_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
