"""Builds a dataset from documents: `python recipes/build_dataset.py --config recipes/tiny/data.yaml`

A build that was stopped goes on where it was; `--dry_run` only says what the teacher would use.
"""

from datasets import disable_progress_bars

from hub_cards import template_path
from trainer_pdt.data.options import OPTIONS
from trainer_pdt.data.pipeline import DatasetBuilder
from trainer_pdt.parser import RecipeParser


def main() -> None:
    """Parse, build, say where it is."""
    disable_progress_bars()
    options = RecipeParser(*OPTIONS).parse()
    builder = DatasetBuilder(*options, card_template=template_path("dataset_card.md"))
    if builder.build.dry_run:
        for name, value in builder.estimate().items():
            print(f"{name}: {value:,}")
        return
    folder = builder.run()
    print((folder / "quality_report.md").read_text(encoding="utf-8"))
    print(f"dataset: {folder}")


if __name__ == "__main__":
    main()
