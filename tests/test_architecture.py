"""Import directions, flatness and sizes of design.md section 2. Reads the source with `ast`, imports nothing of it.

Lengths: a file's lines; a function's lines without its docstring, since docstrings with shapes are wanted.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL, TRAINER, DATA = "modeling_pdt", "trainer_pdt", "trainer_pdt.data"
MODEL_THIRD_PARTY = {"torch", "transformers", "peft", "huggingface_hub"}
DATA_THIRD_PARTY = {"datasets", "huggingface_hub"}
TRAINER_THIRD_PARTY = MODEL_THIRD_PARTY | {
    *("accelerate", "bert_score", "datasets", "deepspeed", "evaluate", "jinja2", "matplotlib", "numpy", "rich"),
    *("safetensors", "tokenizers", "tqdm", "yaml"),
}
MAX_FILE, MAX_FUNCTION, MAX_LONG_FUNCTION, MAX_RECIPE = 400, 60, 80, 120
SPACE, SPACE_IMPORTS = (
    "hub_cards.space",
    {"gradio", "huggingface_hub", "jinja2", "pdt_space", "torch", "transformers", MODEL, TRAINER},
)
# The two loops that read better in one piece.
LONG_FUNCTIONS = {"parallel_decode", "compute_loss"}
LONG_RECIPES = {"demo.py": 160, "evaluate.py": 160}
# What transformers takes for a relative import when it copies remote code, docstrings included.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)


@cache
def parse(text):
    """The tree of a source; several checks read the same files."""
    return ast.parse(text)


def sources(root, package):
    """Map dotted module name -> (path, tree) of the files of `package` that exist."""
    found = {}
    for path in sorted((root / package.replace(".", "/")).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (path, parse(path.read_text(encoding="utf-8")))
    return found


def imports_of(module, path, tree):
    """Yield (line, absolute dotted target, imported names, written level) of every import, functions included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, [], 0
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, target, [alias.name for alias in node.names], node.level


def inside(target, package):
    """Whether the dotted name `target` is `package` or lies in it."""
    return target == package or target.startswith(package + ".")


def is_standard(target):
    """Whether `target` belongs to the standard library."""
    return target.split(".")[0] in sys.stdlib_module_names


def model_problems(root):
    """`modeling_pdt` is flat, imports four libraries, and its own modules only as `from .module import name`."""
    for module, (path, tree) in sources(root, MODEL).items():
        where = path.relative_to(root)
        if path.parent != root / MODEL:
            yield f"{where}: modeling_pdt is flat, no sub-folders"
        written = 0
        for line, target, names, level in imports_of(module, path, tree):
            if level:
                written += 1
                if level != 1 or target.count(".") != 1 or "*" in names:
                    yield f"{where}:{line}: only `from .module import name` inside modeling_pdt"
            elif not is_standard(target) and target.split(".")[0] not in MODEL_THIRD_PARTY:
                yield f"{where}:{line}: modeling_pdt may not import {target}"
        if len(RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8"))) != written:
            yield f"{where}: text that looks like a relative import (a docstring?), or two imports on one line"


def trainer_problems(root):
    """`trainer_pdt` sees the model, `trainer_pdt.data` only itself; neither sees recipes or tests."""
    for module, (path, tree) in sources(root, TRAINER).items():
        is_data = inside(module, DATA)
        own = (DATA,) if is_data else (TRAINER, MODEL, "hub_cards")
        libraries = DATA_THIRD_PARTY if is_data else TRAINER_THIRD_PARTY
        for line, target, names, level in imports_of(module, path, tree):
            where = f"{path.relative_to(root)}:{line}"
            targets = [f"{target}.{name}" for name in names] if target == TRAINER and is_data else [target]
            for one in targets:
                allowed = any(inside(one, package) for package in own)
                if not (allowed or is_standard(one) or (not level and one.split(".")[0] in libraries)):
                    yield f"{where}: {module} may not import {one}"
            if "*" in names:
                yield f"{where}: no star imports"


def card_problems(root):
    """`hub_cards` holds templates and imports the standard library only; the Space is a program on both packages."""
    for module, (path, tree) in sources(root, "hub_cards").items():
        allowed = SPACE_IMPORTS if inside(module, SPACE) else set()
        for line, target, _, level in imports_of(module, path, tree):
            if not level and not is_standard(target) and target.split(".")[0] not in allowed:
                yield f"{path.relative_to(root)}:{line}: hub_cards may not import {target}"


def import_graph(root):
    """Module -> modules of the two packages that it imports; `from package import module` counts as the module."""
    modules = {**sources(root, MODEL), **sources(root, TRAINER)}
    graph = {}
    for module, (path, tree) in modules.items():
        edges = set()
        for _, target, names, _ in imports_of(module, path, tree):
            deeper = {f"{target}.{name}" for name in names} & modules.keys()
            edges |= deeper
            if target in modules and len(deeper) < max(1, len(names)):
                edges.add(target)
        graph[module] = edges - {module}
    return graph


def cycle_problems(root):
    """No import cycle: peel modules whose imports are all peeled; what remains is in or above a cycle."""
    graph = import_graph(root)
    while True:
        ready = {module for module, edges in graph.items() if not edges & graph.keys()}
        if not ready:
            break
        graph = {module: edges for module, edges in graph.items() if module not in ready}
    if graph:
        yield f"import cycle among or below: {', '.join(sorted(graph))}"


def code_lines(node):
    """Lines of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def size_problems(root):
    """Files and functions stay small, recipes smaller."""
    for package in (MODEL, TRAINER, "hub_cards", "recipes"):
        for path, tree in sources(root, package).values():
            where, lines = path.relative_to(root), len(path.read_text(encoding="utf-8").splitlines())
            limit = LONG_RECIPES.get(path.name, MAX_RECIPE) if package == "recipes" else MAX_FILE
            if lines > limit:
                yield f"{where}: {lines} lines > {limit}"
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    limit = MAX_LONG_FUNCTION if node.name in LONG_FUNCTIONS else MAX_FUNCTION
                    if code_lines(node) > limit:
                        yield f"{where}:{node.lineno}: {node.name} has {code_lines(node)} lines > {limit}"


def docstring_problems(root):
    """Modules, public classes and public functions of the two packages say what they are for."""
    for package in (MODEL, TRAINER):
        for path, tree in sources(root, package).values():
            nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            for node in [tree, *(node for node in nodes if not node.name.startswith("_"))]:
                if not ast.get_docstring(node):
                    yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}: docstring missing"


def stub_problems(root):
    """No left-over stubs."""
    for package in (MODEL, TRAINER, "hub_cards", "recipes"):
        for path, _ in sources(root, package).values():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.search(r"\b(TODO|FIXME|XXX)\b", line):
                    yield f"{path.relative_to(root)}:{number}: {line.strip()}"


CHECKS = [
    *(model_problems, trainer_problems, card_problems, cycle_problems),
    *(size_problems, docstring_problems, stub_problems),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_architecture(check):
    problems = list(check(ROOT))
    assert not problems, "\n" + "\n".join(problems)


BAD_TREE = [
    (model_problems, "modeling_pdt/sub/a.py", '"""M."""\n', "flat"),
    (model_problems, "modeling_pdt/a.py", '"""M."""\nfrom . import b\n', "from .module import name"),
    (model_problems, "modeling_pdt/a.py", '"""M."""\nfrom modeling_pdt.b import c\n', "may not import modeling_pdt.b"),
    (model_problems, "modeling_pdt/a.py", '"""M."""\ndef f():\n    import numpy\n', "may not import numpy"),
    (model_problems, "modeling_pdt/a.py", '"""M.\n\n    from .b import c\n"""\n', "looks like a relative import"),
    (trainer_problems, "trainer_pdt/a.py", '"""M."""\nimport recipes.demo\n', "may not import recipes.demo"),
    (trainer_problems, "trainer_pdt/data/a.py", '"""M."""\nimport torch\n', "may not import torch"),
    (
        trainer_problems,
        "trainer_pdt/data/a.py",
        '"""M."""\nfrom ..render import x\n',
        "may not import trainer_pdt.render",
    ),
    (
        trainer_problems,
        "trainer_pdt/data/a.py",
        '"""M."""\nfrom .. import render\n',
        "may not import trainer_pdt.render",
    ),
    (card_problems, "hub_cards/a.py", "import yaml\n", "may not import yaml"),
    (card_problems, "hub_cards/space/a.py", "import recipes.demo\n", "may not import recipes.demo"),
    (size_problems, "trainer_pdt/a.py", "x = 1\n" * 401, "401 lines > 400"),
    (size_problems, "recipes/a.py", "x = 1\n" * 121, "121 lines > 120"),
    (size_problems, "modeling_pdt/a.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines > 60"),
    (docstring_problems, "trainer_pdt/a.py", '"""M."""\ndef f():\n    pass\n', "docstring missing"),
    (stub_problems, "trainer_pdt/a.py", "x = 1  # TODO later\n", "TODO later"),
]


@pytest.mark.parametrize(("check", "path", "text", "message"), BAD_TREE)
def test_checks_report_bad_trees(tmp_path, check, path, text, message):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    assert any(message in problem for problem in check(tmp_path))


def test_cycles_are_found_and_chains_are_not(tmp_path):
    (tmp_path / "modeling_pdt").mkdir()
    (tmp_path / "modeling_pdt/a.py").write_text("from .b import x\n", encoding="utf-8")
    (tmp_path / "modeling_pdt/b.py").write_text("x = 1\n", encoding="utf-8")
    assert not list(cycle_problems(tmp_path))
    (tmp_path / "modeling_pdt/b.py").write_text("from .a import x\n", encoding="utf-8")
    assert "modeling_pdt.a, modeling_pdt.b" in next(cycle_problems(tmp_path))


def test_good_imports_pass(tmp_path):
    good = {
        "modeling_pdt/a.py": '"""M."""\nimport math\n\nimport torch.nn\nfrom .b import (\n    x,\n)\n',
        "modeling_pdt/b.py": '"""M."""\nx = 1\n',
        "trainer_pdt/a.py": '"""M."""\nfrom modeling_pdt import PDTConfig\nfrom trainer_pdt.data import schema\n',
        "trainer_pdt/data/__init__.py": '"""M."""\nfrom .schema import Note\n',
        "trainer_pdt/data/schema.py": '"""M."""\nfrom datasets import List\n\nfrom . import other\n',
        "trainer_pdt/data/other.py": '"""M."""\nimport json\n',
    }
    for path, text in good.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert [problem for check in CHECKS for problem in check(tmp_path)] == []
