"""The self check: what it measures, and that it notices an adapter that is not where it should be."""

import copy
import logging

import pytest
import torch

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding

TRAINED = ["snc", "stream_adapters"]


@pytest.fixture(params=["between", "after_attention"])
def make_trained(request, make_model):
    """`make_trained(name="gpt_oss", parts=TRAINED)`: a model of either placement whose parts count as trained."""

    def make(name: str = "gpt_oss", parts: list[str] = TRAINED, **overrides) -> PDTForParallelDecoding:
        return make_model(name, trained=True, snc_placement=request.param, trained_parts=parts, **overrides)

    return make


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
def test_a_trained_model_passes(make_trained, name, caplog):
    model = make_trained(name)
    found = model.check_conditioning()
    assert found.silent_change == 0.0 and found.notes_change > 1e-3 and found.streams_change > 1e-3
    assert (found.snc_placement, found.layers) == (model.config.snc_placement, model.config.instrumented_layers)
    assert found.untrained == [] and not caplog.records
    assert copy.deepcopy(model).check_conditioning() == found


def test_the_model_is_left_as_it_was(make_trained, tmp_path):
    model = make_trained("llama").train()
    model.trunk.lm_head.eval()
    model.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    assert model.check_conditioning().silent_change == 0.0
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in [*model.stack.snc, *model.stack.layers])
    model.save_pretrained(tmp_path, include_trunk=True)
    assert PDTForParallelDecoding.from_pretrained(tmp_path).check_conditioning() == model.check_conditioning()


def test_an_untrained_model_is_told_what_changes_nothing_yet(make_model, caplog):
    with caplog.at_level(logging.WARNING):
        found = make_model("llama").check_conditioning()
    assert found.notes_change > 1e-3 and found.streams_change == 0.0 and found.untrained == TRAINED
    assert [record.getMessage() for record in caplog.records] == [
        "snc is untrained and changes the logits without having learnt to.",
        "stream_adapters is untrained and does not change the logits yet.",
    ]
    caplog.clear()
    assert make_model("llama", snc_init="zero").check_conditioning().notes_change == 0.0
    assert "snc is untrained and does not change the logits yet." in caplog.text


@pytest.mark.parametrize(("part", "container"), [("snc", "pdt_snc"), ("stream_adapters", "pdt_stream_adapters")])
def test_a_trained_part_without_effect_is_an_error(make_trained, part, container):
    model = make_trained("llama")
    with torch.no_grad():
        for name, parameter in model.pdt_parameters().items():
            if container in name and (".up" in name or ".o_proj." in name):
                parameter.zero_()
    with pytest.raises(RuntimeError, match=f"{part} is trained, but does not change the logits on layers"):
        model.check_conditioning()


def test_a_broken_forward_is_an_error(make_trained):
    model = make_trained("llama")
    model.stack.snc[-1].forward = lambda hidden, note_states, site: hidden + 1.0
    with pytest.raises(RuntimeError, match="notes that nobody may see change the logits by"):
        model.check_conditioning()


def test_a_site_that_is_passed_by_is_an_error(make_trained):
    model = make_trained("llama")
    model.stack.base_layer.layers = model.stack.base_layer.layers[:-1]
    with pytest.raises(RuntimeError, match=r"passes by \[.*'StreamAdapter'\] on layers \[1, 2\]"):
        model.check_conditioning()


def test_an_adapter_that_is_not_installed_is_an_error(make_trained):
    model = make_trained("llama")
    with model.disable_adapter(), pytest.raises(RuntimeError, match="'default' is disabled"):
        model.check_conditioning()
    model.peft.unload()
    with pytest.raises(RuntimeError, match="bare LlamaModel: its PDT layer was taken off"):
        model.check_conditioning()


def test_a_configuration_of_another_adapter_is_an_error(make_trained):
    model = make_trained("llama")
    model.peft.add_adapter("second", PDTAdapterConfig(notes_dim=8, instrumented_layers=1))
    model.peft.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"'second' is active.*attach_adapter"):
        model.check_conditioning()
    model.config.attach_adapter(model.peft.active_peft_config)
    assert model.check_conditioning().layers == [2]
