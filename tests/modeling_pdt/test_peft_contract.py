"""What PEFT users expect of any method: files, several named adapters, off and away, dtypes, other methods."""

import copy
import json

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from tests.modeling_pdt.conftest import llama_trunk

NOTES_DIM = 16
GREEDY = {"num_streams": 3, "max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def inputs():
    """A conditioned pass of three rows."""
    return {
        "input_ids": torch.randint(2, 97, (3, 10)),
        "stream_ids": torch.arange(3),
        "notes": torch.randn(3, 5, NOTES_DIM),
    }


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two different adapters for one trunk, saved: `(trunk state, {"first": folder, "second": folder})`."""
    torch.manual_seed(0)
    trunk = llama_trunk().eval()
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    model = PDTForParallelDecoding.from_trunk(trunk, notes_dim=NOTES_DIM, block_size=4, adapter_bottleneck=8).eval()
    places = {name: tmp_path_factory.mktemp(name) for name in ("first", "second")}
    for folder in places.values():
        with torch.no_grad():
            for parameter in model.pdt_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return state, {name: str(folder) for name, folder in places.items()}


@pytest.fixture
def fresh_trunk(folders):
    """`fresh_trunk()`: the trunk that the saved adapters belong to, loaded anew."""

    def make():
        trunk = llama_trunk().eval()
        trunk.load_state_dict(folders[0])
        return trunk

    return make


@pytest.fixture
def two(folders, fresh_trunk):
    """A model with both adapters, the first one active."""
    model = PDTForParallelDecoding.from_pretrained(folders[1]["first"], trunk=fresh_trunk())
    model.load_adapter(folders[1]["second"], "second")
    return model


@pytest.fixture
def alone(folders, fresh_trunk):
    """`alone(name)`: a model with one of the saved adapters and no other."""
    return lambda name: PDTForParallelDecoding.from_pretrained(folders[1][name], trunk=fresh_trunk())


# --- files ---


def test_names_in_the_file_are_peft_names(folders, alone):
    with safe_open(f"{folders[1]['first']}/adapter/adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert all(name.startswith("base_model.model.model.pdt_") and ".default." not in name for name in names)
    assert names == set(get_peft_model_state_dict(alone("first").peft))


def test_saved_by_peft_loaded_by_peft(two, fresh_trunk, inputs, tmp_path):
    expected = {name: logits_of(two, name, inputs) for name in ("default", "second")}
    folder = tmp_path / "peft"
    two.peft.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "second")
    }
    peft = PeftModel.from_pretrained(fresh_trunk(), folder).eval()
    peft.load_adapter(folder / "second", "second")
    for name, wanted in expected.items():
        peft.set_adapter(name)
        assert torch.equal(logits(peft, inputs), wanted), name


def test_configuration_round_trip(folders, tmp_path):
    config = PeftConfig.from_pretrained(folders[1]["first"], subfolder="adapter")
    assert isinstance(config, PDTAdapterConfig) and config.peft_type == "PDT" and config.notes_dim == NOTES_DIM
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PDT"


def test_the_folder_of_an_adapter_alone(two, folders, alone, inputs):
    two.load_adapter(f"{folders[1]['second']}/adapter", "third", subfolder="")
    assert torch.equal(logits_of(two, "third", inputs), logits(alone("second"), inputs))


def test_auto_peft_model_loads_the_trunk_that_the_adapter_names(make_trunk, randomize, inputs, tmp_path):
    make_trunk("llama").save_pretrained(tmp_path / "trunk")
    model = randomize(PDTForParallelDecoding.from_trunk(str(tmp_path / "trunk"), notes_dim=NOTES_DIM).eval())
    model.peft.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage_gives_the_same(folders, fresh_trunk, alone, inputs, low_cpu_mem_usage):
    peft = PeftModel.from_pretrained(
        fresh_trunk(), folders[1]["first"], subfolder="adapter", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    peft.load_adapter(folders[1]["second"], "second", subfolder="adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in peft.parameters())
    for adapter, name in (("default", "first"), ("second", "second")):
        peft.set_adapter(adapter)
        assert torch.equal(logits(peft, inputs), logits(alone(name), inputs))


# --- several named adapters on one trunk ---


def logits_of(model, name, inputs):
    model.set_adapter(name)
    return logits(model, inputs)


def test_switching_per_call(two, alone, inputs):
    wanted = {"default": alone("first"), "second": alone("second")}
    prompt = inputs["input_ids"]
    for name in ("default", "second", "default", "second"):
        assert torch.equal(logits_of(two, name, inputs), logits(wanted[name], inputs)), name
        assert torch.equal(two.generate(prompt, **GREEDY), wanted[name].generate(prompt, **GREEDY))
        assert two.active_adapters() == [name]
    assert not torch.equal(logits_of(two, "default", inputs), logits_of(two, "second", inputs))
    assert not any(p.requires_grad for p in two.parameters())


def test_the_configuration_follows_the_active_adapter(two, inputs):
    two.add_adapter(PDTAdapterConfig(notes_dim=8, num_streams=2, instrumented_layers=1), "narrow")
    assert (two.config.notes_dim, two.config.num_streams, two.stack.active) == (NOTES_DIM, 3, "default")
    two.set_adapter("narrow")
    assert (two.config.notes_dim, two.config.num_streams) == (8, 2)
    assert logits(two, {**inputs, "notes": inputs["notes"][..., :8]}).isfinite().all()
    assert two.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False).shape[0] == 2
    assert {name for name, p in two.named_parameters() if p.requires_grad} == {
        f"peft.{name}" for name in two.pdt_parameters()
    }
    two.set_adapter("default")
    assert two.config.notes_dim == NOTES_DIM


def test_the_active_adapter_is_saved(two, alone, fresh_trunk, inputs, tmp_path):
    two.set_adapter("second")
    two.save_pretrained(tmp_path)
    again = PDTForParallelDecoding.from_pretrained(tmp_path, trunk=fresh_trunk())
    assert torch.equal(logits(again, inputs), logits(alone("second"), inputs))


def test_disable_adapter_is_the_trunk(two, fresh_trunk, inputs):
    expected = logits(fresh_trunk(), {"input_ids": inputs["input_ids"]})
    before = logits(two, inputs)
    two.disable_adapters()
    assert torch.equal(logits(two, inputs), expected)
    two.enable_adapters()
    assert torch.equal(logits(two, inputs), before)
    with two.disable_adapter():
        assert torch.equal(logits(two, inputs), expected)
        assert torch.equal(logits(two.peft, inputs), expected)
        two.set_adapter("second")
        assert torch.equal(logits(two, inputs), expected)
    two.set_adapter("default")
    assert torch.equal(logits(two, inputs), before)


def test_delete_adapter(two, alone, inputs):
    with pytest.raises(ValueError, match="'default' is the active adapter"):
        two.delete_adapter("default")
    with pytest.raises(ValueError, match=r"'third', allowed: one of \['default', 'second'\]"):
        two.delete_adapter("third")
    two.set_adapter("second")
    two.delete_adapter("default")
    assert set(two.peft.peft_config) == {"second"} and not any(".default." in n for n, _ in two.named_parameters())
    assert torch.equal(logits(two, inputs), logits(alone("second"), inputs))
    with pytest.raises(ValueError, match=r"'default', allowed: one of \['second'\]"):
        two.set_adapter("default")


def test_unload_gives_the_exact_trunk_back(two, fresh_trunk, inputs):
    expected, plain = fresh_trunk(), {"input_ids": inputs["input_ids"]}
    trunk = two.unload()
    assert type(trunk) is type(expected) and list(trunk.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in trunk.state_dict().items())
    assert not any(isinstance(module, BaseTunerLayer) for module in trunk.modules())
    assert torch.equal(logits(trunk, plain), logits(expected, plain))
    tokens = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(trunk.generate(**plain, **tokens), expected.generate(**plain, **tokens))


def test_an_unloaded_trunk_takes_adapters_again(two, folders, alone, inputs):
    again = PDTForParallelDecoding.from_pretrained(folders[1]["second"], trunk=two.unload())
    assert torch.equal(logits(again, inputs), logits(alone("second"), inputs))


def test_names_in_use_are_refused(two, folders):
    with pytest.raises(ValueError, match="'second' is in use"):
        two.load_adapter(folders[1]["first"], "second")
    with pytest.raises(ValueError, match="'default' is in use"):
        two.add_adapter(PDTAdapterConfig(), "default")
    with pytest.raises(ValueError, match=r"unknown arguments \['dtype'\]"):
        two.load_adapter(folders[1]["first"], "third", dtype=torch.float16)


def test_the_configuration_of_a_saved_adapter_makes_new_ones(folders, fresh_trunk):
    # They were frozen and counted as trained, and did not start as new ones do.
    config = PDTAdapterConfig.from_pretrained(f"{next(iter(folders[1].values()))}/adapter")
    config.trained_parts = ["snc", "agreement"]
    torch.manual_seed(0)
    model = PDTForParallelDecoding.from_trunk(fresh_trunk(), config)
    model.add_adapter(config, "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert model.config.trained_parts == []
        assert all(parameter.requires_grad for parameter in model.pdt_parameters().values())
    assert config.inference_mode and config.trained_parts == ["snc", "agreement"]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_second_adapter_trains_only_when_asked(two, folders, is_trainable):
    two.load_adapter(folders[1]["second"], "third", is_trainable=is_trainable)
    assert not any(p.requires_grad for p in two.parameters())
    two.set_adapter("third")
    trainable = {name for name, p in two.named_parameters() if p.requires_grad}
    assert trainable == ({f"peft.{name}" for name in two.pdt_parameters()} if is_trainable else set())


def test_status(two):
    status = get_model_status(two.peft)
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "second"]
    assert (status.enabled, status.peft_types) == (True, {"default": "PDT", "second": "PDT"})
    assert [layer.module_type for layer in get_layer_status(two.peft)] == ["PDTStack"]


# --- dtypes and training ---


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_float32_on_any_trunk(folders, fresh_trunk, inputs, autocast):
    # PEFT upcasts what was made in the trunk's dtype; ours is made in float32: nothing to cast, nothing to leave.
    trunk = fresh_trunk().to(torch.bfloat16)
    peft = PeftModel.from_pretrained(
        trunk, folders[1]["first"], subfolder="adapter", autocast_adapter_dtype=autocast
    ).eval()
    assert {p.dtype for name, p in peft.named_parameters() if "pdt_" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in peft.named_parameters() if "pdt_" in name} == {torch.float32}
    assert logits(peft, inputs).dtype == torch.bfloat16 and logits(peft, inputs).isfinite().all()


def test_gradient_checkpointing_changes_no_gradient(folders, fresh_trunk, inputs):
    gradients = []
    for checkpointing in (False, True):
        peft = PeftModel.from_pretrained(fresh_trunk(), folders[1]["first"], subfolder="adapter", is_trainable=True)
        peft.train()
        if checkpointing:
            peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert peft.get_base_model().is_gradient_checkpointing
        peft(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in peft.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert set(plain) == set(checkpointed) and plain
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())
    assert all("pdt_" in name for name in plain)


# --- other methods beside it ---


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"])


def test_mixed_models_are_refused(make_trunk):
    for config in (PDTAdapterConfig(notes_dim=NOTES_DIM), lora()):
        trunk = make_trunk("llama")
        with pytest.raises(ValueError, match=r"PDT.*not compatible"):
            mixed = get_peft_model(trunk, config, mixed=True)
            assert isinstance(mixed, PeftMixedModel)
            mixed.add_adapter("second", PDTAdapterConfig(notes_dim=NOTES_DIM))


def test_a_trunk_with_lora_is_refused_with_the_way_out(make_trunk):
    for trunk in (get_peft_model(make_trunk("llama"), lora()), make_trunk("llama")):
        if not isinstance(trunk, PeftModel):
            trunk.add_adapter(lora())
        before = copy.deepcopy(trunk.state_dict())
        with pytest.raises(ValueError, match=r"another method \(layers \['Linear'\]\).*merge_and_unload"):
            PDTForParallelDecoding.from_trunk(trunk, notes_dim=NOTES_DIM)
        assert all(torch.equal(t, before[name]) for name, t in trunk.state_dict().items())


def test_merged_lora_is_part_of_the_trunk(make_trunk, inputs):
    trunk = get_peft_model(make_trunk("llama"), lora())
    for name, parameter in trunk.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = trunk.merge_and_unload()
    expected = logits(merged, {"input_ids": inputs["input_ids"]})
    model = PDTForParallelDecoding.from_trunk(merged, notes_dim=NOTES_DIM).eval()
    assert torch.equal(logits(model, {"input_ids": inputs["input_ids"]}), expected)


def test_lora_on_a_pdt_model_is_refused(two):
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        two.peft.add_adapter("other", lora())
    with pytest.raises(ValueError, match="must be a PDTAdapterConfig, got LoraConfig"):
        two.add_adapter(lora(), "other")
    assert set(two.peft.peft_config) == {"default", "second"}


def test_a_wrapped_trunk_is_refused(two, folders, inputs):
    before = logits(two, inputs)
    for again in (
        lambda: PDTForParallelDecoding.from_trunk(two.trunk),
        lambda: PDTForParallelDecoding.from_pretrained(folders[1]["second"], trunk=two.trunk),
        lambda: PDTForParallelDecoding.from_trunk(two),
    ):
        with pytest.raises(ValueError, match="carries PDT adapters already"):
            again()
        assert torch.equal(logits(two, inputs), before)
