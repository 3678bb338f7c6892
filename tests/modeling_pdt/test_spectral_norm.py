"""The limit on singular values: found as a decomposition finds them, kept from the start on, saved and loaded."""

import pytest
import torch

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from modeling_pdt.spectral_norm import largest_singular_value, limit_spectral_norm

TRUNKS = ("gpt_oss", "llama", "qwen3")


def limited_weights(model) -> list[torch.Tensor]:
    stack = model.stack
    sites = (*stack.snc, stack.heads.agreement.reader)
    linears = [getattr(site, name).weight for site in sites for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    adapters = stack.pdt_stream_adapters["default"]
    return [*linears, *(weight for module in adapters for weight in (module.down, module.up))]


@pytest.mark.parametrize("shape", [(64, 64), (16, 48), (48, 16), (3, 32, 4), (1, 5)])
def test_largest_value_is_that_of_the_decomposition(shape):
    torch.manual_seed(0)
    for matrix in (torch.randn(shape), torch.eye(*shape[-2:]).expand(shape) + 0.1 * torch.randn(shape)):
        exact = torch.linalg.svdvals(matrix)[..., 0]
        found = largest_singular_value(matrix)
        assert bool((found <= exact * 1.00001).all())
        torch.testing.assert_close(found, exact, rtol=0.01, atol=0.0)


def test_zeros_and_what_is_below_the_limit_stay_bit_for_bit():
    for weight in (torch.zeros(4, 6), torch.eye(8), 0.5 * torch.eye(8)):
        before = weight.clone()
        limit_spectral_norm(weight, 1.0)
        assert torch.equal(weight, before)


def test_each_matrix_has_its_own_limit():
    weight = torch.stack([torch.eye(4), 3.0 * torch.eye(4)])
    limit_spectral_norm(weight, 2.0)
    torch.testing.assert_close(weight, torch.stack([torch.eye(4), 2.0 * torch.eye(4)]))


@pytest.mark.parametrize("name", TRUNKS)
def test_kept_saved_and_loaded_under_the_usual_names(make_model, name, tmp_path):
    plain, model = make_model(name), make_model(name, spectral_norm=0.5)
    assert plain.config.spectral_norm is None
    assert plain.pdt_parameters().keys() == model.pdt_parameters().keys()
    with torch.no_grad():
        for weight in limited_weights(model):
            weight.add_(torch.randn_like(weight))
    model.stack.limit_spectral_norm("default")
    for weight in limited_weights(model):
        assert torch.linalg.svdvals(weight).max() <= 0.5 * 1.01
    model.save_pretrained(tmp_path, include_trunk=True)
    again = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert again.config.spectral_norm == 0.5
    for key, value in model.pdt_parameters().items():
        assert torch.equal(again.pdt_parameters()[key], value)


def test_the_start_keeps_it_too_and_from_one_on_is_the_usual_one(make_model):
    torch.manual_seed(0)
    plain = make_model("llama")
    torch.manual_seed(0)
    wide = make_model("llama", spectral_norm=10.0)
    for key, value in plain.pdt_parameters().items():
        assert torch.equal(wide.pdt_parameters()[key], value)
    torch.manual_seed(0)
    for weight in limited_weights(make_model("llama", spectral_norm=0.5)):
        assert torch.linalg.svdvals(weight).max() <= 0.5 * 1.01


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1"])
def test_bad_limits_are_named(value):
    with pytest.raises(ValueError, match=r"PDTAdapterConfig\.spectral_norm must be"):
        PDTAdapterConfig(spectral_norm=value)
