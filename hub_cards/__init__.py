"""Jinja templates of the Hub cards, shipped as package data."""

from pathlib import Path

TEMPLATES = ("model_card.md", "dataset_card.md", "space_card.md")


def template_path(name: str) -> Path:
    """Return the path of a template.

    Args:
        name (`str`): One of `TEMPLATES`.

    Returns:
        `Path`: Usable as `template_path` of `huggingface_hub.ModelCard.from_template`.
    """
    if name not in TEMPLATES:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(TEMPLATES)}")
    return Path(__file__).resolve().parent / name
