"""Hostile files: an error that names what is wrong, and a trunk that nobody has touched."""

import copy
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save, save_file

from modeling_pdt import PDTForParallelDecoding, pretrained
from modeling_pdt.adapter_files import check_inside
from modeling_pdt.hub_layout import upload
from tests.hub.conftest import OWNER_TOKEN
from tests.modeling_pdt.conftest import llama_trunk

WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


@pytest.fixture
def trunk():
    return llama_trunk().eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good model's folder."""
    folder = tmp_path_factory.mktemp("good")
    PDTForParallelDecoding.from_trunk(llama_trunk(), notes_dim=16).save_pretrained(folder, include_trunk=True)
    return folder


@pytest.fixture
def saved(good, tmp_path):
    """A copy of it, which a test spoils."""
    return shutil.copytree(good, tmp_path / "saved", ignore=shutil.ignore_patterns("*.py"))


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (Path.touch, (Path(self.trace),))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_state(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def refused(folder, trunk, match):
    """The folder is refused; parameters, modules and gradients of the trunk stay as they were."""
    state = copy.deepcopy(trunk.state_dict())
    modules = [(name, type(module)) for name, module in trunk.named_modules()]
    with pytest.raises(ValueError, match=match):
        PDTForParallelDecoding.from_pretrained(folder, trunk=trunk)
    assert [(name, type(module)) for name, module in trunk.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())
    assert not hasattr(trunk, "peft_config")


def with_nan(state):
    name = sorted(state)[0]
    state[name].view(-1)[0] = float("nan")


HOSTILE = {
    "shape": (
        lambda state: state.update({sorted(state)[0]: torch.zeros(7, 7, 7)}),
        r"has shape \[7, 7, 7\], expected",
    ),
    "nan": (with_nan, "has values that are not finite"),
    "integers": (lambda s: s.update({k: v.long() for k, v in s.items()}), r"has type torch\.int64"),
    "extra": (
        lambda state: state.update({"base_model.model.more": torch.zeros(1)}),
        "unexpected base_model.model.more",
    ),
    "trunk": (
        lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(97, 32)}),
        r"unexpected base_model\.model\.lm_head\.weight",
    ),
    "missing": (lambda state: state.pop(sorted(state)[0]), r"missing base_model\.model\.model\.pdt_"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors(saved, trunk, kind):
    change, match = HOSTILE[kind]
    edit_state(saved, change)
    refused(saved, trunk, match)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors_through_peft(saved, trunk, kind):
    # PEFT wraps before it reads: the trunk stays wrapped, but computes and holds what it did.
    change, match = HOSTILE[kind]
    edit_state(saved, change)
    ids, state = torch.randint(2, 97, (2, 9)), copy.deepcopy(trunk.state_dict())
    with torch.no_grad():
        expected = trunk(ids).logits
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(trunk, saved, subfolder="adapter")
    own = {name.replace("base_layer.", ""): t for name, t in trunk.state_dict().items() if "pdt_" not in name}
    assert set(own) == set(state) and all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    with torch.no_grad():
        assert torch.equal(trunk(ids).logits, expected)


def test_a_hostile_second_adapter_leaves_the_model_as_it_was(saved, tmp_path):
    model = PDTForParallelDecoding.from_pretrained(saved)
    names = [name for name, _ in model.named_parameters()]
    edit_state(saved, HOSTILE["trunk"][0])
    with pytest.raises(ValueError, match=r"unexpected base_model\.model\.lm_head\.weight"):
        model.load_adapter(saved, "second")
    assert set(model.peft.peft_config) == {"default"}
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    "fields",
    [{"adapter_bottleneck": 10**12}, {"plan_vocab_size": 10**12}, {"num_streams": 10**10}, {"num_plan_slots": 10**12}],
    ids=lambda fields: next(iter(fields)),
)
def test_giant_sizes_in_a_configuration_allocate_nothing(saved, trunk, fields):
    edit_json(saved / CONFIG, **fields)
    refused(saved, trunk, "does not fit this model")


@pytest.mark.parametrize("length", [2**63, 10**9, 200_000_000])
def test_a_giant_header_is_refused(saved, trunk, length):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(saved, trunk, "cannot be read")


def test_offsets_beyond_the_file_are_refused(saved, trunk):
    content = save({"one": torch.zeros(4)}).replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,99]')
    (saved / WEIGHTS).write_bytes(content)
    refused(saved, trunk, "cannot be read")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "config.json", "generation_config.json"])
def test_links_out_of_the_folder_are_refused(saved, trunk, tmp_path, name):
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    refused(saved, trunk, "leads out of")


def test_a_linked_adapter_folder_is_refused(saved, trunk, tmp_path):
    (saved / "adapter").rename(tmp_path / "elsewhere")
    (saved / "adapter").symlink_to(tmp_path / "elsewhere")
    refused(saved, trunk, "leads out of")


def test_links_within_the_folder_and_the_hub_cache_are_fine(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "1")
    assert check_inside(snapshot, "config.json").read_text() == "{}"
    (tmp_path / "other").write_text("{}")
    (snapshot / "generation_config.json").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="leads out of"):
        check_inside(snapshot, "generation_config.json")


@pytest.mark.parametrize("subfolder", ["../elsewhere", "adapter/../../elsewhere", "/etc", "..", "C:\\adapter", ""])
def test_an_adapter_folder_outside_is_refused(saved, trunk, subfolder):
    edit_json(saved / "config.json", adapter_subfolder=subfolder)
    refused(saved, trunk, "adapter_subfolder must be a folder inside")


@pytest.mark.parametrize("name", ["../trunk", "trunk/../../trunk", "./../other", "~/trunk", "a/b/c"])
def test_a_trunk_outside_is_refused(saved, tmp_path, name):
    (saved / "trunk").rename(tmp_path / "trunk")
    edit_json(saved / "config.json", trunk_name_or_path=name)
    with pytest.raises(ValueError, match=r"trunk_name_or_path=|leads out of"):
        PDTForParallelDecoding.from_pretrained(saved)


def test_a_linked_trunk_is_refused(saved, tmp_path):
    (saved / "trunk").rename(tmp_path / "elsewhere")
    (saved / "trunk").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        PDTForParallelDecoding.from_pretrained(saved)


def test_files_of_a_trunk_that_are_elsewhere_are_refused(saved, tmp_path):
    weights = saved / "trunk" / "model.safetensors"
    weights.rename(tmp_path / "other.safetensors")
    weights.symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'trunk/model\.safetensors' leads out of"):
        PDTForParallelDecoding.from_pretrained(saved)
    weights.unlink()
    names = load_file(tmp_path / "other.safetensors")
    for shard in ("../../other.safetensors", str(tmp_path / "other.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (saved / "trunk" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"other\.safetensors' leads out of"):
            PDTForParallelDecoding.from_pretrained(saved)


def test_pickles_are_not_opened(saved, trunk, tmp_path):
    trace = tmp_path / "unpickled"
    bomb = pickle.dumps({"weight": Bomb(trace)})
    (saved / WEIGHTS).unlink()
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        (saved / "adapter" / name).write_bytes(bomb)
    refused(saved, trunk, "cannot be read")
    (saved / WEIGHTS).write_bytes(bomb)
    refused(saved, trunk, "cannot be read")
    assert not trace.exists()


def test_a_trunk_of_pickles_is_not_opened(saved, tmp_path):
    trace = tmp_path / "unpickled"
    state = load_file(saved / "trunk" / "model.safetensors")
    (saved / "trunk" / "model.safetensors").unlink()
    torch.save(state, saved / "trunk" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        PDTForParallelDecoding.from_pretrained(saved)
    assert PDTForParallelDecoding.from_pretrained(saved, use_safetensors=False).trunk is not None
    (saved / "trunk" / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(trace)}))
    with pytest.raises(OSError):
        PDTForParallelDecoding.from_pretrained(saved)
    assert not trace.exists()


def test_code_named_in_a_configuration_is_not_run(saved, tmp_path):
    trace = tmp_path / "run"
    (saved / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    edit_json(saved / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    edit_json(saved / "trunk" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    edit_json(saved / CONFIG, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    PDTForParallelDecoding.from_pretrained(saved)
    assert not trace.exists()


@pytest.mark.slow
def test_a_hub_model_may_not_name_a_folder_of_this_machine(hub, visit, published):
    files = dict(hub.files("owner/pdt"))
    for number, name in enumerate(("/etc", "../trunk", "./trunk")):
        config = {**json.loads(files["config.json"]), "trunk_name_or_path": name, "trunk_revision": None}
        hub.publish(f"other/bad{number}", {**files, "config.json": json.dumps(config).encode()})
        value, _ = visit("error_of", "composite", f"other/bad{number}", published.case, package=True)
        assert value["type"] == "ValueError" and f"trunk_name_or_path={name!r}" in value["text"]


def test_links_are_not_uploaded(saved, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (saved / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"holds links.*notes\.txt"):
        upload(saved, "owner/never")


def test_saving_with_an_upload_uploads_what_it_wrote(saved, monkeypatch):
    # Everything in the folder went to the Hub: environments, private notes, optimizer states.
    uploaded = {}

    def take(folder, repo_id, **arguments):
        state = load_file(folder / WEIGHTS)
        uploaded[repo_id] = (sorted(path.name for path in folder.iterdir()), state, arguments)

    monkeypatch.setattr(pretrained, "upload", take)
    model = PDTForParallelDecoding.from_pretrained(saved)
    (saved / ".env").write_text("TOKEN=secret")
    (saved / "checkpoint-5").mkdir()
    gathered = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items() if "pdt_" in name}
    model.save_pretrained(saved, include_trunk=True, state_dict=gathered, push_to_hub=True, private=True)
    (names, state, arguments) = uploaded.pop("saved")
    assert {"adapter", "config.json", "generation_config.json", "trunk"} < set(names)
    assert not {".env", "checkpoint-5"} & set(names) and arguments == {"private": True}
    assert all(tensor.eq(1).all() for tensor in state.values()) and not uploaded
    model.save_pretrained(saved, push_to_hub=True, repo_id="owner/named")
    assert list(uploaded) == ["owner/named"]


def test_a_misspelt_choice_of_saving_writes_nothing(saved, tmp_path):
    # It was ignored: the trunk was missing in what was saved.
    model = PDTForParallelDecoding.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"\['include_trunks'\], allowed: only with push_to_hub=True"):
        model.save_pretrained(tmp_path / "new", include_trunks=True)
    with pytest.raises(ValueError, match="safe_serialization=False, allowed: True"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", safe_serialization=True)


@pytest.mark.slow
def test_tokens_are_neither_written_nor_logged(visit, published, tmp_path):
    value, printed = visit(
        "save_with_token", "owner/secret", str(tmp_path / "copy"), OWNER_TOKEN, package=True, debug=True
    )
    assert value["loaded"] and "DEBUG" in printed
    assert OWNER_TOKEN not in printed and OWNER_TOKEN not in published.printed
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and OWNER_TOKEN.encode() in path.read_bytes()]
    assert holding == []
