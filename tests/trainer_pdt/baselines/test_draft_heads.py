"""Heads that draft: losses, training, and drafts that never change a token, whatever the heads say."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.tiny_baselines import OPTIONS, TRUNK, make_request, sliding_model, tiny_model, tokenizer
from trainer_pdt.baselines import METHODS, Tools, run_method
from trainer_pdt.baselines.answer import Answer, Call
from trainer_pdt.baselines.drafts import candidates, write_drafted
from trainer_pdt.baselines.eagle import Eagle, EagleHead
from trainer_pdt.baselines.medusa import HEAD_DECAY, Medusa, MedusaHeads
from trainer_pdt.baselines.meter import CallMeter
from trainer_pdt.baselines.training import KINDS, DraftArguments, DraftTrainer, SequentialAnswers

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 20, "seed": 5}


class FakeTrunk:
    """Width 2, vocabulary 2: the output embedding is the identity."""

    def __init__(self):
        self.embedding = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.eye(2))

    def get_output_embeddings(self):
        return self.embedding

    def get_input_embeddings(self):
        return nn.Embedding.from_pretrained(torch.eye(2))


def test_medusa_s_loss_is_that_of_later_tokens():
    heads, state = MedusaHeads(2, num_heads=2), torch.tensor([[[3.0, 0.0]] * 4])
    labels = torch.tensor([[-100, -100, 0, 1]])
    wrong, right = math.log(1 + math.exp(3)), math.log(1 + math.exp(-3))
    # Untrained, every head guesses token 0; the first is judged on both labels, the second on the last alone.
    expected = (right + wrong) / 2 + HEAD_DECAY * wrong
    assert heads.loss(FakeTrunk(), state, labels, labels).item() == pytest.approx(expected, abs=1e-5)


def test_eagle_s_loss_compares_states_and_what_they_say():
    head = EagleHead(2, 1, 4)
    ids, state = torch.tensor([[0, 1, 0]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    head.forward = lambda embedding, before, cache=None: torch.zeros_like(before)
    labels = torch.tensor([[-100, -100, 0]])
    # The state [0, 2] is missed by 0 and 2: smooth L1 is 0 and 1.5; equal scores cost log 2.
    expected = 0.75 + 0.1 * math.log(2)
    assert head.loss(FakeTrunk(), state, ids, labels).item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def known():
    """The sequential answer, its tokens in one row, the trunk's final states of them, and where sections stand."""
    model = tiny_model()
    answer = run_method("sequential", model, tokenizer(), make_request(), OPTIONS)
    row, written = tokenizer()(make_request().prompt, add_special_tokens=False)["input_ids"], set()
    for header, tokens in zip(make_request().headers, answer.tokens, strict=True):
        row += tokenizer()(header, add_special_tokens=False)["input_ids"] + tokens
        written |= set(range(len(row) - len(tokens), len(row)))
        row += [] if tokens[-1] == tokenizer().eos_token_id else [tokenizer().eos_token_id]
    with torch.no_grad(), model.disable_adapter():
        return answer, row, model.trunk.base_model(torch.tensor([row])).last_hidden_state[0], written


def write(make):
    """Tokens and calls of an answer drafted by `make(answer)`."""
    model = tiny_model()
    with torch.no_grad(), model.disable_adapter(), CallMeter(model.trunk) as meter:
        answer = Answer(Call("x", model, tokenizer(), make_request(), OPTIONS, meter))
        write_drafted(answer, make(answer))
        return [stream.token_ids for stream in answer.output().streams[0]], meter.steps


def expected_steps(answer, stride):
    return sum(-(-len(tokens) // stride) for tokens in answer.tokens)


def test_medusa_drafts_from_the_state_of_the_token_before_the_last(known):
    """With heads that know the row, all three guesses stand in every call."""
    answer, row, states, _ = known

    def guess(state):
        place = int((states - state).norm(dim=-1).argmin())
        tokens = [row[min(place + offset, len(row) - 1)] for offset in (2, 3, 4)]
        return nn.functional.one_hot(torch.tensor(tokens), len(tokenizer())).float()

    def make(answer):
        medusa = Medusa(answer, MedusaHeads(states.shape[1]))
        medusa.heads, medusa.embedding = guess, nn.Identity()
        return medusa

    assert write(make) == (answer.tokens, expected_steps(answer, 4))


def test_eagle_drafts_from_embeddings_beside_the_states_before_them(known):
    """With a layer that knows the row, the whole chain stands in every call; what is read are true pairs."""
    answer, row, states, written = known
    embed = tiny_model().trunk.get_input_embeddings().forward

    def predict(embedding, state, cache):
        places = [int((states - one).norm(dim=-1).argmin()) for one in state[0]]
        # A chain may go past the end of its section; there the row holds what was given, not what was chosen.
        for place, given in zip(places, embedding[0], strict=True):
            if len(places) > 1 or place + 1 in written:
                assert torch.equal(given, embed(torch.tensor(row[place + 1])))
        return states[[min(place + 1, len(row) - 1) for place in places]][None]

    def make(answer):
        eagle = Eagle(answer, EagleHead.for_trunk(tiny_model().trunk), length=4)
        eagle.head = predict
        return eagle

    assert write(make) == (answer.tokens, expected_steps(answer, 5))


@torch.no_grad()
def test_a_chain_leaves_the_layer_s_cache_as_it_was():
    model = tiny_model()
    answer = Answer(Call("x", model, tokenizer(), make_request(), OPTIONS, CallMeter(model.trunk)))
    eagle = Eagle(answer, EagleHead.for_trunk(model.trunk), length=3)
    eagle.start(0, [5, 6, 7], torch.randn(2, model.trunk.config.hidden_size))
    before = eagle.cache.layers[0].keys.clone()
    assert len(eagle.draft(7, 0).tokens) == 1 + 2 * 3
    assert torch.equal(eagle.cache.layers[0].keys, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
def test_whatever_the_heads_say_the_tokens_are_the_same(kind, options):
    model = sliding_model()
    heads = KINDS[kind].for_trunk(model.trunk).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    request = model, tokenizer(), make_request(), {**OPTIONS, **options}
    assert METHODS[kind].lossless
    assert run_method(kind, *request, Tools(**{kind: heads})).tokens == run_method("sequential", *request).tokens
    with pytest.raises(ValueError, match=f"method '{kind}' needs heads trained on this trunk"):
        run_method(kind, *request)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_heads_alone_and_lowers_the_loss(kind, tmp_path):
    trunk = AutoModelForCausalLM.from_pretrained(TRUNK)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    heads = KINDS[kind].for_trunk(trunk)
    options = {"per_device_train_batch_size": 2, "learning_rate": 0.003, "logging_steps": 2, "report_to": "none"}
    training = TrainingArguments(str(tmp_path), max_steps=12, use_cpu=True, save_strategy="no", **options)
    trainer = DraftTrainer(heads, training, trunk=trunk, train_dataset=SequentialAnswers(tokenizer(), 24))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    heads.save_pretrained(tmp_path)
    loaded = KINDS[kind].from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in heads.state_dict().items())


def test_candidates_are_the_draw_and_the_likeliest_other():
    sampler = type("Fixed", (), {"choose": lambda self, scores, stream, place: torch.tensor([0, 2])})()
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 9.0]])
    assert candidates(sampler, logits, 0, torch.tensor([0, 1])) == [[0, 1], [2, 1]]


def test_impossible_training_is_refused():
    with pytest.raises(ValueError, match="documents=0"):
        DraftArguments(trunk="t", kind="medusa", documents=0)
