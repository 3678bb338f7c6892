from dataclasses import fields

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from trainer_pdt.arguments import CurriculumArguments, DataArguments, PDTTrainingArguments

CONFIG_FIELDS = {
    "num_streams",
    "notes_dim",
    "notes_per_block",
    "writer_tap",
    "snc_placement",
    "snc_init",
    "gate_init",
    "adapter_bottleneck",
    "num_plan_slots",
    "plan_vocab_size",
    "plan_dim",
    "block_size",
    "bus_lag",
    "bus_capacity",
    "commit_horizon",
    "max_retries",
    "retry_policy",
    "agreement_threshold",
    "gate_scale",
}
RECIPE = """
output_dir: unused
max_steps: 16
learning_rate: 2.0e-3
sibling_weight: 4
teacher_kind: text
train_documents: 64
stages:
  - {name: bus, until: 0.5, train: [snc, writer], losses: {lm_ce: 1.0}, lag_jitter: 0.25}
  - {name: gate, until: 1.0, train: [agreement], losses: {agree: 1.0}, data: corrupted}
"""


def training(tmp_path, **values):
    return PDTTrainingArguments(output_dir=str(tmp_path), **values)


def test_a_recipe_fills_all_classes(tmp_path):
    recipe = yaml.safe_load(RECIPE) | {"output_dir": str(tmp_path)}
    parser = HfArgumentParser((PDTTrainingArguments, DataArguments, CurriculumArguments))
    run, data, curriculum = parser.parse_dict(recipe)
    assert (run.sibling_weight, run.teacher_kind, run.gate_lr_scale, run.learning_rate) == (4, "text", 10.0, 2e-3)
    assert (data.train_documents, data.eval_documents) == (64, 200)
    stages = curriculum.build(run.max_steps).stages
    assert [(stage.name, stage.until) for stage in stages] == [("bus", 8), ("gate", 16)]


def test_defaults_are_allowed(tmp_path):
    assert training(tmp_path).remove_unused_columns is False
    assert DataArguments().dataset_path is None
    with pytest.raises(ValueError, match="stages is empty"):
        CurriculumArguments().build(10)


def test_stages_need_the_length_of_the_run(tmp_path):
    with pytest.raises(ValueError, match="max_steps=-1, allowed: an int of at least 1"):
        CurriculumArguments(stages=yaml.safe_load(RECIPE)["stages"]).build(training(tmp_path).max_steps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate_lr_scale": 0.0}, "gate_lr_scale=0.0, allowed: a number above 0.0"),
        ({"sibling_weight": -1}, "sibling_weight=-1"),
        ({"sibling_weight": "5"}, "sibling_weight='5'"),
        ({"other_weight": -0.5}, "other_weight=-0.5, allowed: a number at least 0.0"),
        ({"kd_temperature": float("inf")}, "kd_temperature=inf"),
        ({"kd_plan_temperature": 0}, "kd_plan_temperature=0"),
        ({"spec_kl_temperature": 0}, "spec_kl_temperature=0"),
        ({"coverage_pos_weight": 0}, "coverage_pos_weight=0"),
        ({"usage_margin": -0.1}, "usage_margin=-0.1, allowed: a number at least 0.0"),
        ({"corruption_rate": 1.1}, "corruption_rate=1.1, allowed: a number at least 0.0 and at most 1.0"),
        ({"teacher_ema_decay": 1.0}, "teacher_ema_decay=1.0, allowed: a number at least 0.0 and at most 0.99999"),
        ({"redundancy_threshold": 1.5}, "redundancy_threshold=1.5, allowed: a number at least -1.0 and at most 1.0"),
        ({"usage_sensitivity": -0.1}, "usage_sensitivity=-0.1, allowed: a number at least 0.0"),
        ({"kd_balance_target": 0.0}, "kd_balance_target=0.0, allowed: a number above 0.0"),
        ({"kd_balance_rate": 0.0}, "kd_balance_rate=0.0"),
        ({"kd_balance_every": 0}, "kd_balance_every=0, allowed: an int of at least 1"),
        ({"kd_top_k": -1}, "kd_top_k=-1, allowed: an int of at least 0"),
        ({"logits_chunk": -1}, "logits_chunk=-1, allowed: an int of at least 0"),
        ({"skip_limit": -1}, "skip_limit=-1, allowed: an int of at least 0"),
        ({"spike_factor": 1.0}, "spike_factor=1.0, allowed: a number above 1.0"),
        ({"kd_top_k": 2.5}, "kd_top_k=2.5"),
        ({"block_start_tokens": 0}, "block_start_tokens=0"),
        (
            {"teacher_kind": "texts"},
            r"teacher_kind: 'texts' is unknown \(did you mean 'text'\?\), allowed: notes, ema, text, trunk",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns=True, allowed: False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1, allowed: 0.0, losses are the stages' own"),
        ({"torch_compile": True}, "torch_compile=True, allowed: False"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length', allowed: 'random'",
        ),
        # A kill while it wrote left a folder that no run goes on from; within a step it was not exact.
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True, allowed: False, .*: save_steps says"),
        # Two processes shared each batch of a process, and evaluation left out every second half.
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config.split_batches=True, allowed: False, per_device_.* per process",
        ),
        # Evaluation did not take them, and the model stayed on the CPU.
        ({"bf16_full_eval": True, "use_cpu": True}, "bf16_full_eval=True, allowed: False, .*: bf16"),
        ({"fp16_full_eval": True, "use_cpu": True}, "fp16_full_eval=True, allowed: False, .*: bf16"),
    ],
)
def test_bad_training_arguments_are_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        training(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_documents": 0}, "train_documents=0, allowed: an int of at least 1"),
        ({"eval_documents": 0}, "eval_documents=0"),
        ({"document_streams": 7}, "document_streams=7, allowed: an int of at least 2 and at most 6"),
        ({"document_streams": 1}, "document_streams=1"),
        ({"hard_fraction": 2}, "hard_fraction=2"),
        ({"foreign_fraction": -0.1}, "foreign_fraction=-0.1"),
        ({"max_row_tokens": 1}, "max_row_tokens=1"),
    ],
)
def test_bad_data_arguments_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**values)


def test_fields_of_worlds_belong_to_worlds():
    worlds = DataArguments()
    assert (worlds.document_streams, worlds.hard_fraction, worlds.foreign_fraction) == (None, 0.0, 0.0)
    published = DataArguments(dataset_path="data")
    assert (published.document_streams, published.hard_fraction, published.foreign_fraction) == (None, None, None)
    for name, value in (("document_streams", 3), ("hard_fraction", 0.25), ("foreign_fraction", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value}, allowed with dataset_path='data': none"):
            DataArguments(dataset_path="data", **{name: value})


@pytest.mark.parametrize(("num_streams", "given", "sections"), [(3, None, 3), (4, None, 4), (2, 3, 3), (1, 2, 2)])
def test_worlds_have_a_section_per_stream(num_streams, given, sections):
    # Always three sections unless asked for: the adapters of further streams were not trained, without a word.
    assert DataArguments(document_streams=given).for_streams(num_streams).document_streams == sections


@pytest.mark.parametrize(("num_streams", "given"), [(4, 3), (7, None), (8, 6), (1, None)])
def test_streams_without_a_section_are_refused(num_streams, given):
    message = rf"num_streams={num_streams} with document_streams={given}, allowed: 2 to 6 sections"
    with pytest.raises(ValueError, match=message):
        DataArguments(document_streams=given).for_streams(num_streams)


def test_a_published_dataset_has_its_own_sections():
    published = DataArguments(dataset_path="data")
    assert published.for_streams(8) is published


def test_names_are_unique_across_arguments_and_configs():
    inherited = {item.name for item in fields(TrainingArguments)}
    own = [item.name for item in fields(PDTTrainingArguments) if item.name not in inherited]
    rest = [item.name for cls in (DataArguments, CurriculumArguments) for item in fields(cls)]
    assert len(set(own + rest)) == len(own + rest)
    assert not set(own + rest) & CONFIG_FIELDS
    assert not set(rest) & inherited


def test_every_own_field_has_help():
    inherited = {item.name for item in fields(TrainingArguments)}
    own = [item for item in fields(PDTTrainingArguments) if item.name not in inherited]
    for item in [*own, *fields(DataArguments), *fields(CurriculumArguments)]:
        assert item.metadata["help"].endswith(".")
