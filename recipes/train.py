"""Trains PDT adapters on a frozen trunk by stages and saves them.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train.py --config recipes/tiny/train.yaml
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import resolve_revision

from modeling_pdt import PDTAdapterConfig, PDTForParallelDecoding
from trainer_pdt import FeatureMaker, PDTDataCollator, PDTTrainer, PDTTrainingArguments
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments
from trainer_pdt.callbacks import ExpectedTimeCallback
from trainer_pdt.features import load_features
from trainer_pdt.guard import LossGuard
from trainer_pdt.loading import check_source
from trainer_pdt.parser import RecipeParser
from trainer_pdt.resume import find_checkpoint, record_run
from trainer_pdt.telemetry import to_jsonable
from trainer_pdt.training_report import write_training_report

ROOT = Path(__file__).resolve().parents[1]


def load_model(
    arguments: ModelArguments, adapter: PDTAdapterConfig
) -> tuple[PDTForParallelDecoding, PreTrainedTokenizerBase]:
    """A new model on the recipe's trunk, and the trunk's tokenizer."""
    name = str(ROOT / arguments.trunk) if (ROOT / arguments.trunk).is_dir() else arguments.trunk
    check_source("trunk", name)
    if arguments.trunk_revision is not None and Path(name).is_dir():
        raise ValueError(f"trunk_revision={arguments.trunk_revision!r}, allowed: none, the trunk {name} is a folder.")
    # All files of the trunk come from one commit, which the model remembers.
    revision = resolve_revision(name, revision=arguments.trunk_revision)
    choices: dict[str, Any] = {"dtype": arguments.trunk_dtype, "revision": revision}
    if arguments.experts_implementation is not None:
        choices["experts_implementation"] = arguments.experts_implementation
    quantization = getattr(AutoConfig.from_pretrained(name, revision=revision), "quantization_config", {})
    if quantization.get("quant_method") == "mxfp4":
        # Quantised weights have no backward.
        choices["quantization_config"] = Mxfp4Config(dequantize=True)
    trunk = AutoModelForCausalLM.from_pretrained(name, **choices)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    loaded = getattr(revision, "resolved", revision)
    return PDTForParallelDecoding.from_trunk(trunk, adapter, trunk_revision=loaded, **arguments.protocol), tokenizer


def main() -> None:
    """Parse, build, train, save."""
    parser = RecipeParser(PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    adapter, model_args, data, curriculum_args, args = parser.parse()
    data = data.for_streams(adapter.num_streams)
    if model_args.threads is not None:
        torch.set_num_threads(model_args.threads)
    set_seed(args.seed)
    curriculum = curriculum_args.build(args.max_steps)
    parts = {"adapter": adapter, "model": model_args, "data": data, "training": args.to_dict()}
    settings = to_jsonable({**parts, "processes": args.world_size, "stages": curriculum.history()})
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        checkpoint = find_checkpoint(args, settings)

    model, tokenizer = load_model(model_args, adapter)
    plants = any(stage.data != "clean" for stage in curriculum.stages)
    maker = FeatureMaker(
        tokenizer,
        model.config.num_plan_slots,
        model.config.plan_vocab_size,
        model.config.plan_hash_salt,
        corruption_rate=args.corruption_rate if plants else 0.0,
        seed=args.seed,
    )
    train_dataset, eval_dataset = load_features(data, maker, args.seed)

    trainer = PDTTrainer(
        model,
        args,
        curriculum,
        data_collator=PDTDataCollator.from_config(model.config, tokenizer, max_row_tokens=data.max_row_tokens),
        guard=LossGuard(args.skip_limit, args.spike_factor),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[ExpectedTimeCallback(curriculum)],
    )
    if trainer.is_world_process_zero():
        record_run(args, settings, checkpoint)

    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_training_report(args.output_dir)
    # A process that ends beside the threads of a process group may abort.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
