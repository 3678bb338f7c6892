"""Every training recipe through the real parser; GPT-OSS-20B with its real shapes and without weights."""

from collections import Counter
from functools import cached_property
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from transformers import GptOssConfig, GptOssForCausalLM

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding, Rollout
from modeling_pdt.rollout import encode_texts
from recipes.decode import DecodeArguments
from tests.tiny_training import make_features, make_model, make_trainer, weights
from trainer_pdt import PDTTrainingArguments
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.callbacks import parameter_group
from trainer_pdt.parser import RecipeParser

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
LAUNCHERS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
GPT_OSS = "gpt_oss_20b/train_1x80gb.yaml"
TRAINING = {
    "tiny": ["tiny/train.yaml"],
    "full": ["tiny/train_full.yaml"],
    "dev": ["dev/train.yaml"],
    "production": ["production/train.yaml"],
    "1x80gb": [GPT_OSS],
    "8gpu": [GPT_OSS, "gpt_oss_20b/train_8gpu.yaml"],
}
"""Files that a launch line of docs/training.md gives together."""

ROWS, TOKENS, BLOCKS = 6, 96, 2


def parse(name: str, *options: str) -> tuple:
    """A recipe as recipes/train.py reads it, without a GPU: adapter, model, data, curriculum, training."""
    parser = RecipeParser(PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    files = [str(RECIPES / file) for file in TRAINING[name]]
    adapter, model, data, curriculum, training = parser.parse(["--config", *files, "--use_cpu", *options])
    return adapter, model, data, curriculum.build(training.max_steps), training


@pytest.mark.parametrize("name", TRAINING)
def test_recipes_parse_and_build_their_curriculum(name):
    adapter, model, data, curriculum, training = parse(name)
    assert curriculum.max_steps == training.max_steps
    assert (RECIPES.parent / model.trunk).is_dir() or model.trunk == "openai/gpt-oss-20b"
    documents = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    world = {"production": 8, "8gpu": 8}.get(name, 1)
    assert data.train_documents >= documents * world
    assert adapter.num_streams == data.for_streams(adapter.num_streams).document_streams == 3


def test_every_training_recipe_is_listed():
    files = {path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("*/train*.yaml")}
    assert files == {file for files in TRAINING.values() for file in files}


def test_the_published_schedule_has_both_readings():
    assert parse("production")[3].starts == (0, 234, 625, 1562)
    assert parse("production", "--max_steps", "50000")[3].starts == (0, 3750, 10000, 25000)
    assert parse("dev")[3].starts == (0, 75, 200, 500)


def test_eight_gpus_take_the_steps_of_one():
    one, eight = parse("1x80gb"), parse("8gpu")
    assert one[:4] == eight[:4]
    batches = [
        recipe[4].per_device_train_batch_size * recipe[4].gradient_accumulation_steps * processes
        for recipe, processes in ((one, 1), (eight, 8))
    ]
    assert batches[0] == batches[1] == 16


# The stages of dev are those of production without a loss.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dev", "production", "1x80gb"])
def test_every_stage_trains_its_groups_and_no_others(name, tmp_path):
    model = make_model(block_size=6)
    arguments = parse(name)[4]
    choices = {key: getattr(arguments, key) for key in ("kd_temperature", "kd_top_k", "lr_scheduler_type")}
    choices |= {"max_steps": 1, "per_device_train_batch_size": 1, "train_dataset": make_features(2)}
    for stage in parse(name)[3].stages:
        entry = {**vars(stage), "train": list(stage.train), "until": 1.0}
        before = weights(model)
        make_trainer(tmp_path / stage.name, [entry], model, **choices).train()
        after = weights(model)
        moved = {parameter_group(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == set(stage.train), stage.name


@pytest.mark.parametrize(("optim", "schedule"), [("adafactor", "inverse_sqrt"), ("sgd", "polynomial")])
def test_optimizer_and_schedule_come_from_the_arguments(optim, schedule, tmp_path):
    model = make_model(block_size=6)
    before = weights(model)
    entry = {"name": "bus", "until": 1.0, "train": ["snc", "writer"], "losses": {"lm_ce": 1.0}}
    trainer = make_trainer(tmp_path, [entry], model, optim=optim, lr_scheduler_type=schedule, max_steps=1)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__.lower() == optim
    after = weights(model)
    moved = {parameter_group(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"snc", "writer"}


def test_the_decode_recipe_parses():
    config = str(RECIPES / "gpt_oss_20b/decode.yaml")
    (arguments,) = RecipeParser(DecodeArguments).parse(["--config", config, "--prompt", "x"])
    assert arguments.model == parse("1x80gb")[4].output_dir
    assert arguments.num_streams == parse("1x80gb")[0].num_streams


# --- GPT-OSS-20B without weights ---


class ShapedRollout(Rollout):
    """A rollout of tensors without values, which could not be counted."""

    @cached_property
    def rounds(self) -> int:
        """V: rounds that any row of the batch writes."""
        return BLOCKS

    def first_reader(self, stream_ids: torch.Tensor | None = None) -> int:
        """No prompt."""
        return 0


@pytest.fixture(scope="module")
def gpt_oss() -> PDTForParallelDecoding:
    """The recipe's model on the meta device; the defaults of `GptOssConfig` are those of the 120B model."""
    adapter, arguments, *_ = parse("1x80gb")
    choices = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    with torch.device("meta"):
        trunk = GptOssForCausalLM(GptOssConfig(num_hidden_layers=24, num_local_experts=32, **choices))
        return PDTForParallelDecoding.from_trunk(trunk, adapter, **arguments.protocol)


def meta(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor of a shape, without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def test_gpt_oss_has_the_values_of_the_design(gpt_oss):
    adapter, config, generation = gpt_oss.stack.pdt_configs["default"], gpt_oss.config, gpt_oss.generation_config
    assert {parameter.device.type for parameter in gpt_oss.parameters()} == {"meta"}
    assert (gpt_oss.trunk.config.hidden_size, gpt_oss.trunk.config.num_hidden_layers) == (2880, 24)
    assert sum(p.numel() for name, p in gpt_oss.trunk.named_parameters() if "pdt_" not in name) == 20_914_757_184
    assert adapter.instrumented_layers == list(range(16, 24))
    assert (adapter.num_streams, adapter.notes_dim, adapter.notes_per_block) == (3, 2048, 4)
    assert (adapter.gate_mode, adapter.gate_init, adapter.adapter_bottleneck) == ("per_head", -2.0, 512)
    assert (adapter.num_plan_slots, adapter.plan_vocab_size, adapter.plan_dim) == (16, 65536, 256)
    assert (adapter.snc_placement, adapter.snc_init) == ("between", "trunk_space")
    assert (config.block_size, config.bus_lag, config.bus_capacity, config.commit_horizon) == (32, 1, 16, 32)
    assert (generation.max_retries, generation.retry_policy, generation.gate_scale) == (1, "refresh", 1.0)
    assert generation.agreement_threshold is None


def test_the_production_recipe_trains_the_same_network():
    production, ours = parse("production")[0], parse("1x80gb")[0]
    assert production == ours


def test_gpt_oss_has_this_many_parameters_to_train(gpt_oss):
    parameters = gpt_oss.pdt_parameters()
    assert sum(parameter.numel() for parameter in parameters.values()) == 501_879_959
    sizes = Counter()
    for name, parameter in parameters.items():
        sizes[parameter_group(name)] += parameter.numel()
    sites, width, notes = 9, 2880, 2048
    heads = gpt_oss.config.snc_heads
    reading = 2 * width * width + 2 * width * notes + width + 2 * heads
    assert sizes["snc"] == sites * reading + notes
    assert sizes["stream_adapters"] == 8 * (3 * (2 * width * 512 + 512 + width) - 2 * width)
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_gpt_oss_runs_forward_with_rollout_and_heads(gpt_oss):
    documents, adapter = ROWS // 3, gpt_oss.stack.pdt_configs["default"]
    ids = meta(ROWS, TOKENS)
    rollout = ShapedRollout(
        num_streams=3,
        block_size=32,
        capacity=16,
        write_round_RT=ids,
        read_round_RT=ids,
        lag_R1=meta(ROWS, 1),
        plan_slots_BP=meta(documents, 16),
        plan_mask_BP=meta(documents, 16, dtype=torch.bool),
        wants_coverage=True,
        wants_agreement=True,
    )
    output = gpt_oss(
        ids,
        attention_mask=ids,
        stream_ids=ids,
        rollout=rollout,
        planner_mask=meta(ROWS, TOKENS, dtype=torch.bool),
        labels=ids,
    )
    assert output.logits.shape == (ROWS, TOKENS, 201088)
    assert output.loss.requires_grad
    assert output.speculation.shape == (ROWS, BLOCKS, 4, 2048)
    assert output.coverage_logits.shape == (ROWS, BLOCKS, 16)
    assert output.agreement_logits.shape == (ROWS, BLOCKS)
    assert output.stream_logits.shape == (ROWS, 3)
    assert output.planner_logits.shape == (ROWS, 16, 65536)
    states = encode_texts(gpt_oss.stack, meta(5, 12), meta(5, 12, dtype=torch.bool))
    assert states.shape == (5, 12, 2880)
    assert gpt_oss.stack.heads.encode(states, meta(5, 12, dtype=torch.bool)).shape == (5, 4, adapter.notes_dim)


def test_gpt_oss_reads_a_ready_window(gpt_oss):
    window = meta(ROWS, 7, 2048, dtype=torch.float32)
    output = gpt_oss(meta(ROWS, 8), attention_mask=meta(ROWS, 8), stream_ids=meta(ROWS), notes=window)
    assert output.logits.shape == (ROWS, 8, 201088)


# --- launching ---


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launchers_load_as_accelerates_own_configuration(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)


def test_every_recipe_and_launcher_has_a_launch_line():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    missing = [path.name for path in LAUNCHERS if f"/{path.name} " not in text]
    missing += [file for files in TRAINING.values() for file in files if f"recipes/{file}" not in text]
    missing += [name for name in ("gpt_oss_20b/decode.yaml",) if f"recipes/{name}" not in text]
    assert not missing
