"""Logits in parts: the same values and gradients as whole ones, without many of their size at once."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.tiny_training import BUS_STAGE, make_model, make_trainer, weights
from trainer_pdt.losses import ChunkedLogits, token_ce, token_kl, top_k_teacher

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
    """A frozen head that counts its calls, and the rows that it was given at most."""

    def __init__(self):
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.requires_grad_(False)
        self.most = self.calls = 0

    def forward(self, hidden_MD):
        self.most, self.calls = max(self.most, len(hidden_MD)), self.calls + 1
        return super().forward(hidden_MD)


def reads(tokens, target):
    return {
        "ce": lambda logits, place: token_ce(logits, tokens[place]),
        "kl": lambda logits, place: token_kl(logits, target[place], 2.0),
    }


@pytest.mark.parametrize("rows", [1, 4, TOKENS, 50])
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("top_k", [0, 5])
def test_values_and_gradients_are_those_of_whole_logits(rows, remade, top_k):
    torch.manual_seed(0)
    head, hidden, teacher = Head(), torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, VOCABULARY)
    target = top_k_teacher(teacher, top_k, 2.0) if top_k else teacher
    tokens, weight = torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    logits = head(hidden)
    expected = {"ce": token_ce(logits, tokens), "kl": token_kl(logits, target, 2.0)}
    head.most = head.calls = 0
    chunked = ChunkedLogits(hidden, head, rows, remade)
    with torch.no_grad():
        torch.testing.assert_close(chunked.whole(), logits)
    head.calls = 0 if remade else head.calls
    found = chunked.read(reads(tokens, target))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad((values["ce"] * weight).sum() + values["kl"].mean(), hidden)[0]
        for values in (expected, found)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert head.most == min(rows, TOKENS)
    assert head.calls == math.ceil(TOKENS / rows) * (2 if remade else 1)
    assert not chunked.whole().requires_grad


def test_no_token_is_no_error():
    logits = ChunkedLogits(torch.zeros(0, WIDTH, requires_grad=True), Head(), 4, remade=True)
    found = logits.read(reads(torch.zeros(0, dtype=torch.long), torch.zeros(0, VOCABULARY)))
    assert found["ce"].shape == found["kl"].shape == (0,)


class Largest(TorchDispatchMode):
    """Remembers the most bytes of storages of some size that were alive at the same time."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.alive, self.most = smallest, {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), choices=None):
        out = function(*arguments, **(choices or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.smallest and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def test_gradients_of_the_vocabularys_size_never_exist_together():
    vocabulary, tokens, rows = 4096, 64, 8
    hidden, head = torch.randn(tokens, WIDTH, requires_grad=True), nn.Linear(WIDTH, vocabulary).requires_grad_(False)
    target = top_k_teacher(torch.randn(tokens, vocabulary), 4, 2.0)
    whole, part = tokens * vocabulary * 4, rows * vocabulary * 4
    for remade, most in ((False, whole + 3 * part), (True, 4 * part)):
        with Largest(part) as largest:
            found = ChunkedLogits(hidden, head, rows, remade).read(reads(torch.zeros(tokens).long(), target))
            (found["ce"] + found["kl"]).sum().backward()
        assert 0 < largest.most <= most


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
