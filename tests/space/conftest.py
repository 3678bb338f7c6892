"""A tiny model with random adapters on the shipped trunk, saved as a visitor would name it."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_pdt import PDTForParallelDecoding

ROOT = Path(__file__).resolve().parents[2]
TRUNK = ROOT / "recipes/tiny/trunk"
# The Space is a program of its own: its folder is where its modules are looked for.
sys.path.insert(0, str(ROOT / "hub_cards/space"))


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory):
    """Adapters that write notes, judge and cover, by weights that nobody trained."""
    torch.manual_seed(0)
    model = PDTForParallelDecoding.from_trunk(str(TRUNK), num_streams=3, block_size=8, notes_per_block=2)
    with torch.no_grad():
        for parameter in model.pdt_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.config._adapter_config.trained_parts = ["snc", "stream_adapters", "writer", "coverage", "agreement"]
    model.generation_config.agreement_threshold = 0.05
    folder = tmp_path_factory.mktemp("space") / "model"
    model.save_pretrained(folder, include_trunk=True)
    AutoTokenizer.from_pretrained(TRUNK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def loaded(model_folder):
    """The same, loaded as the Space does."""
    from pdt_space.session import ModelShelf

    return ModelShelf().get(str(model_folder))
