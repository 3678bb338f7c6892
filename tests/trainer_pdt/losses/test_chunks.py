"""Logits in chunks: the same losses and gradients as whole ones, never all of them at once."""

import pytest
import torch
from torch import nn

from tests.tiny_training import BUS_STAGE, make_model, make_trainer, weights
from trainer_pdt.losses import ChunkedLogits, kd_lm, lm_ce, token_ce, token_kl, top_k_teacher

TOKENS, WIDTH, VOCABULARY = 11, 8, 40
ALL = {
    "lm_ce": 1.0,
    "kd": 0.5,
    "keep_close": 0.5,
    "block_start": 0.1,
    "notes": 0.5,
    "use": 0.1,
    "stab": 0.1,
    "plan_snapshot": 0.1,
    "kd_plan": 0.1,
}


class Head(nn.Linear):
    """A frozen head that remembers how many rows it was given at most."""

    def __init__(self):
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.requires_grad_(False)
        self.most = 0

    def forward(self, hidden_MD):
        self.most = max(self.most, len(hidden_MD))
        return super().forward(hidden_MD)


@pytest.mark.parametrize("rows", [1, 4, TOKENS, 50])
@pytest.mark.parametrize("top_k", [0, 5])
def test_losses_and_gradients_are_those_of_whole_logits(rows, top_k):
    torch.manual_seed(0)
    head, hidden, teacher = Head(), torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, VOCABULARY)
    target = top_k_teacher(teacher, top_k, 2.0) if top_k else teacher
    tokens, weight = torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    found = {}
    for chunked in (False, True):
        leaf, head.most = hidden.clone().requires_grad_(), 0
        logits = ChunkedLogits(leaf, head, rows) if chunked else head(leaf)
        loss = lm_ce(logits, tokens, weight) + kd_lm(logits, target, weight, 2.0)
        loss.backward()
        found[chunked] = loss.detach(), leaf.grad
        assert head.most == (min(rows, TOKENS) if chunked else TOKENS)
    torch.testing.assert_close(found[True], found[False], rtol=1e-6, atol=1e-7)


def test_no_token_is_no_error():
    logits = ChunkedLogits(torch.zeros(0, WIDTH, requires_grad=True), Head(), 4)
    assert token_ce(logits, torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert token_kl(logits, torch.zeros(0, VOCABULARY)).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 8])
def test_a_run_takes_the_same_course(tmp_path, top_k):
    stage = {**BUS_STAGE, "train": [*BUS_STAGE["train"], "planner"], "losses": {**ALL, "planner": 0.1}}
    found = {}
    for chunk in (0, 7):
        trainer = make_trainer(tmp_path / str(chunk), [stage], kd_top_k=top_k, logits_chunk=chunk, optim="sgd")
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        found[chunk] = [entry[f"loss_{name}"] for entry in logs for name in ALL], weights(trainer.model)
    assert found[7][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[7][1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_trunk_in_bfloat16_under_mixed_precision(tmp_path, chunk):
    model = make_model()
    for name, parameter in model.named_parameters():
        if "pdt_" not in name:
            parameter.data = parameter.data.bfloat16()
    stage = {**BUS_STAGE, "losses": {"lm_ce": 1.0, "kd": 0.5, "keep_close": 0.5}}
    trainer = make_trainer(tmp_path, [stage], model, bf16=True, kd_top_k=8, logits_chunk=chunk, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss_kd"] > 0
