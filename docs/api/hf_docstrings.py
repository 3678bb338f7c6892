"""Docstrings in the form of transformers as Markdown: sections become lists, a bracketed name in backticks a link.

An extension of griffe, which reads the sources for the API reference and imports nothing of them.
"""

import logging
import re
from collections.abc import Mapping, Sequence

import griffe

# mkdocs counts warnings under its own logger, and `--strict` fails on them.
logger = logging.getLogger("mkdocs.plugins.hf_docstrings")

SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\n((?:(?:    .*)?\n)*(?:    .*)?)", re.MULTILINE)
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")


def as_list(section: re.Match) -> str:
    """A section as a heading and a list: an entry starts at the section's own indentation and goes on below it."""
    name, body = section.groups()
    lines = [line.removeprefix("    ") for line in body.rstrip().splitlines()]
    if name != "Returns":
        lines = [line and (f"- {line}" if not line.startswith(" ") else f"  {line.strip()}") for line in lines]
    title = {"Args": "Arguments"}.get(name, name)
    return f"**{title}**\n\n" + "\n".join(lines) + "\n"


def resolve(obj: griffe.Object, name: str, paths: Mapping[str, Sequence[str]]) -> str | None:
    """
    Full path of what a docstring calls by a name: in its own scope, else what has that name anywhere; `None` where
    several things have it.

    Raises:
        KeyError: When there is nothing of that name.
    """
    first, _, rest = name.partition(".")
    try:
        path = obj.resolve(first)
        # What only hands on to a function of the same name means the function.
        path = obj.module.resolve(first) if path == obj.path else path
        return path + (f".{rest}" if rest else "")
    except griffe.NameResolutionError:
        found = paths.get(name) or [obj.modules_collection[name].path]
        return found[0] if len(found) == 1 else None


def link(obj: griffe.Object, match: re.Match, paths: Mapping[str, Sequence[str]]) -> str:
    """A reference in HTML; plain text where no page shows what it leads to."""
    is_short, name = match.groups()
    try:
        path = resolve(obj, name, paths)
    except KeyError:
        logger.warning("%s: [`%s`] is no name", obj.path, name)
        path = None
    text = f"`{name.rsplit('.', 1)[-1] if is_short else name}`"
    return text if path is None else f'<autoref optional identifier="{path}">{text}</autoref>'


def objects(package: griffe.Object) -> list[griffe.Object]:
    """Everything that is defined in a package."""
    found = [package]
    for obj in found:
        found += [member for member in obj.members.values() if not member.is_alias]
    return found


class HFDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """All objects of the package, each once."""
        paths: dict[str, list[str]] = {}
        for package in pkg.modules_collection.members.values():
            for obj in objects(package):
                for name in {obj.name, ".".join(obj.path.split(".")[-2:])}:
                    paths.setdefault(name, []).append(obj.path)
        for obj in objects(pkg):
            if obj.docstring:
                text = SECTION.sub(as_list, obj.docstring.value + "\n")
                obj.docstring.value = LINK.sub(lambda match, obj=obj: link(obj, match, paths), text)
