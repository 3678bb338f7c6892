"""No source opens a pickle, runs text as code or trusts remote code; only the converter reads tensors of pickles."""

import ast
from pathlib import Path

import pytest

from trainer_pdt.parser import load_yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("modeling_pdt", "trainer_pdt", "recipes", "hub_cards")
CONVERTER = "trainer_pdt/original/checkpoint.py"
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__"}


def unsafe(text: str, where: str):
    """Lines that do what is not allowed, with the reason."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if where != CONVERTER and PICKLES & {name.split(".")[0] for name in names}:
                yield f"{where}:{node.lineno}: pickles"
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in RUNS:
            yield f"{where}:{node.lineno}: runs text as code"
        if called == "torch.load" and (where != CONVERTER or options.get("weights_only") != "True"):
            yield f"{where}:{node.lineno}: torch.load"
        for name in ("allow_pickle", "trust_remote_code"):
            if options.get(name, "False") != "False":
                yield f"{where}:{node.lineno}: {name}"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") and options.get("Loader") != "_RecipeLoader":
            yield f"{where}:{node.lineno}: {called}"


def test_sources_are_safe():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = [line for path in files for line in unsafe(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())]
    assert found == []


def test_the_loader_of_recipes_makes_plain_values_only(tmp_path):
    (tmp_path / "recipe.yaml").write_text("value: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not a valid recipe"):
        load_yaml(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=arguments.trust)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_sees_what_is_not_allowed(text):
    assert list(unsafe(text, "recipes/some.py"))


def test_the_converter_reads_weights_only():
    assert not list(unsafe("torch.load(path, weights_only=True)", CONVERTER))
    assert list(unsafe("torch.load(path)", CONVERTER)) and list(
        unsafe("torch.load(path, weights_only=False)", CONVERTER)
    )
