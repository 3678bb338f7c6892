"""Trains a tiny trunk on the procedural worlds, first on fact cards, then on text.

python recipes/pretrain_trunk.py --config recipes/tiny/trunk.yaml
"""

import dataclasses
import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import command_line, write_json
from trainer_pdt.trunk import TrunkArguments, TrunkTrainer, trunk_config
from trainer_pdt.trunk_corpus import TrunkCollator, TrunkCorpus, train_tokenizer
from trainer_pdt.trunk_evaluation import evaluate_trunk, save_trunk


@dataclasses.dataclass
class MachineArguments:
    """
    The machine that trains.

    Args:
        threads (`int`, *optional*): CPU threads; missing = torch's choice.
    """

    threads: int | None = dataclasses.field(default=None, metadata={"help": "CPU threads; default: torch's choice."})


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
        write_json(f"{args.output_dir}/telemetry.json", self.telemetry)


def main() -> None:
    """Reads the recipe, trains, saves."""
    arguments, training, machine = RecipeParser(TrunkArguments, TrainingArguments, MachineArguments).parse()
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    set_seed(training.seed)

    tokenizer = train_tokenizer(arguments.vocab_size, training.seed)
    model = AutoModelForCausalLM.from_config(trunk_config(arguments, tokenizer))
    if arguments.model_type == "gpt_oss":
        model.set_experts_implementation(arguments.experts_implementation)
    telemetry = {
        "command": f"python {command_line()}",
        "recipe": dataclasses.asdict(arguments) | training.to_dict(),
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
