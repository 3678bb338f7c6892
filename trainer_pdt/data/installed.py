"""Real documents with sections that every Python environment holds: what its packages and the interpreter ship.

In this order: long descriptions of installed distributions, the interpreter's reference topics, documentation files of
packages, and docstrings with underlined headings. Nothing is imported from the packages. Standard library only.
"""

import ast
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import Distribution, distributions
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from .markup import split_sections
from .teachers import SourceDocument

INSTALLED_VERSION = 1
"""Raised when other documents are found in the same environment."""

DOMAIN = "documentation"
MAX_CHARACTERS = 1_000_000
_FILES = (".md", ".rst")
_SKIPPED = ("dist-info", "license", "licence", "copying", "template")
_HEADED = re.compile(r"^\s*(?:-{3,}|={3,}|~{3,})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class InstalledSource:
    """
    The documents of this environment; with other packages they are others.

    Args:
        limit (`int`, *optional*): Most documents; missing = all.
        split (`str`, *optional*): Split that the documents go to; drawn when missing.
    """

    limit: int | None = None
    split: str | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        """The fields, the interpreter's version and those of all packages."""
        packages = {name: item.version for name, item in _installed()}
        return {
            **asdict(self),
            "version": INSTALLED_VERSION,
            "python": platform.python_version(),
            "packages": packages,
        }

    def rows(self, max_bytes: int, cache: Path) -> Iterator[SourceDocument]:
        """The documents."""
        return (replace(document, split=self.split) for document in installed_documents(self.limit))


def installed_documents(limit: int | None = None) -> Iterator[SourceDocument]:
    """
    Documents with at least two sections, in an order that depends on what is installed only.

    Args:
        limit (`int`, *optional*): Most documents; missing = all.
    """
    return islice(_unique(), limit)


def _unique() -> Iterator[SourceDocument]:
    seen: set[str] = set()
    for kind in (_descriptions, _topics, _files, _docstrings):
        for name, text in kind():
            document_id = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
            if document_id in seen or len(text) > MAX_CHARACTERS:
                continue
            title, sections = split_sections(text)
            if len(sections) >= 2:
                seen.add(document_id)
                title = title or name.split("/")[-1]
                yield SourceDocument(document_id, DOMAIN, title, sections, provenance=name)


def _installed() -> list[tuple[str, Distribution]]:
    found = {(item.metadata["Name"] or "").lower(): item for item in distributions()}
    return sorted((name, item) for name, item in found.items() if name)


def _descriptions() -> Iterator[tuple[str, str]]:
    for name, item in _installed():
        text = item.metadata.get_payload() or item.metadata.get("Description") or ""
        yield f"package/{name}", str(text)


def _topics() -> Iterator[tuple[str, str]]:
    for name, text in sorted(topics.items()):
        yield f"python/{name}", text


def _paths(keep: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """(name within the environment, path) of installed files that `keep` takes by their lower-case name."""
    for _, item in _installed():
        for file in sorted(item.files or (), key=str):
            if keep(str(file).lower()):
                path = Path(str(item.locate_file(file)))
                if path.is_file() and path.stat().st_size <= MAX_CHARACTERS:
                    yield str(file), path


def _files() -> Iterator[tuple[str, str]]:
    for name, path in _paths(lambda name: name.endswith(_FILES) and not any(word in name for word in _SKIPPED)):
        yield f"file/{name}", path.read_text(encoding="utf-8", errors="ignore")


def _docstrings() -> Iterator[tuple[str, str]]:
    for name, path in _paths(lambda name: name.endswith(".py") and "test" not in name):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(_HEADED.findall(source)) < 2:
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(_HEADED.findall(text)) >= 2:
                    yield f"docstring/{name}/{getattr(node, 'name', 'module')}", text
