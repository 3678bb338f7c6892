"""Gradients of whole rows: who gets one, and exactness under gradient checkpointing."""

from dataclasses import replace

import pytest
import torch

from modeling_pdt import PDTForParallelDecoding

PLACEMENTS = ("between", "after_attention")


def losses(model, batch) -> torch.Tensor:
    return model(**batch.inputs, labels=batch.labels).loss


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_among_processes_every_parameter_joins_the_graph_and_the_trunk_does_not(
    make_model, make_batch, make_rollout, process_group, name, placement
):
    model = make_model(name, snc_placement=placement)
    rows = make_rollout(items=4).inputs
    heads = {**rows, "rollout": replace(rows["rollout"], wants_agreement=True), "heads_only": True}
    made = {key for key, value in model(**heads).items() if torch.is_tensor(value)}
    assert {"speculation", "coverage_logits", "agreement_logits", "stream_logits"} <= made
    for forward in (
        lambda: losses(model, make_rollout()),
        lambda: model(make_batch().ids).logits.sum(),
        *(lambda key=key: model(**heads)[key].sum() for key in made),
    ):
        model.zero_grad(set_to_none=True)
        forward().backward()
        for key, parameter in model.pdt_parameters().items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert all(p.grad is None for key, p in model.named_parameters() if "pdt_" not in key)


def test_self_written_notes_carry_gradient(model, make_rollout):
    losses(model, make_rollout()).backward()
    grads = {name: 0.0 if p.grad is None else float(p.grad.abs().sum()) for name, p in model.pdt_parameters().items()}
    for part in ("pdt_snc", "pdt_stream_adapters", ".writer.", ".note_norm."):
        touched = [value for name, value in grads.items() if part in name]
        assert touched and max(touched) > 0, part
    for part in (".encoder.", ".planner.", ".coverage.", ".agreement.", ".stream."):
        assert max(value for name, value in grads.items() if part in name) == 0, part


def test_true_notes_train_the_encoder(model, make_rollout):
    batch = make_rollout(true_notes=True, items=4)
    batch.inputs["rollout"] = replace(batch.rollout, teacher_RV=torch.ones(6, 4, dtype=torch.bool))
    losses(model, batch).backward()
    grads = {name: 0.0 if p.grad is None else float(p.grad.abs().sum()) for name, p in model.pdt_parameters().items()}
    for part in (".encoder.", ".item_encoder."):
        assert max(value for name, value in grads.items() if part in name) > 0, part
    assert max(value for name, value in grads.items() if ".writer." in name) == 0


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_is_exact_with_a_teacher_pass_in_between(make_model, make_rollout, name, reentrant, placement):
    model = make_model(name, trained=True, snc_placement=placement).train()
    batch, other = make_rollout(), make_rollout(lengths=[5, 9, 12, 3, 4, 13])
    teacher = {**batch.inputs, "stream_ids": batch.inputs["stream_ids"].roll(1, 0)}
    teacher["rollout"] = replace(batch.rollout, donor_R=torch.tensor([3, 4, 5, 0, 1, 2]))

    def gradients(with_teacher: bool) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        student = losses(model, batch)
        if with_teacher:
            with torch.no_grad():
                model(**teacher)
                model(**other.inputs)
            with model.disable_adapter(), torch.no_grad():
                model(**batch.inputs)
        student.backward()
        return {key: p.grad.clone() for key, p in model.pdt_parameters().items() if p.grad is not None}

    expected = gradients(with_teacher=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients(with_teacher=True)
    model.gradient_checkpointing_disable()
    assert any(grad.abs().sum() > 0 for grad in expected.values()) and actual.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, atol=0, rtol=0, msg=key)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_recomputes(make_model, make_rollout, placement):
    model, batch = make_model("llama", trained=True, snc_placement=placement).train(), make_rollout()
    model.gradient_checkpointing_enable()
    calls, layer = [], model.stack.layers[-1]
    for part in (layer.self_attn, layer.mlp, model.stack.snc[-1]):
        part.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    losses(model, batch).backward()
    counts = [calls.count(name) for name in ("LlamaAttention", "LlamaMLP", "SharedNotesCrossAttention")]
    # The prefix, the columns after it, and these once more in the backward pass.
    assert counts == [3, 3, 1]


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast_trains_in_bfloat16(make_model, make_rollout, name, placement):
    model = make_model(name, trained=True, gate_mode="dynamic", snc_placement=placement).train()
    batch = make_rollout(items=4, true_notes=True)
    teacher = torch.rand(6, batch.rollout.rounds) < 0.5
    batch.inputs["rollout"] = replace(batch.rollout, teacher_RV=teacher, wants_coverage=True, wants_agreement=True)
    exact = losses(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch.inputs, labels=batch.labels, planner_mask=batch.rollout.write_round_RT < 0)
    heads = (output.agreement_logits, output.coverage_logits, output.stream_logits, output.planner_logits)
    total = output.loss + sum(part.float().mean() for part in heads)
    total.backward()
    torch.testing.assert_close(output.loss, exact, atol=0.05, rtol=0.05)
    gradients = {key: p.grad for key, p in model.pdt_parameters().items() if p.grad is not None}
    assert len(gradients) > 20
    for key, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.dtype == torch.float32, key


def test_bf16_trunk_trains_fp32_adapters(make_trunk, make_rollout, randomize):
    trunk = make_trunk().to(torch.bfloat16)
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, notes_dim=16)).train()
    batch = make_rollout(items=4, true_notes=True, wants_coverage=True, wants_agreement=True)
    output = model(**batch.inputs, labels=batch.labels)
    assert output.logits.dtype == torch.bfloat16 and output.agreement_logits.dtype == torch.float32
    (output.loss + output.agreement_logits.mean() + output.coverage_logits.mean()).backward()
    gradients = {key: p.grad for key, p in model.pdt_parameters().items() if p.grad is not None}
    assert len(gradients) > 20
    for key, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.dtype == torch.float32, key
