"""Saving, moving, loading without the package, and refusing what does not fit."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from modeling_pdt import PDTConfig, PDTForParallelDecoding

ADAPTER_FILE = Path("adapter") / "adapter_model.safetensors"

LOADER = """
import importlib.abc, sys, torch

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_pdt", "trainer_pdt"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, NoPackage())
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForCausalLM

for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    cls = {"model": AutoModel, "causal": AutoModelForCausalLM}[kind]
    model = cls.from_pretrained(folder, trust_remote_code=True)
    case = torch.load(folder + "/case.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**case["inputs"]).logits
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not model.training
    print(folder, torch.equal(logits, case["logits"]), model.config.num_streams, model.generation_config.max_retries)
"""


@pytest.fixture
def inputs() -> dict:
    """One conditioned forward of three rows."""
    return {
        "input_ids": torch.randint(2, 97, (3, 14)),
        "stream_ids": torch.arange(3),
        "notes": torch.randn(3, 5, 16),
        "notes_mask": torch.rand(3, 5) < 0.7,
    }


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.fixture
def saved(make_model, tmp_path) -> tuple[PDTForParallelDecoding, Path]:
    """A trained Llama model and the folder it was saved to, trunk included."""
    model = make_model("llama", trained=True, max_retries=3, block_size=5)
    folder = tmp_path / "saved"
    model.save_pretrained(folder, include_trunk=True)
    return model, folder


def edit_tensors(folder: Path, change) -> None:
    state = load_file(folder / ADAPTER_FILE)
    change(state)
    save_file(state, folder / ADAPTER_FILE)


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def digest(module: torch.nn.Module) -> str:
    parts = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "pdt_" not in name:
            parts.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


# --- layout ---


def test_layout(saved):
    _, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "adapter", "trunk", "modeling_pdt.py", "snc.py"} <= names
    assert "adapter_config.json" not in names, "at the root it would redirect a hub id to the trunk"
    assert "__init__.py" not in names and not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_pdt.PDTForParallelDecoding"
    assert (config["trunk_name_or_path"], config["adapter_subfolder"], config["model_type"]) == (
        "trunk",
        "adapter",
        "pdt",
    )
    assert not {"num_streams", "notes_dim"} & set(config)
    state = load_file(folder / ADAPTER_FILE)
    assert state and all("pdt_" in name and "default" not in name for name in state)
    package = Path(sys.modules["modeling_pdt"].__file__).parent
    for source in package.glob("*.py"):
        if source.name != "__init__.py":
            assert (folder / source.name).read_bytes() == source.read_bytes()


def test_only_pdt_parameters_without_include_trunk(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "trunk").exists()
    assert sum(t.numel() for t in load_file(tmp_path / ADAPTER_FILE).values()) == sum(
        p.numel() for p in model.pdt_parameters().values()
    )


def test_saving_leaves_model_and_trunk_as_they_are(model, inputs, tmp_path):
    trunk, expected = digest(model.trunk), logits(model, inputs)
    config = model.config.to_dict()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for include in (False, True, True):
        model.save_pretrained(tmp_path, include_trunk=include)
    assert digest(model.trunk) == trunk and torch.equal(logits(model, inputs), expected)
    assert model.config.to_dict() == config
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        model.save_pretrained(tmp_path / "file")


# --- round trips ---


@pytest.mark.slow
def test_moved_folders_load_without_the_package(make_model, make_trunk, inputs, tmp_path, randomize):
    whole = make_model("gpt_oss", trained=True, max_retries=3)
    whole.save_pretrained(tmp_path / "before" / "whole", include_trunk=True)
    trunk = make_trunk("llama")
    trunk.save_pretrained(tmp_path / "trunk")
    named = randomize(
        PDTForParallelDecoding.from_trunk(str(tmp_path / "trunk"), notes_dim=16, num_streams=4, max_retries=2).eval()
    )
    named.save_pretrained(tmp_path / "before" / "named")
    for model, name in ((whole, "whole"), (named, "named")):
        torch.save({"inputs": inputs, "logits": logits(model, inputs)}, tmp_path / "before" / name / "case.pt")
    shutil.move(tmp_path / "before", tmp_path / "after")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    (elsewhere / "load.py").write_text(LOADER)
    cases = [str(tmp_path / "after" / "whole"), "model", str(tmp_path / "after" / "named"), "causal"]
    done = subprocess.run(
        [sys.executable, "load.py", *cases],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cases[0], "True", "3", "3", cases[2], "True", "4", "2"]


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_equal(make_trunk, randomize, inputs, tmp_path, name, dtype):
    # Built in its dtype, as from a file: `.to(dtype)` would round the rotary frequencies, which are not saved.
    trunk = AutoModelForCausalLM.from_config(make_trunk(name).config, dtype=dtype).eval()
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, notes_dim=16, gate_mode="dynamic").eval())
    model.save_pretrained(tmp_path, include_trunk=True)
    again = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert digest(again.trunk) == digest(model.trunk)
    assert {p.dtype for key, p in again.named_parameters() if "pdt_" not in key} == {dtype}
    ours, theirs = model.pdt_parameters(), again.pdt_parameters()
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_tied_embeddings_stay_tied(make_trunk, randomize, inputs, tmp_path):
    trunk = make_trunk("llama", tie_word_embeddings=True)
    model = randomize(PDTForParallelDecoding.from_trunk(trunk, notes_dim=16).eval())
    model.save_pretrained(tmp_path, include_trunk=True)
    again = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_second_generation_is_equal(saved, inputs, tmp_path):
    model, folder = saved
    again = PDTForParallelDecoding.from_pretrained(folder)
    again.save_pretrained(tmp_path / "next", include_trunk=True)
    shutil.rmtree(folder)
    third = PDTForParallelDecoding.from_pretrained(tmp_path / "next")
    assert torch.equal(logits(third, inputs), logits(model, inputs))
    assert third.config.block_size == 5 and third.generation_config.max_retries == 3
    assert not any("base_layer" in name for name in load_file(tmp_path / "next" / "trunk" / "model.safetensors"))


def test_adapters_saved_without_the_trunk_load_on_a_given_one(make_model, make_trunk, inputs, tmp_path):
    model = make_model("llama", trained=True)
    state = {key.replace("base_layer.", ""): t for key, t in model.trunk.state_dict().items() if "pdt_" not in key}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trunk_name_or_path is empty"):
        PDTForParallelDecoding.from_pretrained(tmp_path)
    trunk = make_trunk("llama")
    trunk.load_state_dict(state)
    again = PDTForParallelDecoding.from_pretrained(tmp_path, trunk=trunk, is_trainable=True)
    assert again.trunk is trunk and torch.equal(logits(again, inputs), logits(model, inputs))
    assert {key for key, p in again.peft.named_parameters() if p.requires_grad} == set(again.pdt_parameters())
    with pytest.raises(ValueError, match=r"dtype.*trunk= was given"):
        PDTForParallelDecoding.from_pretrained(tmp_path, trunk=make_trunk("llama"), dtype=torch.bfloat16)


def test_an_adapter_of_any_name_reloads(make_trunk, randomize, inputs, tmp_path):
    model = randomize(
        PDTForParallelDecoding.from_trunk(make_trunk("llama"), adapter_name="biology", notes_dim=16).eval()
    )
    model.save_pretrained(tmp_path, include_trunk=True)
    assert (tmp_path / ADAPTER_FILE).is_file()
    again = PDTForParallelDecoding.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_state_of_a_sharded_trainer_is_saved(model, tmp_path):
    gathered = {name: torch.full_like(p, 0.5) for name, p in model.named_parameters() if "pdt_" in name}
    model.save_pretrained(tmp_path, state_dict=gathered)
    state = load_file(tmp_path / ADAPTER_FILE)
    assert len(state) == len(gathered) and all((tensor == 0.5).all() for tensor in state.values())


def test_arguments_reach_the_trunk(saved, tmp_path, make_model):
    _, folder = saved
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for key, p in half.named_parameters() if "pdt_" not in key} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.pdt_parameters().values())
    eager = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert eager.trunk.config._attn_implementation == "eager"
    make_model("gpt_oss").save_pretrained(tmp_path / "moe", include_trunk=True)
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="batched_mm")
    assert experts.trunk.config._experts_implementation == "batched_mm"
    assert isinstance(AutoConfig.from_pretrained(folder), PDTConfig)


def test_offloaded_trunk_computes_the_same(saved, inputs, tmp_path):
    model, folder = saved
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    parts |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = PDTForParallelDecoding.from_pretrained(folder, device_map=parts, offload_folder=str(tmp_path / "offload"))
    assert any(p.is_meta for p in again.trunk.parameters())
    assert not any(p.is_meta for p in again.pdt_parameters().values())
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_none_is_never_forwarded_to_the_trunk(saved):
    # An explicit quantization_config=None makes transformers forget the checkpoint's own and initialise at random.
    model = AutoModel.from_pretrained(saved[1], quantization_config=None)
    assert digest(model.trunk) == digest(saved[0].trunk)


def test_fields_of_the_adapter_cannot_be_overridden(saved):
    with pytest.raises((TypeError, ValueError), match="num_streams"):
        PDTForParallelDecoding.from_pretrained(saved[1], num_streams=5)


# --- refusals ---


def test_missing_extra_and_misshapen_tensors_are_errors(saved):
    _, folder = saved
    original = (folder / ADAPTER_FILE).read_bytes()
    name = sorted(load_file(folder / ADAPTER_FILE))[0]
    cases = {
        f"missing {name}": lambda state: state.pop(name),
        "unexpected base_model.pdt_more": lambda state: state.update({"base_model.pdt_more": torch.zeros(1)}),
        f"{name} has shape": lambda state: state.update({name: torch.zeros(*state[name].shape, 2)}),
    }
    for message, change in cases.items():
        (folder / ADAPTER_FILE).write_bytes(original)
        edit_tensors(folder, change)
        with pytest.raises(ValueError, match="does not fit this model") as error:
            PDTForParallelDecoding.from_pretrained(folder)
        assert message in str(error.value)
    (folder / ADAPTER_FILE).write_bytes(original)
    PDTForParallelDecoding.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
def test_damaged_adapter_files_are_errors(saved, damage):
    _, folder = saved
    file = folder / ADAPTER_FILE
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-100], "garbage": b"no tensors", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"adapter file in .* cannot be read"):
        PDTForParallelDecoding.from_pretrained(folder)


def test_unknown_keys_are_errors(saved):
    _, folder = saved
    for file, owner in (("adapter/adapter_config.json", "adapter_config.json"), ("config.json", "PDTConfig")):
        original = (folder / file).read_text()
        edit_json(folder / file, note_dims=3)
        with pytest.raises(ValueError, match=f"{owner}.*note_dims"):
            PDTForParallelDecoding.from_pretrained(folder)
        (folder / file).write_text(original)
    edit_json(folder / "adapter" / "adapter_config.json", peft_type="LORA")
    with pytest.raises(ValueError, match="peft_type must be 'PDT', got 'LORA'"):
        PDTForParallelDecoding.from_pretrained(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        PDTForParallelDecoding.from_pretrained(folder)


def test_impossible_values_in_a_file_are_errors(saved):
    _, folder = saved
    edit_json(folder / "adapter" / "adapter_config.json", num_streams=0)
    with pytest.raises(ValueError, match=r"num_streams must be >= 1, got 0"):
        PDTForParallelDecoding.from_pretrained(folder)


def test_another_trunk_is_an_error(saved, make_trunk):
    _, folder = saved
    for trunk, words in ((make_trunk("qwen3"), "trunk_num_layers is 3"), (make_trunk("gpt_oss"), "has 4")):
        with pytest.raises(ValueError, match=words):
            PDTForParallelDecoding.from_pretrained(folder, trunk=trunk)


def test_a_trunk_that_was_moved_away_is_named(make_trunk, inputs, tmp_path):
    # The Hub said that a repository's id must look otherwise: neither the field nor what to do about it was named.
    make_trunk("llama").save_pretrained(tmp_path / "trunk")
    model = PDTForParallelDecoding.from_trunk(str(tmp_path / "trunk"), notes_dim=16).eval()
    model.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "trunk", tmp_path / "moved")
    message = f"trunk_name_or_path='{tmp_path}/trunk' in the config.json of {tmp_path}/saved, allowed: a folder that"
    with pytest.raises(ValueError, match=re.escape(message) + r".* pass trunk=\.\.\."):
        PDTForParallelDecoding.from_pretrained(tmp_path / "saved")
    trunk = LlamaForCausalLM.from_pretrained(tmp_path / "moved")
    for choice in ({"trunk": trunk}, {"trunk_name_or_path": str(tmp_path / "moved")}):
        again = PDTForParallelDecoding.from_pretrained(tmp_path / "saved", **choice)
        assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_model_needs_a_trunk():
    with pytest.raises(ValueError, match="from_trunk"):
        PDTForParallelDecoding(PDTConfig())


def test_the_saved_class_is_ours_whatever_a_wrapper_calls_it(model, tmp_path):
    model.__class__ = type("FSDPPDTForParallelDecoding", (type(model),), {})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["PDTForParallelDecoding"]


def test_a_given_configuration_is_not_written_to(saved):
    # Two models shared one object: overriding a field of the second changed the first.
    _, folder = saved
    config = PDTConfig.from_pretrained(folder)
    first = PDTForParallelDecoding.from_pretrained(folder, config=config)
    PDTForParallelDecoding.from_pretrained(folder, config=config, block_size=2)
    assert first.config.block_size == config.block_size != 2


def test_a_trunk_that_says_how_to_sample_and_not_that_it_does(make_trunk, tmp_path):
    # Saving failed half-way.
    trunk = make_trunk("llama")
    trunk.generation_config = GenerationConfig(eos_token_id=1, temperature=0.6, top_p=0.9)
    PDTForParallelDecoding.from_trunk(trunk, notes_dim=16).save_pretrained(tmp_path)
    assert PDTForParallelDecoding.from_pretrained(tmp_path, trunk=make_trunk("llama")).generation_config.top_p is None
