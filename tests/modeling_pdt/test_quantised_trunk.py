"""A frozen MXFP4 trunk: what its packed experts decode to, training on top of it, decoding, and saving."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

from modeling_pdt import PDTForParallelDecoding

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
