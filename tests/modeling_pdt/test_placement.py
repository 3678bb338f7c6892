"""SNC after attention: exact when silent, in its place when not, in training, decoding, files and shards."""

import copy
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from modeling_pdt.cache import RollbackCache
from tests.modeling_pdt import test_generation_exactness as exactness

TRUNKS = ("gpt_oss", "llama", "qwen3")
AFTER = {"snc_placement": "after_attention", "notes_dim": 16}


@pytest.fixture
def make_placed(make_model):
    """`make_model` with SNC after attention."""
    return partial(make_model, snc_placement="after_attention")


@pytest.fixture
def conditioning():
    """Streams and notes for three rows."""
    return {"stream_ids": torch.arange(3), "notes": torch.randn(3, 7, 16)}


@torch.no_grad()
def logits(model, batch, **conditioning) -> torch.Tensor:
    return model(batch.ids, attention_mask=batch.mask, **conditioning).logits


@torch.no_grad()
def trunk_logits(trunk, batch) -> torch.Tensor:
    return trunk(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits


# --- forward ---


@pytest.mark.parametrize("gate_mode", ["scalar", "dynamic"])
def test_silent_notes_leave_the_trunk_bit_for_bit(trunk, make_batch, conditioning, randomize, gate_mode):
    batch, notes = make_batch(), {"notes": conditioning["notes"]}
    expected = trunk_logits(trunk, batch)
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, **AFTER, gate_mode=gate_mode).eval())
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    for silent in (
        {},
        {**notes, "notes_mask": nothing},
        {**notes, "notes_mask": nothing[:, None].expand(3, 20, 7)},
        {**notes, "gate_scale": 0.0},
        {**notes, "stream_ids": torch.full((3,), -1)},
        {"notes": notes["notes"][:, :0]},
    ):
        assert torch.equal(logits(model, batch, **silent), expected)
    assert not torch.equal(logits(model, batch, **notes), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch, **conditioning), expected)
    assert torch.equal(trunk_logits(model.peft.unload(), batch), expected)


def test_one_site_per_instrumented_layer(make_trunk):
    layers = {"instrumented_layers": [0, 2]}
    between = PDTForParallelDecoding.from_trunk(make_trunk("llama"), **layers)
    after = PDTForParallelDecoding.from_trunk(make_trunk("llama"), **AFTER, **layers)
    assert (between.config.snc_placement, len(between.stack.snc)) == ("between", 3)
    assert (after.config.snc_placement, len(after.stack.snc)) == ("after_attention", 2)


@pytest.mark.parametrize("name", TRUNKS)
def test_notes_are_added_to_the_residual_stream_after_attention(make_trunk, make_batch, randomize, conditioning, name):
    # The same update through hooks on a trunk of its own: what SNC adds joins what attention adds.
    trunk, batch, notes = make_trunk(name), make_batch(), conditioning["notes"]
    model = randomize(PDTForParallelDecoding.from_trunk(copy.deepcopy(trunk), **AFTER).eval())
    states = model.project_notes(notes, torch.ones(3, 7))
    residuals = {}
    for site, index in enumerate(model.config.instrumented_layers):
        layer, snc = trunk.model.layers[index], model.stack.snc[site]

        def keep(module, inputs, index=index):
            residuals[index] = inputs[0]

        def add(module, inputs, output, index=index, site=site, snc=snc):
            stream = residuals[index] + output[0]
            return output[0] + snc(stream, states, site) - stream, *output[1:]

        layer.input_layernorm.register_forward_pre_hook(keep)
        layer.self_attn.register_forward_hook(add)
    expected = trunk_logits(trunk, batch)
    torch.testing.assert_close(logits(model, batch, notes=notes), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_the_first_instrumented_attention_reads_no_notes_and_the_second_does(make_placed, make_batch, name):
    model, batch = make_placed(name, trained=True), make_batch(padding=0)
    first, second = model.config.instrumented_layers[:2]

    def keys(**conditioning):
        cache = RollbackCache(model.trunk.config, margin=40)
        model(batch.ids, past_key_values=cache, **conditioning)
        return [layer._keys[:, :, layer.start : layer.end] for layer in cache.layers]

    silent, read = keys(), keys(notes=torch.randn(3, 7, 16))
    assert torch.equal(silent[first], read[first]) and not torch.allclose(silent[second], read[second])


def test_conditioning_starts_where_the_stream_starts(make_placed, make_batch, conditioning):
    model, batch = make_placed(trained=True), make_batch(padding=0)
    streams = torch.full((3, 20), -1)
    streams[:, 12:] = torch.arange(3)[:, None]
    base, read = logits(model, batch), logits(model, batch, stream_ids=streams, notes=conditioning["notes"])
    assert torch.equal(read[:, :12], base[:, :12])
    assert (read - base)[:, 12:].abs().amax(dim=(1, 2)).min() > 1e-3


def test_bf16_trunk(make_trunk, make_batch, conditioning, randomize):
    trunk, batch = make_trunk().to(torch.bfloat16), make_batch()
    expected = trunk_logits(trunk, batch)
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, **AFTER).eval())
    assert torch.equal(logits(model, batch, notes=conditioning["notes"], gate_scale=0.0), expected)
    read = logits(model, batch, **conditioning)
    assert read.dtype == torch.bfloat16 and read.isfinite().all() and not torch.equal(read, expected)


def test_two_adapters_of_two_placements(make_trunk, make_batch, conditioning, randomize):
    model, batch = randomize(PDTForParallelDecoding.from_trunk(make_trunk("llama"), **AFTER).eval()), make_batch()
    after = logits(model, batch, **conditioning)
    model.peft.add_adapter("second", PDTAdapterConfig(notes_dim=16))
    model.peft.set_adapter("second")
    randomize(model)
    assert len(model.stack.snc) == 3 and not torch.equal(logits(model, batch, **conditioning), after)
    model.peft.set_adapter("default")
    assert len(model.stack.snc) == 2 and torch.equal(logits(model, batch, **conditioning), after)


def test_copies_after_a_forward(make_placed, make_batch, conditioning):
    model, batch = make_placed(trained=True), make_batch()
    expected = logits(model, batch, **conditioning)
    assert not any("forward" in vars(layer) for layer in model.stack.layers)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch, **conditioning), expected)


def test_a_failing_forward_leaves_the_layers_as_they_were(make_placed, make_batch, conditioning):
    model, batch = make_placed("llama"), make_batch()
    layer = model.stack.layers[-1]
    layer.forward = own = layer.forward
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch, **conditioning)
    handle.remove()
    assert layer.forward is own and "forward" not in vars(model.stack.layers[-2])


def test_checkpointed_layers_leave_the_cache_alone_like_the_trunks(make_placed, make_batch, conditioning):
    model, batch = make_placed("llama", trained=True).train(), make_batch(padding=0)
    model.gradient_checkpointing_enable()
    cache = RollbackCache(model.trunk.config, margin=4)
    model(batch.ids, past_key_values=cache, **conditioning).logits.sum().backward()
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]


# --- decoding ---


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("headers", [exactness.HEADERS, [[], [14], []]])
def test_decoding_is_one_training_forward(make_placed, name, headers):
    exactness.test_decoding_is_one_training_forward(make_placed, name, headers, plan_on_bus=True)


@pytest.mark.parametrize("name", TRUNKS)
def test_rolled_back_rows_continue_as_fresh_ones(make_placed, name):
    exactness.test_rolled_back_rows_continue_as_fresh_ones(make_placed, name, exactness.HEADERS)


@pytest.mark.parametrize("name", TRUNKS)
def test_batch_of_prompts_is_the_prompts_one_by_one(make_placed, name):
    exactness.test_batch_of_prompts_is_the_prompts_one_by_one(make_placed, name, 3)


def test_one_silent_stream_generates_as_the_trunk(trunk, make_batch):
    ids, length = make_batch(padding=0).ids, {"max_new_tokens": 23, "do_sample": False, "pad_token_id": 0}
    expected = trunk.generate(input_ids=ids, eos_token_id=1, **length)[:, ids.shape[1] :]
    model = PDTForParallelDecoding.from_trunk(trunk, block_size=4, **AFTER).eval()
    silent = {"num_streams": 1, "gate_scale": 0.0, "plan": None, "return_dict_in_generate": True}
    for row, streams in enumerate(model.generate(ids, eos_token_id=1, **silent, **length).streams):
        tokens = streams[0].token_ids
        assert tokens == expected[row, : len(tokens)].tolist() and (len(tokens) == 23 or tokens[-1] == 1)


# --- files ---


def test_saved_and_loaded_and_seen_through_peft(make_placed, make_trunk, make_batch, conditioning, tmp_path):
    model, batch = make_placed("gpt_oss", trained=True), make_batch()
    expected = logits(model, batch, **conditioning)
    model.save_pretrained(tmp_path, include_trunk=True)
    again = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert again.config.snc_placement == "after_attention"
    assert torch.equal(logits(again, batch, **conditioning), expected)
    trunk = make_trunk()
    trunk.load_state_dict(load_file(tmp_path / "trunk" / "model.safetensors"))
    peft = PeftModel.from_pretrained(trunk, str(tmp_path), subfolder="adapter").eval()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    with torch.no_grad():
        assert torch.equal(peft(**inputs, **conditioning).logits, expected)


@pytest.mark.parametrize(("saved", "read"), [("between", "after_attention"), ("after_attention", "between")])
def test_another_placement_is_an_error(make_model, tmp_path, saved, read):
    make_model("llama", snc_placement=saved).save_pretrained(tmp_path, include_trunk=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"snc_placement": "{saved}"', f'"snc_placement": "{read}"'))
    with pytest.raises(ValueError, match=r"does not fit this model: (missing|unexpected) .*pdt_snc"):
        PDTForParallelDecoding.from_pretrained(tmp_path)


def test_offloaded_trunk_computes_the_same(make_placed, make_batch, conditioning, tmp_path):
    model, batch = make_placed("llama", trained=True), make_batch()
    model.save_pretrained(tmp_path / "saved", include_trunk=True)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    parts |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = PDTForParallelDecoding.from_pretrained(
        tmp_path / "saved", device_map=parts, offload_folder=str(tmp_path / "offload")
    )
    assert any(p.is_meta for p in again.trunk.parameters())
    assert torch.equal(logits(again, batch, **conditioning), logits(model, batch, **conditioning))


# --- shards ---


SHARDED = """
    import copy
    import sys
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM
    from modeling_pdt import PDTForParallelDecoding

    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)
    model = PDTForParallelDecoding.from_trunk(LlamaForCausalLM(config), snc_placement="after_attention")
    whole = copy.deepcopy(model)
    for layer in model.stack.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = {"input_ids": torch.randint(97, (3, 10)), "notes": torch.randn(3, 4, 32), "stream_ids": torch.arange(3)}
    whole(**inputs).logits.square().mean().backward()
    for checkpointed in (False, True):
        if checkpointed:
            model.train().gradient_checkpointing_enable()
        model.zero_grad()
        logits = model(**inputs).logits
        assert all(isinstance(layer, FSDPModule) for layer in model.stack.layers)
        assert torch.equal(logits, whole(**inputs).logits)
        logits.square().mean().backward()
        for (name, one), other in zip(whole.pdt_parameters().items(), model.pdt_parameters().values(), strict=True):
            torch.testing.assert_close(other.grad.full_tensor(), one.grad, atol=1e-6, rtol=1e-5, msg=name)
    dist.destroy_process_group()
    print("equal")
"""


@pytest.mark.slow
def test_layers_as_units_of_fsdp(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr


# --- refusals ---


SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
REFUSED = {
    "dropout": (lambda: Phi3ForCausalLM(Phi3Config(**SMALL)), "resid_mlp_dropout"),
    "norms_after": (lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL)), "post_feedforward_layernorm"),
    "scaled": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.2)), "residual_multiplier"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_layers_without_the_parts_are_refused(name):
    build, reason = REFUSED[name]
    trunk = build()
    modules = [(key, type(module)) for key, module in trunk.named_modules()]
    with pytest.raises(ValueError, match="snc_placement='after_attention' needs layers") as error:
        PDTForParallelDecoding.from_trunk(trunk, snc_placement="after_attention")
    assert reason in str(error.value) and "snc_placement='between'" in str(error.value)
    assert [(key, type(module)) for key, module in trunk.named_modules()] == modules
    assert PDTForParallelDecoding.from_trunk(trunk).config.snc_placement == "between"
