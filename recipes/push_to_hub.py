"""Publishes a trained model with its card, evaluation, provenance and check sums.

python recipes/push_to_hub.py --model build/demo/model --evaluation build/demo/evaluation.json \
    --repo_id me/pdt-tiny --include_trunk --dry-run

Without `--dry-run` the same files are uploaded, after the Hub has checked the card.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from modeling_pdt.hub_layout import upload
from trainer_pdt.parser import RecipeParser
from trainer_pdt.publishing import PublishArguments, describe_release, stage_release

ROOT = Path(__file__).resolve().parents[1]


def main(args: list[str] | None = None) -> str | None:
    """Stages, shows, uploads; returns the commit's address."""
    (arguments,) = RecipeParser(PublishArguments).parse(args)
    folder = stage_release(arguments, ROOT / "LICENSE" if arguments.license == "apache-2.0" else None)
    print(describe_release(folder, arguments.repo_id))
    if arguments.dry_run:
        print("dry run: nothing was uploaded.")
        return None
    ModelCard.load(folder / "README.md").validate()
    url = upload(
        folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    print(url)
    return url


if __name__ == "__main__":
    main()
