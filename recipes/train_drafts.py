"""Trains heads that draft for a trunk: `python recipes/train_drafts.py --config recipes/tiny/medusa.yaml`.

The folder it leaves is what `recipes/baselines.py` takes as `--medusa_heads` or `--eagle_head`.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from trainer_pdt.baselines.training import KINDS, DraftArguments, DraftTrainer, SequentialAnswers
from trainer_pdt.loading import check_source
from trainer_pdt.parser import RecipeParser


def main(args: list[str] | None = None) -> None:
    """Reads the recipe, trains, saves."""
    arguments, training = RecipeParser(DraftArguments, TrainingArguments).parse(args)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    set_seed(training.seed)
    check_source("trunk", arguments.trunk)
    trunk = AutoModelForCausalLM.from_pretrained(arguments.trunk)
    tokenizer = AutoTokenizer.from_pretrained(arguments.trunk)
    heads = KINDS[arguments.kind].for_trunk(trunk)
    dataset = SequentialAnswers(tokenizer, arguments.documents)
    DraftTrainer(heads, training, trunk=trunk, train_dataset=dataset).train()
    heads.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
