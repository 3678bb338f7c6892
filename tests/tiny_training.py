"""A tokenizer, a random tiny trunk, features and a trainer that tests of training share; nothing is downloaded."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.adapter_layer import parameter_path_components
from trainer_pdt import FeatureMaker, PDTDataCollator, PDTTrainer, PDTTrainingArguments
from trainer_pdt.curriculum import Curriculum
from trainer_pdt.data.worlds import WorldOptions, generate_documents
from trainer_pdt.features import WorldFeatures, collect_values
from trainer_pdt.trunk import TrunkArguments, trunk_config
from trainer_pdt.trunk_corpus import train_tokenizer

BUS_STAGE: dict[str, Any] = {
    "name": "bus",
    "until": 1.0,
    "train": ["snc", "stream_adapters", "writer", "encoder"],
    "losses": {"lm_ce": 1.0},
    "lag_jitter": 0.25,
}
HEAD_STAGE: dict[str, Any] = {
    "name": "heads",
    "until": 1.0,
    "train": ["coverage", "agreement", "planner", "stream"],
    "losses": {"cov": 1.0, "agree": 1.0, "planner": 0.2, "stream": 0.1},
    "data": "corrupted",
}
ADAPTER = {"notes_dim": 16, "adapter_bottleneck": 4, "plan_vocab_size": 32, "plan_dim": 8, "notes_per_block": 2}


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens."""
    return train_tokenizer(400, num_documents=60)


@lru_cache
def value_pool() -> dict[str, tuple[str, ...]]:
    """Values by cue."""
    return collect_values(generate_documents("train", 0, 60, with_notes=False))


def make_model(seed: int = 0, **overrides: Any) -> PDTForParallelDecoding:
    """A PDT model on a random GPT-OSS trunk of width 32."""
    # Its first call draws random numbers.
    parameter_path_components()
    torch.manual_seed(seed)
    sizes = TrunkArguments(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=32, num_experts=2
    )
    trunk = GptOssForCausalLM(trunk_config(sizes, tokenizer()))
    return PDTForParallelDecoding.from_trunk(trunk, **{**ADAPTER, **overrides})


def make_maker(corruption_rate: float = 0.5) -> FeatureMaker:
    """Features for [`make_model`]'s sizes."""
    return FeatureMaker(tokenizer(), 8, 32, "parallel-decoder-v1", value_pool(), corruption_rate)


def make_features(count: int = 4, streams: int = 3, split: str = "train") -> WorldFeatures:
    """Features of `count` documents."""
    return WorldFeatures(split, count, make_maker(), WorldOptions(streams))


def make_collator(model: PDTForParallelDecoding, **choices: Any) -> PDTDataCollator:
    """The collator of a model."""
    return PDTDataCollator.from_config(model.config, tokenizer(), **choices)


def make_arguments(folder: str | Path, **changes: Any) -> PDTTrainingArguments:
    """Arguments of a run of a few steps on the CPU."""
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return PDTTrainingArguments(**{**values, **changes})


def make_trainer(
    folder: str | Path, stages: list[dict[str, Any]] | None = None, model: Any = None, **changes: Any
) -> PDTTrainer:
    """A trainer with new documents; `changes` are training arguments, `train_dataset` or `callbacks`."""
    model = make_model() if model is None else model
    extra = {key: changes.pop(key) for key in ("callbacks",) if key in changes}
    dataset = changes.pop("train_dataset", None) or make_features(64)
    arguments = make_arguments(folder, **changes)
    curriculum = Curriculum.from_list(stages or [BUS_STAGE], arguments.max_steps)
    return PDTTrainer(
        model,
        arguments,
        curriculum,
        data_collator=make_collator(model),
        train_dataset=dataset,
        eval_dataset=make_features(4, split="validation"),
        processing_class=tokenizer(),
        **extra,
    )


def weights(model: PDTForParallelDecoding) -> dict[str, torch.Tensor]:
    """Copies of all PDT parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.pdt_parameters().items()}
