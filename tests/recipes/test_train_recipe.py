"""recipes/train.py on a trunk as large ones come: in bfloat16, quantised, with activation checkpointing."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file

from modeling_pdt import PDTAdapterConfig
from recipes import train
from tests.tiny_training import make_model, make_trainer, tokenizer, weights
from trainer_pdt.arguments import ModelArguments
from trainer_pdt.parser import load_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def write_mxfp4_trunk(folder: Path) -> None:
    """A trunk whose experts hold packed ones: every 4 bits are the code of 1.0, every scale is 2 ** 0."""
    trunk = make_model().trunk
    config = {**trunk.config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}
    state = {
        name.replace("base_layer.", ""): value for name, value in trunk.state_dict().items() if "pdt_" not in name
    }
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.full((experts, rows, columns // 32, 16), 0x22, dtype=torch.uint8)
        state[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127, dtype=torch.uint8)
    save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_trunk_is_trained_on_dequantised(tmp_path, dtype):
    write_mxfp4_trunk(tmp_path)
    arguments = ModelArguments(trunk=str(tmp_path), trunk_dtype=dtype, experts_implementation="eager")
    model, _ = train.load_model(arguments, PDTAdapterConfig(notes_dim=16))
    experts = model.stack.base_layer.layers[0].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, torch.ones_like(weight))
    assert {parameter.dtype for parameter in model.pdt_parameters().values()} == {torch.float32}
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_every_stream_is_trained(tmp_path, monkeypatch):
    # Documents had three sections whatever the number of streams: the adapter of the fourth stayed as it began.
    class Reached(Exception):
        pass

    def stop(*, train_dataset, **_):
        raise Reached(train_dataset.stream_counts())

    model = make_model(num_streams=4)
    monkeypatch.setattr(train, "load_model", lambda *_: (model, tokenizer()))
    monkeypatch.setattr(train, "PDTTrainer", lambda *_, **options: stop(**options))
    words = ["--config", str(RECIPES / "tiny/train.yaml"), "--num_streams", "4", "--train_documents", "5"]
    monkeypatch.setattr("sys.argv", ["train.py", *words, "--output_dir", str(tmp_path)])
    with pytest.raises(Reached, match=r"\[4, 4, 4, 4, 4\]"):
        train.main()


@pytest.mark.slow
def test_activation_checkpointing_changes_no_weight(tmp_path):
    # The trainer could not switch it on: the model's own method lacked two of the arguments that it passes.
    after = []
    for on in (False, True):
        model = make_model(block_size=6)
        make_trainer(tmp_path, model=model, activation_checkpointing=on, max_steps=1).train()
        assert model.is_activation_checkpointing is on
        after.append(weights(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_the_state_that_marks_a_finished_run_comes_after_its_model(tmp_path, monkeypatch):
    # It came before: a kill between them left a run that counted as finished without its model.
    made = ("FeatureMaker", "PDTDataCollator", "PDTTrainer", "record_run", "write_training_report")
    mocks = {name: MagicMock() for name in made}
    pairs = {name: MagicMock(return_value=(MagicMock(), MagicMock())) for name in ("load_model", "load_features")}
    for name, mock in {**mocks, **pairs}.items():
        monkeypatch.setattr(train, name, mock)
    options = ["--config", str(RECIPES / "tiny/train.yaml"), "--output_dir", str(tmp_path), "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--threads", "1"])
    train.main()
    calls = [call[0] for call in mocks["PDTTrainer"].return_value.method_calls]
    assert calls.index("train") < calls.index("save_model") < calls.index("save_state")


@pytest.mark.parametrize("name", ["production/train.yaml", "gpt_oss_20b/train_1x80gb.yaml"])
def test_large_recipes_save_memory(name):
    values = load_yaml(RECIPES / name)
    assert (values["trunk_dtype"], values["bf16"], values["activation_checkpointing"]) == ("bfloat16", True, True)
