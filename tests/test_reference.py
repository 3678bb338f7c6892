"""docs/api and mkdocs.yml: every public name is on a page of the reference, and every page named exists."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    name: page.name
    for page in sorted((ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def file_of(module):
    """Source of a dotted module name, or `None`."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def homes(package):
    """Name -> module that defines it, for all that a package exports."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}


@pytest.mark.parametrize("package", ["modeling_pdt", "trainer_pdt"])
def test_everything_exported_is_on_a_page(package):
    exported = homes(package)
    assert len(exported) > 3
    assert not [name for name, home in exported.items() if not {f"{package}.{name}", home} & NAMES.keys()]


def test_pages_name_what_exists():
    for name, page in NAMES.items():
        package, _, last = name.rpartition(".")
        assert file_of(name) or last in homes(package.split(".")[0]), f"{page}: {name}"


def test_the_site_needs_no_network_and_finds_its_pages():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False and "extra_javascript" not in site and "extra_css" not in site
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"[\w/]+\.md\b", text)
    assert len(pages) > 20 and not [page for page in pages if not (ROOT / "docs" / page).is_file()]
    assert {f"api/{page}" for page in NAMES.values()} <= set(pages)
