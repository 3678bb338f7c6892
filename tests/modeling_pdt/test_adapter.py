"""PEFT method PDT: identity with the trunk, several adapters, refusals, loading, registration."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from modeling_pdt.adapter_layer import PDTStack, parameter_path_components

NOTES_DIM = 16


@pytest.fixture
def conditioning():
    """Streams and notes for three rows."""
    return {"stream_ids": torch.arange(3), "notes": torch.randn(3, 7, NOTES_DIM)}


def composite(trunk, **overrides) -> PDTForParallelDecoding:
    return PDTForParallelDecoding.from_trunk(trunk, notes_dim=NOTES_DIM, **overrides).eval()


@torch.no_grad()
def trunk_logits(trunk, batch) -> torch.Tensor:
    return trunk(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits


@torch.no_grad()
def logits(model, batch, **conditioning) -> torch.Tensor:
    return model(batch.ids, attention_mask=batch.mask, **conditioning).logits


@torch.no_grad()
def view_logits(peft, batch, **conditioning) -> torch.Tensor:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    return peft(**inputs, **conditioning).logits


# --- invariant 1: the trunk, bit for bit ---


def test_untrained_model_without_notes_is_its_trunk(trunk, make_batch, conditioning):
    batch = make_batch()
    expected = trunk_logits(trunk, batch)
    model = composite(trunk)
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model, batch, stream_ids=conditioning["stream_ids"]), expected)
    assert torch.equal(logits(model, batch, **conditioning, notes_mask=nothing), expected)
    assert torch.equal(logits(model, batch, **conditioning, notes_mask=nothing[:, None].expand(3, 20, 7)), expected)
    assert torch.equal(logits(model, batch, **conditioning, gate_scale=0.0), expected)
    assert torch.equal(logits(model, batch, **conditioning, gate_scale=torch.zeros(3)), expected)
    empty = torch.zeros(3, 0, NOTES_DIM)
    assert torch.equal(logits(model, batch, stream_ids=conditioning["stream_ids"], notes=empty), expected)


@pytest.mark.parametrize("gate_mode", ["scalar", "per_head", "dynamic"])
def test_trained_snc_without_visible_notes_is_the_trunk(trunk, make_batch, conditioning, randomize, gate_mode):
    batch = make_batch()
    expected = trunk_logits(trunk, batch)
    model = randomize(composite(trunk, gate_mode=gate_mode))
    notes = {"notes": conditioning["notes"]}
    assert torch.equal(logits(model, batch, **notes, notes_mask=torch.zeros(3, 7)), expected)
    assert torch.equal(logits(model, batch, **notes, gate_scale=0.0), expected)
    unconditioned = {**conditioning, "stream_ids": torch.full((3,), -1)}
    assert torch.equal(logits(model, batch, **unconditioned), expected)
    assert not torch.equal(logits(model, batch, **notes), expected)


def test_disabled_adapter_is_the_trunk(trunk, make_batch, conditioning, randomize):
    batch = make_batch()
    expected = trunk_logits(trunk, batch)
    model = randomize(composite(trunk))
    before = logits(model, batch, **conditioning)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch, **conditioning), expected)
        assert torch.equal(view_logits(model.peft, batch, **conditioning), expected)
        assert torch.equal(view_logits(model.peft, batch), expected)
    assert torch.equal(logits(model, batch, **conditioning), before)
    assert torch.equal(view_logits(model.peft, batch), expected)


def test_gate_scale_by_row(model, make_batch, conditioning):
    batch = make_batch()
    on, off = logits(model, batch, **conditioning), logits(model, batch, **conditioning, gate_scale=0.0)
    mixed = logits(model, batch, **conditioning, gate_scale=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(mixed[[0, 2]], on[[0, 2]])
    torch.testing.assert_close(mixed[1], off[1])


# --- conditioning does something ---


def test_notes_and_streams_change_logits(trunk, make_batch, conditioning, randomize):
    batch = make_batch()
    model = composite(trunk)
    base = trunk_logits(trunk, batch)
    read = logits(model, batch, **conditioning)
    assert (read - base)[:, -1].abs().max() > 1e-3
    other = {**conditioning, "notes": conditioning["notes"].flip(1) * 0.5}
    assert (logits(model, batch, **other) - read)[:, -1].abs().max() > 1e-3
    shuffled = {**conditioning, "notes": conditioning["notes"].flip(1)}
    torch.testing.assert_close(logits(model, batch, **shuffled), read, atol=1e-5, rtol=1e-5)
    randomize(model)
    zero = logits(model, batch, stream_ids=torch.zeros(3, dtype=torch.long))
    assert (logits(model, batch, stream_ids=torch.ones(3, dtype=torch.long)) - zero)[:, -1].abs().max() > 1e-3


def test_conditioning_starts_where_the_stream_starts(model, make_batch, conditioning):
    batch = make_batch(padding=0)
    streams = torch.full((3, 20), -1)
    streams[:, 12:] = torch.arange(3)[:, None]
    base = logits(model, batch)
    read = logits(model, batch, stream_ids=streams, notes=conditioning["notes"])
    torch.testing.assert_close(read[:, :12], base[:, :12], atol=1e-6, rtol=0)
    assert (read - base)[:, 12:].abs().amax(dim=(1, 2)).min() > 1e-3


def test_peft_view_equals_composite(trunk, make_batch, conditioning, randomize):
    batch = make_batch()
    model = randomize(composite(trunk))
    mask = torch.rand(3, 7) < 0.5
    streams = torch.arange(3)[:, None].repeat(1, 20)
    streams[:, :9] = -1
    for given in (
        conditioning,
        {**conditioning, "notes_mask": mask},
        {**conditioning, "stream_ids": streams, "notes_mask": mask[:, None].expand(3, 20, 7)},
        {"stream_ids": streams},
        {"notes": conditioning["notes"]},
    ):
        assert torch.equal(view_logits(model.peft, batch, **given), logits(model, batch, **given))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"notes": torch.zeros(3, 7, 15)}, ("notes_dim=16", "[3, 7, 15]")),
        ({"notes": torch.zeros(7, 16)}, ("notes_dim=16", "[7, 16]")),
        ({"notes": torch.zeros(3, 7, 16), "notes_mask": torch.ones(3, 6)}, ("window=7", "6]")),
        ({"notes": torch.zeros(2, 7, 16), "notes_mask": torch.ones(3, 7)}, ("rows", "[3,")),
    ],
)
def test_misshapen_notes_are_refused(model, make_batch, fields, words):
    with pytest.raises(ValueError) as error:
        logits(model, make_batch(), **fields)
    assert all(word in str(error.value) for word in words)


def test_notes_twice_are_refused(model, make_batch, conditioning):
    states = model.project_notes(conditioning["notes"], torch.ones(3, 7))
    with pytest.raises(ValueError, match="at most one of notes, note_states and rollout"):
        logits(model, make_batch(), **conditioning, note_states=states)


@torch.no_grad()
def test_plan_slots_stand_before_the_window(trunk, make_batch, conditioning, randomize):
    batch, model = make_batch(), randomize(composite(trunk))
    slots = torch.tensor([[3, 0, 7], [0, 0, 0], [5, 1, 0]])
    mask = torch.arange(7) < torch.tensor([7, 7, 3])[:, None]
    by_hand = {
        "notes": torch.cat([model.stack.heads.embed_slots(slots), conditioning["notes"]], dim=1),
        "notes_mask": torch.cat([slots != 0, mask], dim=1),
    }
    expected = logits(model, batch, **{**conditioning, **by_hand})
    assert torch.equal(logits(model, batch, **conditioning, notes_mask=mask, plan_slots=slots), expected)
    per_token = mask[:, None].expand(3, 20, 7)
    torch.testing.assert_close(logits(model, batch, **conditioning, notes_mask=per_token, plan_slots=slots), expected)
    streams = {"stream_ids": conditioning["stream_ids"]}
    silent = logits(model, batch, **streams)
    assert torch.equal(logits(model, batch, **streams, plan_slots=slots, plan_mask=torch.zeros(3, 3)), silent)
    shown = logits(model, batch, **streams, plan_slots=slots)
    assert (shown - silent).abs().amax(dim=(1, 2)).gt(0).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"plan_slots": torch.tensor([[1, 512]] * 3)}, ("plan_slots", "[0, 511]", "1..512")),
        ({"plan_mask": torch.ones(3, 2)}, ("plan_mask goes with plan_slots",)),
        ({"notes_mask": torch.ones(3, 2)}, ("notes_mask goes with notes",)),
    ],
)
def test_impossible_plan_slots_are_refused(trunk, make_batch, fields, words):
    with pytest.raises(ValueError) as error:
        logits(composite(trunk), make_batch(), **fields)
    assert all(word in str(error.value) for word in words)


# --- life of the object ---


def test_trunk_is_frozen_and_pdt_parameters_train(trunk):
    model = composite(trunk)
    trainable = {name for name, p in model.peft.named_parameters() if p.requires_grad}
    assert trainable == set(model.pdt_parameters())
    assert all("pdt_" in name and p.dim() >= 1 for name, p in model.pdt_parameters().items())
    assert all(p.dtype == torch.float32 for p in model.pdt_parameters().values())


def test_deepcopy_is_equal_and_independent(model, make_batch, conditioning, randomize):
    batch = make_batch()
    before = logits(model, batch, **conditioning)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, batch, **conditioning), before)
    randomize(other)
    assert not torch.equal(logits(other, batch, **conditioning), before)
    assert torch.equal(logits(model, batch, **conditioning), before)
    with other.disable_adapter():
        assert torch.equal(logits(model, batch, **conditioning), before)


def test_pickle_and_state_dict(model, make_model, make_batch, conditioning, tmp_path):
    batch = make_batch()
    before = logits(model, batch, **conditioning)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch, **conditioning), before)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again, batch, **conditioning), before)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = make_model()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(fresh, batch, **conditioning), before)


def test_second_adapter(trunk, make_batch, conditioning, randomize):
    batch = make_batch()
    model = randomize(composite(trunk))
    base, first = logits(model, batch), logits(model, batch, **conditioning)
    saved = get_peft_model_state_dict(model.peft, adapter_name="default")
    model.peft.add_adapter("second", PDTAdapterConfig(notes_dim=8, instrumented_layers=1, num_streams=4))
    assert torch.equal(logits(model, batch, **conditioning), first)
    state = get_peft_model_state_dict(model.peft, adapter_name="default")
    assert set(state) == set(saved) and all(torch.equal(state[name], saved[name]) for name in saved)

    model.peft.set_adapter("second")
    assert model.stack.active == "second" and all(".second." in name for name in model.pdt_parameters())
    assert {n for n, p in model.peft.named_parameters() if p.requires_grad} == set(model.pdt_parameters())
    narrow = {"stream_ids": torch.tensor([0, 1, 3]), "notes": conditioning["notes"][..., :8]}
    randomize(model)
    assert not torch.equal(logits(model, batch, **narrow), base)

    model.peft.set_adapter("default")
    assert torch.equal(logits(model, batch, **conditioning), first)
    model.peft.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active"):
        model.peft.delete_adapter("second")
    assert model.stack.active == "default" and set(model.peft.peft_config) == {"default"}
    assert not any("second" in name for name, _ in model.peft.named_parameters())
    assert torch.equal(logits(model, batch, **conditioning), first)


def test_second_adapter_for_inference_leaves_the_first_trainable(trunk, tmp_path):
    model = composite(trunk)
    model.save_pretrained(tmp_path)
    model.peft.load_adapter(str(tmp_path), "second", subfolder="adapter", is_trainable=False)
    assert {n for n, p in model.peft.named_parameters() if p.requires_grad} == set(model.pdt_parameters())


def test_second_adapter_leaves_a_frozen_first_frozen(make_trunk, tmp_path):
    composite(make_trunk("llama")).save_pretrained(tmp_path)
    model = PDTForParallelDecoding.from_pretrained(tmp_path, trunk=make_trunk("llama"))
    assert not any(p.requires_grad for p in model.parameters())
    model.peft.load_adapter(str(tmp_path), "second", subfolder="adapter", is_trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["0", "7", "layers", "agreement", "gate", "bias", "weight", "writer", "lm_head", "model", "pdt", "a.b", "sink"],
)
def test_adapter_names_that_lose_tensors_are_refused(make_trunk, name):
    trunk = make_trunk()
    modules = [(key, type(module)) for key, module in trunk.named_modules()]
    with pytest.raises(ValueError, match="adapter_name"):
        PDTForParallelDecoding.from_trunk(trunk, adapter_name=name)
    assert [(key, type(module)) for key, module in trunk.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in trunk.parameters())

    model = composite(trunk)
    parameters = [key for key, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="adapter_name"):
        model.peft.add_adapter(name, PDTAdapterConfig())
    assert set(model.peft.peft_config) == {"default"}
    assert [key for key, _ in model.named_parameters()] == parameters
    model.peft.add_adapter("fine", PDTAdapterConfig())


def test_refused_configuration_leaves_nothing_behind(model, make_batch, conditioning):
    batch = make_batch()
    before = logits(model, batch, **conditioning)
    with pytest.raises(ValueError, match="instrumented_layers"):
        model.peft.add_adapter("second", PDTAdapterConfig(instrumented_layers=9))
    assert set(model.peft.peft_config) == {"default"}
    assert torch.equal(logits(model, batch, **conditioning), before)
    model.peft.add_adapter("second", PDTAdapterConfig(instrumented_layers=1))


def test_refused_names_cover_every_parameter(model):
    parts = {part for name in model.pdt_parameters() for part in name.split(".pdt_")[-1].split(".")[1:]}
    parts -= {"default"} | {part for part in parts if part.isdigit()}
    assert parts <= parameter_path_components()


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
def test_unload_gives_back_the_exact_trunk(make_trunk, make_batch, randomize, name):
    trunk, batch = make_trunk(name), make_batch()
    original = copy.deepcopy(trunk.state_dict())
    expected = trunk_logits(trunk, batch)
    back = randomize(composite(trunk)).peft.unload()
    assert type(back) is type(trunk)
    assert list(back.state_dict()) == list(original)
    assert all(torch.equal(tensor, original[key]) for key, tensor in back.state_dict().items())
    assert not any(isinstance(module, PDTStack) for module in back.modules())
    assert torch.equal(trunk_logits(back, batch), expected)


def test_merge_is_refused(model):
    peft = model.peft
    for merge in (peft.merge_adapter, peft.merge_and_unload, peft.unmerge_adapter, model.stack.merge):
        with pytest.raises(NotImplementedError, match=r"merged into the trunk; use unload\(\)"):
            merge()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_view_loads_what_the_composite_saved(
    make_trunk, make_batch, conditioning, randomize, tmp_path, low_cpu_mem_usage
):
    trunk, batch = make_trunk(), make_batch()
    state = copy.deepcopy(trunk.state_dict())
    model = randomize(composite(trunk))
    model.save_pretrained(tmp_path)
    fresh = make_trunk()
    fresh.load_state_dict(state)
    peft = PeftModel.from_pretrained(
        fresh, str(tmp_path), subfolder="adapter", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert not any(parameter.is_meta for parameter in peft.parameters())
    assert torch.equal(view_logits(peft, batch, **conditioning), logits(model, batch, **conditioning))
    saved, loaded = (get_peft_model_state_dict(part) for part in (model.peft, peft))
    assert set(saved) == set(loaded) and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert len(saved) == len(model.pdt_parameters())


def test_bf16_trunk_keeps_its_dtype(make_trunk, make_batch, conditioning, randomize):
    trunk, batch = make_trunk().to(torch.bfloat16), make_batch()
    expected = trunk_logits(trunk, batch)
    model = composite(trunk)
    assert torch.equal(logits(model, batch), expected)
    randomize(model)
    read = logits(model, batch, **conditioning)
    assert read.dtype == torch.bfloat16 and read.isfinite().all() and not torch.equal(read, expected)
    assert all(p.dtype == torch.float32 for p in model.pdt_parameters().values())
    assert {p.dtype for n, p in model.named_parameters() if "pdt_" not in n} == {torch.bfloat16}


def test_native_adapter_loading_is_refused(make_trunk, tmp_path):
    composite(make_trunk("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        make_trunk("llama").load_adapter(str(tmp_path / "adapter"))


def test_states_and_router_logits_of_the_trunk_survive(make_trunk, make_batch):
    trunk, batch = make_trunk(), make_batch()
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions, **wanted}
    with torch.no_grad():
        expected = trunk(**inputs)
        peft = composite(trunk).peft
        actual = peft(**inputs)
        for name, count in (("hidden_states", 5), ("attentions", 4), ("router_logits", 4)):
            ours, theirs = getattr(actual, name), getattr(expected, name)
            assert len(ours) == len(theirs) == count
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)), name
        with pytest.raises(ValueError, match="output_attentions is not available"):
            peft(input_ids=batch.ids, stream_ids=torch.arange(3), output_attentions=True)
        for name in ("output_attentions", "output_router_logits"):
            inputs.pop(name)
        states = peft(**inputs, stream_ids=torch.arange(3)).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, expected.hidden_states[2:], strict=True))


def test_greedy_generation_of_the_peft_view_is_the_trunks(trunk, make_batch):
    batch = make_batch()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "max_new_tokens": 6, "do_sample": False}
    expected = trunk.generate(**inputs)
    assert torch.equal(composite(trunk).peft.generate(**inputs), expected)


def test_trunk_that_cannot_be_split_is_left_alone():
    trunk = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31))
    modules = [(key, type(module)) for key, module in trunk.named_modules()]
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be wrapped"):
        PDTForParallelDecoding.from_trunk(trunk)
    assert [(key, type(module)) for key, module in trunk.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in trunk.parameters())
