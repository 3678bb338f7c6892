"""A Space, staged as files: the page, the two packages that it runs on, its requirements and its card."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCard, SpaceCardData

from hub_cards import template_path

from .evaluation.values import part
from .publishing import measured
from .telemetry import read_json

# What a Space holds beside its card: folder of the repository, place in the Space.
PARTS = (("hub_cards/space", "."), ("modeling_pdt", "modeling_pdt"), ("trainer_pdt", "trainer_pdt"))
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class SpaceArguments:
    """
    What the Space shows, and where it is published.

    Tokens are no option; see [`PublishArguments`].

    Args:
        model (`str`): Repository of the Hub whose model is there at the start.
        repo_id (`str`): The Space, made if missing.
        evaluation (`str`, *optional*): `evaluation.json` of the model; missing = a card without figures.
        title (`str`): Of the Space.
        staging_folder (`str`): The Space is made here, in a folder named as the repository; emptied first.
        dry_run (`bool`): Show every file and the card; upload nothing.
        private (`bool`, *optional*): Visibility of a new Space; missing = the owner's default.
        license (`str`): Identifier of the licence.
    """

    model: str = field(metadata={"help": "Repository of the Hub whose model is there at the start."})
    repo_id: str = field(metadata={"help": "The Space, made if missing."})
    evaluation: str | None = field(default=None, metadata={"help": "evaluation.json of the model."})
    title: str = field(default="Parallel Decoder Transformer", metadata={"help": "Of the Space."})
    staging_folder: str = field(default="build/space", metadata={"help": "The Space is made here."})
    dry_run: bool = field(default=False, metadata={"help": "Show files and card; upload nothing."})
    private: bool | None = field(default=None, metadata={"help": "Visibility of a new Space."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the Space."})

    def __post_init__(self) -> None:
        for name in ("model", "repo_id"):
            if not REPOSITORY.fullmatch(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: owner/name.")

    @property
    def folder(self) -> Path:
        """Where this Space is staged."""
        return Path(self.staging_folder) / self.repo_id.replace("/", "--")


def stage_space(arguments: SpaceArguments, root: Path) -> Path:
    """
    Makes the Space's folder.

    Args:
        arguments ([`SpaceArguments`]): What to publish.
        root (`Path`): Checkout of this repository.

    Returns:
        `Path`: The folder, ready for [`upload_space`].
    """
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    for source, place in PARTS:
        shutil.copytree(root / source, folder / place, ignore=LEFT_OUT, dirs_exist_ok=True)
    shutil.copyfile(root / "LICENSE", folder / "LICENSE")
    evaluation = {} if arguments.evaluation is None else read_json(arguments.evaluation)
    write_card(folder / "README.md", arguments, evaluation, pinned("gradio", root / "constraints.txt"))
    return folder


def write_card(path: Path, arguments: SpaceArguments, evaluation: Mapping[str, Any], sdk_version: str) -> SpaceCard:
    """Fills the card's template from the telemetry and reads it back."""
    card = SpaceCard.from_template(
        SpaceCardData(),
        template_path=template_path("space_card.md"),
        model=arguments.model,
        title=arguments.title,
        license=arguments.license,
        sdk_version=sdk_version,
        metrics=[{"name": title, **numbers} for _, title, numbers in measured(evaluation)],
        temperature=part(evaluation, "settings").get("temperature"),
    )
    card.save(path)
    read = SpaceCard.load(path)
    if (read.data.sdk, read.data.models) != ("gradio", [arguments.model]):
        raise ValueError(f"the card's metadata are {read.data.to_dict()}, allowed: sdk gradio, {arguments.model!r}.")
    return read


def pinned(package: str, constraints: Path) -> str:
    """The version of a package in `constraints.txt`."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{constraints} has no line {package}==VERSION.")
    return found.group(1)


def upload_space(folder: Path, arguments: SpaceArguments) -> str:
    """Has the Hub check the card, makes the Space and uploads the folder; returns the commit's address."""
    SpaceCard.load(folder / "README.md").validate()
    api = HfApi()
    repo = api.create_repo(
        arguments.repo_id, repo_type="space", space_sdk="gradio", private=arguments.private, exist_ok=True
    )
    message = "Publish the Space"
    return str(api.upload_folder(repo_id=repo.repo_id, repo_type="space", folder_path=folder, commit_message=message))
