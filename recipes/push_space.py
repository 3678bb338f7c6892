"""Publishes the Space of a published model: the page, the packages that it runs on and its card.

python recipes/push_space.py --model me/pdt-tiny --repo_id me/pdt-demo --evaluation build/demo/evaluation.json \
    --dry-run

Without `--dry-run` the same files are uploaded, after the Hub has checked the card.
"""

from pathlib import Path

from trainer_pdt.parser import RecipeParser
from trainer_pdt.publishing import describe_release
from trainer_pdt.space import SpaceArguments, stage_space, upload_space

ROOT = Path(__file__).resolve().parents[1]


def main(args: list[str] | None = None) -> str | None:
    """Stages, shows, uploads; returns the commit's address."""
    (arguments,) = RecipeParser(SpaceArguments).parse(args)
    folder = stage_space(arguments, ROOT)
    print(describe_release(folder, arguments.repo_id))
    if arguments.dry_run:
        print("dry run: nothing was uploaded.")
        return None
    url = upload_space(folder, arguments)
    print(url)
    return url


if __name__ == "__main__":
    main()
