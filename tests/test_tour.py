"""The code blocks of docs/tour, run in the order in which they are read, in one folder that starts empty."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs/tour"
PAGES = ("install", "decode", "train", "data", "publish")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a checkout holds; build/ is the tour's own.
LINKED = (
    *("Makefile", "setup.py", "constraints.txt", "LICENSE"),
    *("docs", "recipes", *("modeling_pdt", "trainer_pdt", "hub_cards")),
)


def blocks(page):
    """(language, code) of a page's blocks, in order."""
    return BLOCK.findall((TOUR / f"{page}.md").read_text(encoding="utf-8"))


def run_bash(code, folder):
    """One block in a shell of its own. `make` only says what it would do: CI's first phase is what installs."""
    words = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MAKEFLAGS": "n"}
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **words}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout that nothing was built in."""
    folder = tmp_path_factory.mktemp("tour")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_the_tour_has_five_short_pages():
    assert {path.stem for path in TOUR.glob("*.md")} == set(PAGES)
    for page in PAGES:
        text = (TOUR / f"{page}.md").read_text(encoding="utf-8")
        # 200 words a minute.
        assert len(BLOCK.sub("", text).split()) <= 400
        assert text.count("```") == 2 * len(blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"__name__": "tour"}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, f"docs/tour/{page}.md", "exec"), names)
        else:
            assert language == "bash"
            run_bash(code, folder)
