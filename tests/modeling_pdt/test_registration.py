"""The method ``PDT`` in PEFT's tables: an ordinary member, entered once whatever copy of the code comes first."""

import copy
import importlib
import pickle
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

import modeling_pdt
from modeling_pdt.adapter_layer import parameter_path_components


def test_enum_member_behaves_like_the_others():
    member = PeftType("PDT")
    assert member is PeftType["PDT"] is PeftType.PDT
    assert member in list(PeftType) and "PDT" in PeftType.__members__
    assert (member.name, member.value, member) == ("PDT", "PDT", "PDT")
    assert hash(member) == hash("PDT") and isinstance(member, PeftType)
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_TUNER_MAPPING["PDT"] is PEFT_TYPE_TO_TUNER_MAPPING[member]
    assert PeftType("LORA") is PeftType.LORA and len(set(PeftType)) == len(list(PeftType))


def test_second_copy_of_the_code_registers_nothing_new(make_trunk, tmp_path, monkeypatch):
    # As in a Hub repository: the flat files without the package's own __init__.
    source = Path(modeling_pdt.__file__).parent
    shutil.copytree(source, tmp_path / "copied_pdt", ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    members, tuner = len(list(PeftType)), PEFT_TYPE_TO_TUNER_MAPPING["PDT"]
    try:
        copied = importlib.import_module("copied_pdt.adapter_model")
        copied.register_pdt()
        assert len(list(PeftType)) == members and PEFT_TYPE_TO_TUNER_MAPPING["PDT"] is tuner
        config_class = importlib.import_module("copied_pdt.configuration_adapter").PDTAdapterConfig
        inputs = {
            "input_ids": torch.randint(2, 97, (3, 9)),
            "stream_ids": torch.arange(3),
            "notes": torch.randn(3, 5, 16),
        }
        peft = get_peft_model(make_trunk(), config_class(notes_dim=16))
        assert peft(**inputs).logits.isfinite().all()
        model_class = importlib.import_module("copied_pdt.modeling_pdt").PDTForParallelDecoding
        assert model_class.from_trunk(make_trunk(), notes_dim=16)(**inputs).logits.isfinite().all()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "copied_pdt"]:
            del sys.modules[name]


def test_naming_the_parameters_draws_no_random_numbers():
    parameter_path_components.cache_clear()
    before = torch.get_rng_state()
    parameter_path_components()
    assert torch.equal(before, torch.get_rng_state())
