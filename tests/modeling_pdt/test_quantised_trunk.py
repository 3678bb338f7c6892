"""Quantised trunks: MXFP4 experts decoded while loading, ternary weights that stay packed, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    QuantoConfig,
)

from modeling_pdt import PDTForParallelDecoding
from tests.modeling_pdt.conftest import llama_trunk
from tests.tiny_training import make_trainer

CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""Value of each 4-bit code (OCP Microscaling Formats 1.0, E2M1)."""

ADAPTER = {"notes_dim": 16, "adapter_bottleneck": 4, "block_size": 4}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with a GPT-OSS checkpoint whose experts are random MXFP4 blocks, and what they stand for by name."""
    folder = tmp_path_factory.mktemp("mxfp4")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        eos_token_id=1,
        pad_token_id=0,
    )
    state, decoded = GptOssForCausalLM(config).state_dict(), {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 32))
        scales = torch.randint(120, 125, (experts, rows, columns // 32))
        # Two codes to a byte, the first one low; a scale is a power of 2 for 32 values.
        state[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        state[f"{name}_scales"] = scales.to(torch.uint8)
        decoded[name] = (CODES[codes] * 2.0 ** (scales[..., None] - 127)).flatten(2).transpose(1, 2)
    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "model.safetensors")
    values = {**config.to_dict(), "architectures": ["GptOssForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    return folder, decoded


def load(folder, **choices):
    """The trunk as training loads it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), **choices
    )


def notes():
    """Two rows of six tokens that read notes."""
    return {
        "input_ids": torch.arange(12).view(2, 6) + 2,
        "stream_ids": torch.tensor([0, 1]),
        "notes": torch.randn(2, 3, 16),
        "notes_mask": torch.ones(2, 3, dtype=torch.bool),
    }


def test_experts_decode_to_their_values(packed):
    folder, decoded = packed
    state = load(folder).state_dict()
    assert len(decoded) == 6
    for name, expected in decoded.items():
        assert torch.equal(state[name], expected), name


def test_gradients_reach_the_adapter_through_a_dequantised_trunk_alone(packed):
    model = PDTForParallelDecoding.from_trunk(load(packed[0]), **ADAPTER)
    inputs = notes()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.pdt_parameters().items() if "pdt_snc" in name}
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(p.grad is None and not p.requires_grad for p in model.trunk.lm_head.parameters())
    experts = model.stack.base_layer.layers[-1].mlp.experts
    assert all(p.grad is None and not p.requires_grad for p in experts.parameters())


def test_a_quantised_checkpoint_decodes_as_a_dequantised_one(packed):
    # Where their kernels are missing, as on the CPU, transformers dequantises by itself.
    model, same = (
        PDTForParallelDecoding.from_trunk(trunk, **ADAPTER).eval()
        for trunk in (AutoModelForCausalLM.from_pretrained(packed[0]), load(packed[0]))
    )
    same.peft.load_state_dict(model.peft.state_dict())
    choices = {"num_streams": 2, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    written, expected = (m.generate(torch.tensor([[5, 6, 7]]), **choices).sequences for m in (model, same))
    assert written.numel() > 3
    assert torch.equal(written, expected)


def test_adapters_come_back_on_the_quantised_checkpoint_and_on_a_dequantised_copy(packed, tmp_path):
    model = PDTForParallelDecoding.from_trunk(load(packed[0]), **ADAPTER).eval()
    inputs = notes()
    with torch.no_grad():
        expected = model(**inputs).logits
        for name, include in (("named", False), ("copied", True)):
            model.save_pretrained(tmp_path / name, include_trunk=include)
            choices = {} if include else {"quantization_config": Mxfp4Config(dequantize=True)}
            again = PDTForParallelDecoding.from_pretrained(tmp_path / name, dtype=torch.float32, **choices)
            assert torch.equal(again(**inputs).logits, expected), name


@pytest.fixture(scope="module")
def ternary(tmp_path_factory):
    """A folder with a PDT model on a Llama trunk of packed ternary weights (BitNet), which stay packed on the CPU."""
    folder = tmp_path_factory.mktemp("ternary")
    with pytest.MonkeyPatch.context() as patch:
        # The layers are compiled where they are defined.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        from transformers.integrations.bitnet import pack_weights
    torch.manual_seed(0)
    trunk = llama_trunk()
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        state[name] = pack_weights(torch.randint(-1, 2, state[name].shape).float())
        state[f"{name}_scale"] = torch.full((1,), 8.0)
    (folder / "trunk").mkdir()
    save_file(state, folder / "trunk" / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    values = {**trunk.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "trunk" / "config.json").write_text(json.dumps(values))
    trunk = AutoModelForCausalLM.from_pretrained(folder / "trunk", dtype=torch.float32)
    PDTForParallelDecoding.from_trunk(trunk, **ADAPTER).save_pretrained(folder / "model")
    return folder


def test_packed_weights_stay_packed_and_decode(ternary):
    model = PDTForParallelDecoding.from_pretrained(ternary / "model", dtype=torch.float32)
    trunk = AutoModelForCausalLM.from_pretrained(ternary / "trunk", dtype=torch.float32)
    inputs = notes()
    with torch.no_grad():
        assert torch.equal(model(inputs["input_ids"]).logits, trunk(inputs["input_ids"]).logits)
        assert not torch.equal(model(**inputs).logits, trunk(inputs["input_ids"]).logits)
    assert model.trunk.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert {parameter.dtype for parameter in model.pdt_parameters().values()} == {torch.float32}
    assert model.generate(torch.tensor([[5, 6, 7]]), num_streams=2, max_new_tokens=6).shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("load_model", [AutoModel, PDTForParallelDecoding])
def test_other_arguments_hold_beside_a_quantised_trunk(ternary, tmp_path, load_model):
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk", "lm_head": "cpu"}
    places |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    remote = {"trust_remote_code": True} if load_model is AutoModel else {}
    choices = {"dtype": torch.bfloat16, "attn_implementation": "eager", **remote}
    model = load_model.from_pretrained(
        ternary / "model", device_map=places, offload_folder=str(tmp_path), offload_buffers=True, **choices
    )
    assert model.trunk.config._attn_implementation == "eager" and model.trunk.is_quantized
    assert model.trunk.model.embed_tokens.weight.dtype == torch.bfloat16
    weights = [layer.mlp.up_proj.weight for layer in model.trunk.model.layers]
    assert [weight.device.type for weight in weights] == ["meta", "cpu", "meta"]
    with torch.no_grad():
        inputs = notes()
        expected = PDTForParallelDecoding.from_pretrained(ternary / "model", **{**choices, "trust_remote_code": None})
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


@pytest.mark.slow
def test_a_choice_of_dequantising_reaches_the_trunk(packed, tmp_path):
    PDTForParallelDecoding.from_trunk(load(packed[0]), **ADAPTER).save_pretrained(tmp_path)
    choices = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32, "device_map": "cpu"}
    for load_model, extra in ((AutoModel, {"trust_remote_code": True}), (PDTForParallelDecoding, {})):
        trunk = load_model.from_pretrained(tmp_path, attn_implementation="eager", **choices, **extra).trunk
        state = {name.replace("base_layer.", ""): tensor for name, tensor in trunk.state_dict().items()}
        for name, expected in packed[1].items():
            assert torch.equal(state[name], expected), name


@pytest.mark.parametrize(
    ("choice", "error", "match"),
    [
        (QuantoConfig(weights="int8"), ImportError, "requires optimum-quanto"),
        ({"quant_method": "quanto", "weights": "int8"}, ImportError, "requires optimum-quanto"),
        (FineGrainedFP8Config(), RuntimeError, "No GPU or XPU found"),
        ({"quant_method": "none"}, ValueError, "Unknown quantization type, got none"),
        ("4bit", ValueError, "quantization_config='4bit', allowed: a configuration such as"),
    ],
)
def test_what_cannot_be_had_here_is_an_error(plain, choice, error, match):
    with pytest.raises(error, match=match):
        PDTForParallelDecoding.from_pretrained(plain, quantization_config=choice)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A PDT model with a trunk that is not quantised."""
    folder = tmp_path_factory.mktemp("plain")
    PDTForParallelDecoding.from_trunk(llama_trunk(), **ADAPTER).save_pretrained(folder, include_trunk=True)
    return folder


def test_a_given_trunk_is_not_quantised_behind_its_back(plain):
    with pytest.raises(ValueError, match=r"\['quantization_config'\] are arguments for loading a trunk"):
        PDTForParallelDecoding.from_pretrained(plain, trunk=llama_trunk(), quantization_config=Mxfp4Config())


def test_quantised_weights_are_neither_saved_with_the_model_nor_trained_through(ternary, tmp_path):
    model = PDTForParallelDecoding.from_pretrained(ternary / "model", is_trainable=True)
    with pytest.raises(ValueError, match=r"include_trunk=True, allowed: with a trunk that is not quantised.*bitnet"):
        model.save_pretrained(tmp_path / "saved", include_trunk=True)
    assert list((tmp_path / "saved").iterdir()) == []
    with pytest.raises(ValueError, match=r"the trunk has no gradient \(BitNetHfQuantizer\)"):
        make_trainer(tmp_path / "run", model=model)


def test_dequantising_what_is_not_quantised_leaves_a_plain_trunk(plain, tmp_path):
    # transformers keeps the quantizer on such a trunk, though no weight is quantised.
    choices = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    model = PDTForParallelDecoding.from_pretrained(plain, is_trainable=True, **choices)
    assert model.trunk.hf_quantizer is not None
    make_trainer(tmp_path / "run", model=model)
    model.save_pretrained(tmp_path / "saved", include_trunk=True)
    again, inputs = PDTForParallelDecoding.from_pretrained(tmp_path / "saved"), notes()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
