"""Configurations: defaults, resolution against a trunk, ranges, owners, round trips."""

import copy
import json
import pickle
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig

from modeling_pdt import PDTAdapterConfig, PDTConfig, PDTForParallelDecoding, PDTGenerationConfig
from modeling_pdt.adapter_files import read_adapter_config


def test_adapter_defaults():
    config = PDTAdapterConfig()
    assert config.peft_type == "PDT"
    assert (config.num_streams, config.notes_per_block, config.adapter_bottleneck) == (3, 4, 32)
    assert (config.num_plan_slots, config.plan_vocab_size, config.plan_dim) == (8, 512, 64)
    assert (config.snc_placement, config.snc_init) == ("between", "trunk_space")
    assert (config.gate_mode, config.gate_init) == ("scalar", 0.0)
    assert config.notes_dim is None and config.instrumented_layers is None and config.trained_parts == []


def test_every_own_field_is_documented():
    own = set(PDTAdapterConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    missing = [
        name for name in sorted(own) if not re.search(rf"^ +(\w+, )?{name}[ ,]", PDTAdapterConfig.__doc__, re.M)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0]), (2, [0, 1]), (3, [1, 2]), (4, [2, 3]), (6, [4, 5]), (7, [4, 5, 6]), (24, list(range(16, 24)))],
)
def test_default_layers_are_the_top_third_at_least_two(layers, expected):
    config = PDTAdapterConfig()
    config.resolve(hidden_size=32, num_layers=layers, num_heads=4)
    assert config.instrumented_layers == expected


@pytest.mark.parametrize(("given", "expected"), [(3, [1, 2, 3]), ([3, 1], [1, 3]), ([0], [0])])
def test_layers_by_count_or_index(given, expected):
    config = PDTAdapterConfig(instrumented_layers=given)
    config.resolve(32, 4, 4)
    assert config.instrumented_layers == expected


def test_resolve_fills_in_and_is_idempotent():
    config = PDTAdapterConfig()
    config.resolve(32, 4, 4)
    first = config.to_dict()
    assert (config.notes_dim, config.snc_heads) == (32, 4)
    assert (config.trunk_hidden_size, config.trunk_num_layers) == (32, 4)
    config.resolve(32, 4, 4)
    assert config.to_dict() == first


@pytest.mark.parametrize(("width", "heads", "expected"), [(2880, 64, 64), (30, 3, 2), (33, 4, 1), (48, 6, 4)])
def test_default_heads_are_a_power_of_two_that_divides_the_width(width, heads, expected):
    config = PDTAdapterConfig()
    config.resolve(width, 4, heads)
    assert config.snc_heads == expected


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_streams", 0, ">= 1"),
        ("num_streams", 2.5, ">= 1"),
        ("num_streams", True, ">= 1"),
        ("notes_per_block", 0, ">= 1"),
        ("notes_dim", 0, ">= 1"),
        ("notes_dim", "wide", ">= 1"),
        ("snc_heads", 0, ">= 1"),
        ("adapter_bottleneck", -1, ">= 1"),
        ("adapter_activation", "swish", "gelu_pytorch_tanh"),
        ("adapter_dropout", 1.0, "[0, 1)"),
        ("num_plan_slots", 0, ">= 1"),
        ("plan_dim", 0, ">= 1"),
        ("plan_vocab_size", 1, ">= 2"),
        ("snc_init", "random", "trunk_space"),
        ("snc_placement", "after_block", "after_attention"),
        ("gate_mode", "hard", "per_head"),
        ("gate_init", 21, "[-20, 20]"),
        ("gate_init", float("nan"), "[-20, 20]"),
        ("gate_init", "open", "a number"),
        ("trained_parts", ["trunk"], "stream_adapters"),
        ("instrumented_layers", 0, ">= 1"),
        ("instrumented_layers", [], "count >= 1"),
        ("instrumented_layers", [1, 1], "distinct"),
        ("instrumented_layers", [1, -1], ">= 0"),
        ("instrumented_layers", [1, "2"], "integer >= 0"),
        ("instrumented_layers", True, "count >= 1"),
    ],
)
def test_adapter_range_errors_name_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError) as error:
        PDTAdapterConfig(**{field: value})
    shown = repr(value[0]) if field == "trained_parts" else repr(value)
    if value in ([1, -1], [1, "2"]):
        shown = repr(value[1])
    assert field in str(error.value) and shown in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"notes_dim": 33}, ("notes_dim", "33", "[1, 32]")),
        ({"snc_heads": 5}, ("snc_heads", "5", "32")),
        ({"instrumented_layers": 5}, ("instrumented_layers", "5", "[1, 4]")),
        ({"instrumented_layers": [2, 4]}, ("instrumented_layers", "4", "[0, 3]")),
        ({"trunk_hidden_size": 64}, ("trunk_hidden_size", "64", "32")),
        ({"trunk_num_layers": 3}, ("trunk_num_layers", "3", "4")),
    ],
)
def test_resolve_errors_name_field_value_and_range(fields, words):
    with pytest.raises(ValueError) as error:
        PDTAdapterConfig(**fields).resolve(32, 4, 4)
    assert all(word in str(error.value) for word in words)


def test_adapter_unknown_key_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="note_dim"):
        PDTAdapterConfig(note_dim=4)
    folder = tmp_path / "adapter"
    PDTAdapterConfig(notes_dim=4).save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "note_dim": 4}))
    with pytest.raises(ValueError, match="note_dim"):
        read_adapter_config(str(tmp_path), "adapter", {})
    (folder / "adapter_config.json").write_text(json.dumps({**values, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="LORA"):
        read_adapter_config(str(tmp_path), "adapter", {})


def test_adapter_round_trip(tmp_path):
    choices = {"gate_mode": "per_head", "snc_placement": "after_attention", "trained_parts": ["snc"]}
    config = PDTAdapterConfig(notes_dim=8, instrumented_layers=[2, 3], **choices)
    config.resolve(32, 4, 4)
    config.save_pretrained(tmp_path / "adapter")
    again = read_adapter_config(str(tmp_path), "adapter", {})
    assert again.to_dict() == config.to_dict()


def test_model_defaults():
    config = PDTConfig()
    assert (config.block_size, config.bus_lag, config.bus_capacity, config.commit_horizon) == (12, 1, 16, 12)
    assert config.adapter_subfolder == "adapter"
    assert PDTConfig(block_size=5).commit_horizon == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_size": 0}, ("block_size", "0", ">= 1")),
        ({"bus_lag": 0}, ("bus_lag", "0", ">= 1")),
        ({"bus_capacity": 0}, ("bus_capacity", "0", ">= 1")),
        ({"block_size": 8, "commit_horizon": 7}, ("commit_horizon", "7", ">= 8")),
        ({"num_streams": 3}, ("num_streams", "block_size")),
        ({"blok_size": 3}, ("blok_size", "block_size")),
    ],
)
def test_model_range_errors_name_field_value_and_range(fields, words):
    with pytest.raises(ValueError) as error:
        PDTConfig(**fields)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("value", ["4", 4.0, True, None])
def test_model_types_are_checked(value):
    with pytest.raises(StrictDataclassError, match="block_size"):
        PDTConfig(block_size=value)


def test_value_set_later_is_checked_when_a_model_is_built(make_trunk, tmp_path):
    # `AutoModel.from_pretrained(folder, block_size=0)` sets the field on a ready configuration.
    model = PDTForParallelDecoding.from_trunk(make_trunk("llama"), notes_dim=8)
    model.save_pretrained(tmp_path, include_trunk=True)
    with pytest.raises(ValueError, match=r"block_size must be >= 1, got 0"):
        PDTForParallelDecoding.from_pretrained(tmp_path, block_size=0)
    with pytest.raises(ValueError, match=r"commit_horizon must be >= 24, got 12"):
        PDTForParallelDecoding.from_pretrained(tmp_path, block_size=24)
    loaded = PDTForParallelDecoding.from_pretrained(tmp_path, block_size=24, commit_horizon=24)
    assert (loaded.config.block_size, loaded.config.commit_horizon) == (24, 24)


def test_model_config_reads_adapter_fields_and_cannot_set_them(model):
    config = model.config
    assert (config.num_streams, config.notes_dim, config.notes_per_block) == (3, 16, 4)
    assert config.instrumented_layers == [2, 3]
    with pytest.raises(ValueError, match="num_streams"):
        config.num_streams = 5
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field
    assert "num_streams" not in config.to_dict()
    assert "_adapter_config" not in config.to_dict()
    assert "notes_dim" not in config.to_json_string()


def test_model_round_trip(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    again = PDTConfig.from_pretrained(tmp_path)
    for name in PDTConfig.own_fields():
        # JSON turns integer keys (id2label) into strings.
        expected = json.loads(json.dumps(getattr(model.config, name), default=str))
        assert json.loads(json.dumps(getattr(again, name), default=str)) == expected, name
    for copied in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert copied.to_dict() == model.config.to_dict()
        assert copied.num_streams == 3


def test_what_trainer_sets_on_a_configuration_is_not_saved(tmp_path):
    config = PDTConfig()
    for name in ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, 0)
    config.save_pretrained(tmp_path)
    assert PDTConfig.from_pretrained(tmp_path).block_size == config.block_size and config.use_cache == 0
    assert not {"use_cache", "eos_token_id"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_model_unknown_key_in_file_is_an_error(tmp_path):
    PDTConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "blok_size": 3}))
    with pytest.raises(ValueError, match="blok_size"):
        PDTConfig.from_pretrained(tmp_path)


def test_generation_defaults():
    config = PDTGenerationConfig()
    assert (config.max_retries, config.retry_policy, config.gate_scale) == (1, "refresh", 1.0)
    for name in ("num_streams", "plan", "block_size", "bus_lag", "bus_capacity", "agreement_threshold"):
        assert getattr(config, name) is None, name


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_streams", 0, ">= 1"),
        ("num_streams", 2.5, "integer"),
        ("block_size", 0, ">= 1"),
        ("block_size", 4.0, "integer"),
        ("bus_lag", 0, ">= 1"),
        ("bus_capacity", 0, ">= 1"),
        ("max_retries", -1, ">= 0"),
        ("max_retries", None, "integer"),
        ("max_retries", 0.5, "integer"),
        ("retry_policy", "again", "refresh"),
        ("plan", "outline", "planner"),
        ("agreement_threshold", 1.5, "[0, 1]"),
        ("agreement_scaling", 0.5, "[slope, intercept]"),
        ("agreement_scaling", [0.5], "[slope, intercept]"),
        ("gate_scale", -0.1, "[0, 10]"),
        ("gate_scale", float("nan"), "[0, 10]"),
        ("coverage_threshold", 2, "[0, 1]"),
        ("outline_max_new_tokens", 0, ">= 1"),
    ],
)
def test_generation_range_errors_name_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError) as error:
        PDTGenerationConfig(**{field: value})
    assert all(word in str(error.value) for word in (field, repr(value), allowed))


def test_generation_scaling_keeps_the_order_of_agreements():
    for scaling, words in (([0, 1], r"agreement_scaling\[0\] must be in"), ([1, "x"], r"agreement_scaling\[1\]")):
        with pytest.raises(ValueError, match=words):
            PDTGenerationConfig(agreement_scaling=scaling)


def test_generation_unknown_key_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="num_stream"):
        PDTGenerationConfig(num_stream=3)
    PDTGenerationConfig().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "blok_size": 3}))
    with pytest.raises(ValueError, match="blok_size"):
        PDTGenerationConfig.from_pretrained(tmp_path)


def test_generation_round_trip(tmp_path):
    values = {
        "num_streams": 4,
        "plan": "planner",
        "block_size": 7,
        "bus_lag": 2,
        "bus_capacity": 3,
        "max_retries": 0,
        "retry_policy": "stale",
        "agreement_threshold": 0.25,
        "agreement_scaling": [0.5, -1.0],
        "gate_scale": 0.0,
        "coverage_threshold": 0.75,
        "outline_max_new_tokens": 9,
        "temperature": 0.5,
        "do_sample": True,
        "eos_token_id": [1, 2],
    }
    config = PDTGenerationConfig(**values)
    config.save_pretrained(tmp_path)
    again = PDTGenerationConfig.from_pretrained(tmp_path)
    for name, value in values.items():
        assert getattr(again, name) == value, name
    assert copy.deepcopy(again).to_dict() == again.to_dict()
    PDTGenerationConfig().save_pretrained(tmp_path / "defaults")
    again = PDTGenerationConfig.from_pretrained(tmp_path / "defaults")
    assert again.num_streams is None and again.max_retries == 1


def test_overrides_of_from_trunk_go_to_their_owner(make_trunk):
    model = PDTForParallelDecoding.from_trunk(
        make_trunk(), PDTAdapterConfig(notes_dim=8), num_streams=2, block_size=6, max_retries=3, temperature=0.5
    )
    assert model.peft.active_peft_config.num_streams == 2 and model.peft.active_peft_config.notes_dim == 8
    assert (model.config.block_size, model.config.commit_horizon) == (6, 6)
    assert (model.generation_config.max_retries, model.generation_config.temperature) == (3, 0.5)
    assert model.config.trunk_config["model_type"] == "gpt_oss"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"note_dim": 8}, ("note_dim",)),
        ({"num_streams": 0}, ("num_streams", "0", ">= 1")),
        ({"block_size": 0}, ("block_size", "0", ">= 1")),
        ({"max_retries": -1}, ("max_retries", "-1", ">= 0")),
    ],
)
def test_impossible_overrides_leave_the_trunk_alone(make_trunk, override, words):
    trunk = make_trunk("llama")
    before = [(name, type(module)) for name, module in trunk.named_modules()]
    with pytest.raises(ValueError) as error:
        PDTForParallelDecoding.from_trunk(trunk, **override)
    assert all(word in str(error.value) for word in words)
    assert [(name, type(module)) for name, module in trunk.named_modules()] == before
    assert all(parameter.requires_grad for parameter in trunk.parameters())
