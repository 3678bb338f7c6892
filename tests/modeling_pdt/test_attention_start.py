"""SNC from the trunk's attention: the same scores and updates, of the best rank where its heads are narrower."""

import copy

import pytest
import torch

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.attention_start import factors, start_from_attention
from modeling_pdt.snc import SharedNotesCrossAttention, orthogonal_rows

WIDTH, HEADS = 32, 4


def started(layer, notes_dim=WIDTH):
    snc = SharedNotesCrossAttention(WIDTH, notes_dim, HEADS, "scalar", 0.0, "trunk_attention")
    projection = orthogonal_rows(notes_dim, WIDTH)
    start_from_attention(snc, layer, projection)
    return snc, projection


def shuffled(layer):
    """Channel scales and head norms that are not all ones."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return layer


def states(count, seed=0):
    """States of RMS 1."""
    found = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return found / found.square().mean(-1, keepdim=True).sqrt()


def scores_of_attention(layer, asking, offering):
    """What the trunk's heads score, without positions: `[H, asking, offering]`."""
    attention = layer.self_attn

    def heads(projection, norm, vectors):
        found = projection(layer.input_layernorm(vectors)).view(len(vectors), -1, attention.head_dim)
        return norm(found).transpose(0, 1)

    no_norm = torch.nn.Identity()
    queries = heads(attention.q_proj, getattr(attention, "q_norm", no_norm), asking)
    keys = heads(attention.k_proj, getattr(attention, "k_norm", no_norm), offering)
    return queries @ keys.repeat_interleave(2, dim=0).transpose(1, 2) * attention.scaling


def scores_of_snc(snc, asking, notes):
    keys, _ = snc.project(notes[None])
    queries = snc.q_proj(snc.norm(asking)).view(len(asking), HEADS, -1).transpose(0, 1)
    return queries @ keys[0, :, :-1].transpose(1, 2)


def updates_of_attention(layer, offering):
    """What the trunk adds where every head looks at one state, without biases."""
    attention = layer.self_attn
    values = layer.input_layernorm(offering) @ attention.v_proj.weight.T
    values = values.view(len(offering), -1, attention.head_dim).repeat_interleave(2, dim=1)
    return values.flatten(1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("head_dim", [8, 4])
def test_a_note_is_found_and_read_as_the_layer_would_a_state(make_trunk, name, head_dim):
    layer = shuffled(make_trunk(name, head_dim=head_dim, attention_bias=False).model.layers[1])
    snc, _ = started(layer)
    asking, offering = states(5), states(7, seed=1)
    torch.testing.assert_close(
        scores_of_snc(snc, asking, offering), scores_of_attention(layer, asking, offering), atol=1e-5, rtol=1e-4
    )
    ours, theirs = snc.o_proj(snc.v_proj(offering)).detach(), updates_of_attention(layer, offering).detach()
    factor = float((ours * theirs).sum() / theirs.square().sum())
    torch.testing.assert_close(ours, factor * theirs, atol=1e-5, rtol=1e-4)
    # As large as an identity's, so that what a gate lets through is so many RMS of the state.
    assert float((snc.o_proj.weight @ snc.v_proj.weight).norm()) == pytest.approx(WIDTH**0.5, rel=1e-4)


def test_wider_heads_become_their_best_approximation(make_trunk):
    layer = shuffled(make_trunk("llama", head_dim=16).model.layers[0])
    snc, _ = started(layer)
    eye = torch.eye(WIDTH)
    exact = scores_of_attention(layer, eye * WIDTH**0.5, eye * WIDTH**0.5)
    u, s, vh = torch.linalg.svd(exact)
    best = u[:, :, :8] @ torch.diag_embed(s[:, :8]) @ vh[:, :8]
    found = scores_of_snc(snc, eye * WIDTH**0.5, eye * WIDTH**0.5)
    torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, exact, atol=1e-2)


def test_head_norms_give_scores_of_the_same_size(make_trunk):
    layer = shuffled(make_trunk("qwen3", head_dim=8).model.layers[0])
    asking, offering = states(200), states(200, seed=1)
    found = scores_of_snc(started(layer)[0], asking, offering).flatten(1)
    wanted = scores_of_attention(layer, asking, offering).flatten(1)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.9
        assert 0.8 < float(ours.std() / theirs.std()) < 1.25


def test_narrow_notes_are_read_as_what_they_keep_of_a_state(make_trunk):
    layer = shuffled(make_trunk("llama").model.layers[0])
    snc, projection = started(layer, notes_dim=12)
    full, _ = started(layer)
    notes = states(6) @ projection.T
    torch.testing.assert_close(snc.k_proj(notes), full.k_proj(notes @ projection), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(snc.v_proj(notes), full.v_proj(notes @ projection), atol=1e-5, rtol=1e-4)


def test_factors_leave_no_direction_that_cannot_learn():
    left, right = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    found = factors(left, right, 5)
    torch.testing.assert_close(found[0].mT @ found[1], left.mT @ right, atol=1e-5, rtol=1e-4)
    assert all(part.shape == (2, 5, 9) for part in found) and bool((found[1].abs().sum(-1) > 0).all())


def test_every_site_before_a_layer_starts_from_it(make_trunk):
    trunk = make_trunk("llama")
    want = [started(trunk.model.layers[index])[0].q_proj.weight.clone() for index in (1, 2)]
    for placement, expected in (("between", [*want, torch.eye(WIDTH)]), ("after_attention", want)):
        model = PDTForParallelDecoding.from_trunk(
            copy.deepcopy(trunk),
            num_streams=2,
            block_size=4,
            instrumented_layers=2,
            snc_init="trunk_attention",
            snc_placement=placement,
        )
        found = [snc.q_proj.weight for snc in model.stack.snc]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_missing_weights_are_left_to_who_loads_them(make_trunk):
    layer = make_trunk("llama").model.layers[0]
    snc, projection = started(layer)
    before = snc.q_proj.weight.clone()
    start_from_attention(snc, copy.deepcopy(layer).to("meta"), projection)
    assert torch.equal(snc.q_proj.weight, before)


def test_trained_adapters_need_no_start(make_trunk):
    """A trunk in a packed format has none to give; trained adapters bring their weights."""
    trunk = make_trunk("llama")
    for layer in trunk.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    options = {"num_streams": 2, "block_size": 4, "snc_init": "trunk_attention"}
    with pytest.raises(ValueError, match="packed format"):
        PDTForParallelDecoding.from_trunk(trunk, **options)
    PDTForParallelDecoding.from_trunk(trunk, trained_parts=["snc"], **options)


def test_an_attention_that_cannot_be_a_start_is_named(make_trunk):
    options = {"num_streams": 2, "block_size": 4, "snc_init": "trunk_attention"}
    with pytest.raises(ValueError, match=r"layer 1: LlamaAttention has 4 heads, allowed: as many as snc_heads=2"):
        PDTForParallelDecoding.from_trunk(make_trunk("llama"), snc_heads=2, **options)
    layer = make_trunk("llama").model.layers[0]
    layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"has q_proj in a packed format"):
        started(layer)
    layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"is spread over processes; allowed: a trunk loaded whole"):
        started(layer)
    layer.self_attn.k_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"has no k_proj; allowed: an attention with q_proj, k_proj, v_proj, o_proj"):
        started(layer)
