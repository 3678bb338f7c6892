"""Trains the tiny GPT-OSS trunk on the procedural worlds, first on fact cards, then on text.

python recipes/pretrain_trunk.py --config recipes/tiny/trunk.yaml
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GptOssForCausalLM, HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from trainer_pdt.trunk import TrunkArguments, TrunkCollator, TrunkCorpus, TrunkTrainer, train_tokenizer, trunk_config
from trainer_pdt.trunk_evaluation import evaluate_trunk, save_trunk


class EvaluateAndSave(TrainerCallback):
    """Evaluates by sampling every `eval_every` steps and at the end, and saves the trunk with its telemetry."""

    def __init__(self, arguments: TrunkArguments, tokenizer: Any, telemetry: dict[str, Any]):
        self.arguments = arguments
        self.tokenizer = tokenizer
        self.telemetry = telemetry
        self.started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Saves at every evaluation, so that an interrupted run leaves a usable trunk."""
        text_steps = state.global_step - self.arguments.card_steps
        last = state.global_step == state.max_steps
        if not last and (text_steps <= 0 or text_steps % self.arguments.eval_every):
            return
        report = evaluate_trunk(model, self.tokenizer, self.arguments.eval_documents * (4 if last else 1))
        model.train()
        seconds = round(time.monotonic() - self.started, 1)
        print(json.dumps({"step": state.global_step, "seconds": seconds, **report}), flush=True)
        self.telemetry["evaluations"].append({"step": state.global_step, "seconds": seconds, **report})
        keys = ("step", "loss", "repeat_loss", "grad_norm", "learning_rate")
        self.telemetry["losses"] = [{key: row[key] for key in keys if key in row} for row in state.log_history]
        save_trunk(model, self.tokenizer, args.output_dir)
        Path(args.output_dir, "telemetry.json").write_text(json.dumps(self.telemetry, indent=1) + "\n")


def main() -> None:
    """Reads the recipe, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML with the fields of TrunkArguments and TrainingArguments")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields that replace the YAML's")
    options = parser.parse_args()
    fields = yaml.safe_load(Path(options.config).read_text())
    fields |= {name: yaml.safe_load(value) for name, value in (entry.split("=", 1) for entry in options.set)}
    threads = fields.pop("threads", None)
    if threads is not None:
        torch.set_num_threads(threads)
    arguments, training = HfArgumentParser((TrunkArguments, TrainingArguments)).parse_dict(fields)
    set_seed(training.seed)

    tokenizer = train_tokenizer(arguments.vocab_size, training.seed)
    model = GptOssForCausalLM(trunk_config(arguments, tokenizer))
    model.set_experts_implementation(arguments.experts_implementation)
    telemetry = {
        "command": ["python", *sys.argv],
        "recipe": fields,
        "parameters": model.num_parameters(),
        "evaluations": [],
        "losses": [],
    }
    trainer = TrunkTrainer(
        model=model,
        args=training,
        train_dataset=TrunkCorpus(tokenizer, arguments, training.seed),
        data_collator=TrunkCollator(tokenizer.pad_token_id),
        repeat_weight=arguments.repeat_weight,
        callbacks=[EvaluateAndSave(arguments, tokenizer, telemetry)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
