"""Drafted decoding: no draft, good or bad, changes a token; good ones save calls of the trunk."""

import copy
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from tests.tiny_baselines import OPTIONS, make_request, sliding_model, tiny_model, tokenizer
from trainer_pdt.baselines import METHODS, Tools, run_method
from trainer_pdt.baselines.answer import Answer, Call
from trainer_pdt.baselines.drafts import DraftRow, DraftTree, write_drafted
from trainer_pdt.baselines.lookahead import Lookahead, LookaheadOptions
from trainer_pdt.baselines.meter import CallMeter

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 1.0, "seed": 5}
BOTH = pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])


def run(name, model=None, tools=None, **options):
    return run_method(name, model or tiny_model(), tokenizer(), make_request(), {**OPTIONS, **options}, tools)


@lru_cache
def expected(make=tiny_model, sampled=False):
    """The sequential answer of each model, written once."""
    return run("sequential", make(), **(SAMPLED if sampled else {}))


def drafted(drafter, model=None, **options):
    """Tokens and calls of an answer that `drafter` proposes for."""
    model = model or tiny_model()
    with torch.no_grad(), model.disable_adapter(), CallMeter(model.trunk) as meter:
        answer = Answer(Call("x", model, tokenizer(), make_request(), {**OPTIONS, **options}, meter))
        write_drafted(answer, drafter)
        return [stream.token_ids for stream in answer.output().streams[0]], meter.steps


class Oracle:
    """Proposes what will be written, with one wrong token among it."""

    def __init__(self, sections, wrong):
        self.sections, self.wrong = sections, wrong

    def start(self, stream, given, state_TD):
        self.section = stream

    def draft(self, token, place):
        tree = DraftTree(token)
        tree.add_path([7, 8])
        future = list(self.sections[self.section][place : place + 4])
        if self.wrong and place % 3 == 0 and len(future) > 2:
            future[2] = (future[2] + 1) % 100
        tree.add_path([*future, *[3] * 9])
        return tree

    def learn(self, tree, chosen, path, state_TD):
        assert [chosen[parent] for parent in [0, *path][:-1]] == [tree.tokens[node] for node in path]


@BOTH
@pytest.mark.parametrize("make", [tiny_model, sliding_model])
def test_drafts_save_calls_and_change_nothing(make, sampled):
    known = expected(make, sampled)
    # 4 drafted tokens and one more stand at a time, or 2 and one more where the third is wrong.
    for wrong, stride in ((False, 5), (True, 3)):
        tokens, steps = drafted(Oracle(known.tokens, wrong), make(), **(SAMPLED if sampled else {}))
        assert tokens == known.tokens
        assert steps == sum(-(-len(section) // stride) for section in tokens)


@BOTH
@pytest.mark.parametrize("name", ["lookahead", pytest.param("prompt_lookup", marks=pytest.mark.slow)])
def test_lossless_methods_write_what_sequential_writes(name, sampled):
    assert METHODS[name].lossless
    found = run(name, **(SAMPLED if sampled else {}))
    assert found.tokens == expected(sampled=sampled).tokens
    assert found.calls < expected(sampled=sampled).calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt_lookup", "lookahead"])
def test_a_section_ends_where_the_sequential_one_ends(name):
    """With EOS among the tokens that stand, and behind the last of them."""
    known = expected(sampled=True).tokens
    for eos in (known[0][3], known[1][4]):
        options = {**SAMPLED, "eos_token_id": eos}
        assert run(name, **options).tokens == run("sequential", **options).tokens


@pytest.mark.slow
@BOTH
def test_an_assistant_changes_nothing(sampled):
    options, trunk = SAMPLED if sampled else {}, copy.deepcopy(tiny_model().trunk)
    itself = run("assistant", tools=Tools(assistant=trunk), **options)
    assert itself.tokens == expected(sampled=sampled).tokens
    # The assistant draws with the trunk's numbers: where it is the trunk itself, it is always right.
    assert itself.calls * 2 < expected(sampled=sampled).calls
    with torch.no_grad():
        trunk.get_output_embeddings().weight.neg_()
    assert run("assistant", tools=Tools(assistant=trunk), **options).tokens == expected(sampled=sampled).tokens


def test_the_assistant_is_asked_for():
    with pytest.raises(ValueError, match="method 'assistant' needs a smaller model of the same vocabulary"):
        run("assistant")


def test_lookahead_keeps_the_newest_ngrams_of_its_columns():
    drafter = Lookahead(LookaheadOptions(window=2, ngram=3, guesses=2))
    drafter.start(0, [5, 6], torch.empty(0))
    drafter.levels = [[1, 2], [3, 4]]
    tree = drafter.draft(9, 0)
    # The older row follows the last token, the newer one its own columns.
    assert list(zip(tree.tokens, tree.parents, strict=True)) == [(9, -1), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert tree.depths == [0, 1, 2, 2, 3]
    drafter.learn(tree, [0, 0, 0, 30, 40], [], torch.empty(0))
    assert drafter.pool == {1: {(3, 30): None}, 2: {(4, 40): None}}
    assert drafter.levels == [[3, 4], [30, 40]]
    tree = drafter.draft(2, 0)
    assert tree.add_path([4, 40]) == [5, 6]
    drafter.learn(tree, [0] * 7, [5], torch.empty(0))
    assert [level[0] for level in drafter.levels] == [40, 0]
    assert all(level[1] in (5, 6) for level in drafter.levels)
    for token in (50, 51, 52):
        drafter.levels = [[1, 1], [token, token]]
        drafter.learn(drafter.draft(9, 0), [0] * 9, [], torch.empty(0))
    assert drafter.pool[1] == {(51, 0): None, (52, 0): None}


@pytest.mark.parametrize("field", ["window", "ngram", "guesses"])
def test_sizes_of_lookahead_have_ranges(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        LookaheadOptions(**{field: 0})


@torch.no_grad()
def test_a_tree_is_read_like_each_of_its_paths():
    """Windows count distances along a path, whatever stands beside it in the cache."""
    model = sliding_model()
    row = DraftRow(SimpleNamespace(trunk=model.trunk, device=torch.device("cpu")))
    ids = tokenizer()(make_request().prompt, add_special_tokens=False)["input_ids"]
    row.feed(ids, range(len(ids)), torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
    row.keep(range(len(ids)))
    tree = DraftTree(20)
    paths = [tree.add_path(path) for path in ([21, 22, 23], [21, 24], [25])]
    for _ in range(2):
        states = row.feed(tree.tokens, tree.depths, tree.sees())
        for path in paths:
            whole = torch.tensor([ids + [20] + [tree.tokens[node] for node in path]])
            expected = model.trunk.base_model(whole, past_key_values=DynamicCache()).last_hidden_state[0]
            torch.testing.assert_close(states[[0, *path]], expected[len(ids) :], atol=1e-5, rtol=1e-4)
        row.keep([0, *paths[1]])
        ids = [*ids, 20, 21, 24]
