"""What passes over the same rows need not compute: texts a second time, SNC in the prompt."""

from dataclasses import replace

import torch

from modeling_pdt import rollout as rollout_module
from modeling_pdt.note_states import NoteStates
from modeling_pdt.rollout import encode_texts, run_bus
from modeling_pdt.snc import SharedNotesCrossAttention


def counted(monkeypatch) -> list[int]:
    """Numbers of texts of the calls of `encode_texts`."""
    calls = []

    def encode(stack, ids, mask):
        calls.append(len(ids))
        return encode_texts(stack, ids, mask)

    monkeypatch.setattr(rollout_module, "encode_texts", encode)
    return calls


@torch.no_grad()
def test_texts_are_encoded_once_for_all_passes_of_a_step(model, make_model, make_rollout, monkeypatch):
    batch, calls = make_rollout(items=4, true_notes=True), counted(monkeypatch)
    first = model(**batch.inputs)
    assert calls
    calls.clear()
    older = replace(batch.rollout, lag_R1=batch.rollout.lag_R1 + 1, wants_coverage=False, wants_agreement=False)
    model(**{**batch.inputs, "rollout": older})
    assert not calls
    fresh = replace(batch.rollout, encoded={})
    assert torch.equal(model(**{**batch.inputs, "rollout": fresh}).logits, first.logits)
    calls.clear()
    make_model("llama")(**batch.inputs)
    assert calls


@torch.no_grad()
def test_other_texts_are_encoded_anew(model, make_rollout):
    batch = make_rollout(items=4)
    before = run_bus(model.stack, model(**batch.inputs).tap, batch.rollout).plan_BPN
    changed = replace(batch.rollout, item_ids_BPL=(batch.rollout.item_ids_BPL + 7).clamp(2, 96))
    after = run_bus(model.stack, model(**batch.inputs).tap, changed).plan_BPN
    assert not torch.equal(before, after)


def test_snc_skips_tokens_before_the_first_reader():
    torch.manual_seed(0)
    snc = SharedNotesCrossAttention(16, 12, 4, "dynamic", -0.5, "trunk_space")
    hidden, notes = torch.randn(6, 9, 16, requires_grad=True), torch.randn(2, 7, 12)
    mask = (torch.rand(6, 9, 7) > 0.4).index_fill(1, torch.arange(4), False)
    keys, values = snc.project(notes)
    plain = NoteStates((keys,), (values,), mask, 3)
    outputs = [snc(hidden, states, 0) for states in (plain, replace(plain, first_reader=4))]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    assert torch.equal(outputs[1][:, :4], hidden[:, :4])
    gradients = [
        torch.autograd.grad(out.square().sum(), [hidden, *snc.parameters()], retain_graph=True) for out in outputs
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_heads_alone_say_the_same_and_reach_every_parameter(model, make_rollout, process_group, monkeypatch):
    """DDP waits for the gradient of every parameter that it has seen in the output."""
    batch = make_rollout(items=4)
    rollout = replace(batch.rollout, wants_coverage=True, wants_agreement=True)
    whole = model(**{**batch.inputs, "rollout": rollout})
    monkeypatch.setattr(model.stack, "upper", None)
    heads = model(**{**batch.inputs, "rollout": rollout}, heads_only=True)
    assert heads.logits is None and heads.loss is None
    for name in ("speculation", "coverage_logits", "agreement_logits", "agreement_token_logits"):
        assert torch.equal(heads[name], whole[name])
    total = sum(value.sum() for value in heads.values() if torch.is_tensor(value))
    gradients = torch.autograd.grad(total, list(model.pdt_parameters().values()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
