"""Converts a checkpoint of the original PDT system: `python recipes/convert_checkpoint.py --checkpoint adapters.pt \
    --output_folder build/original`

Writes its heads as safetensors and a report on every part: trained or not, kept or left out, and what does its work
here. `--trunk openai/gpt-oss-20b` also writes an untrained PDT model of the same sizes. See `docs/hub.md`.
"""

from pathlib import Path
from typing import Any

from trainer_pdt.original.conversion import TEXT_FILE, ConvertArguments, convert
from trainer_pdt.original.heads import HeadChoices
from trainer_pdt.parser import RecipeParser


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Converts, shows the report and returns it."""
    arguments, choices = RecipeParser(ConvertArguments, HeadChoices).parse(args)
    report = convert(arguments, choices)
    print((Path(arguments.output_folder) / TEXT_FILE).read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
