"""The coverage head against its equations, one item and one head at a time."""

import torch

from modeling_pdt.heads import CoverageHead
from modeling_pdt.snc import orthogonal_rows


def by_equations(head, states_TD, upto_T, item_N):
    """Logit of one item: per head, the item's query attends to keys and values of the tokens that count."""
    states, query = head.norm(states_TD), head.query(item_N)
    keys, values = head.key(states), head.value(states)
    contexts = []
    for part in torch.arange(len(query)).split(head.head_dim):
        scores = keys[:, part] @ query[part] * head.head_dim**-0.5
        weights = scores[upto_T].softmax(0)
        contexts.append(weights @ values[:, part][upto_T])
    context = torch.cat(contexts)
    mixed = head.mix(torch.cat([context, query, context * query]))
    return head.score(torch.nn.functional.gelu(mixed))[0]


def test_coverage_is_what_the_equations_say_for_every_round_and_item():
    head = CoverageHead(12, 6, 3, orthogonal_rows(6, 12))
    states, items = torch.randn(2, 7, 12), torch.randn(2, 5, 6)
    upto = torch.arange(7)[None, None] < torch.tensor([[2, 5, 7], [0, 1, 6]])[..., None]
    found = head(states, upto, items)
    assert found.shape == (2, 3, 5)
    for row in range(2):
        for number in range(3):
            for item in range(5):
                expected = by_equations(head, states[row], upto[row, number], items[row, item])
                torch.testing.assert_close(found[row, number, item], expected, atol=1e-6, rtol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_an_item_looks_for_the_words_it_is_made_of_from_the_start():
    for notes_dim in (48, 24):
        projection = orthogonal_rows(notes_dim, 48)
        head = CoverageHead(48, notes_dim, 3, projection)
        states = head.norm(torch.randn(30, 48))
        scores = (head.query(states @ projection.T) - head.query.bias) @ head.key(states).T
        assert (scores.argmax(dim=1) == torch.arange(30)).all()
