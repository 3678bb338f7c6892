"""The list of the proof: its pieces, their order and marks, and the report of what is there."""

import gzip
import re
from pathlib import Path

import pytest
import yaml

from modeling_pdt import PDTAdapterConfig
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments, PDTTrainingArguments
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.pooled import Pooled
from trainer_pdt.evaluation.proof import Entry, ProofArguments, expected_minutes, next_pieces, plan_pieces
from trainer_pdt.evaluation.proof_bars import check_proof
from trainer_pdt.evaluation.proof_report import write_proof_report
from trainer_pdt.evaluation.records import restore_records
from trainer_pdt.parser import RecipeParser, load_yaml
from trainer_pdt.runs import EVALUATE, TRAIN, TRUNK
from trainer_pdt.telemetry import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]
STAGES = [{"name": "bus", "until": 4, "train": ["snc"], "losses": {"lm_ce": 1.0}}]
LIST = {
    "trunk": {"kind": "trunk", "says": "a trunk", "recipe": "trunk.yaml", "minutes": 30},
    "full": {"kind": "train", "says": "trained", "recipe": "train.yaml", "seeds": [1, 2], "minutes": 40,
             "options": {"threads": 2}},
    "full_seen": {"kind": "evaluate", "says": "measured", "of": "full", "minutes": 20, "options": {"threads": 2}},
    "other": {"kind": "train", "says": "on the trunk", "recipe": "train.yaml", "of": "trunk", "minutes": 10},
    "other_seen": {"kind": "evaluate", "says": "on the trunk", "of": "other", "minutes": 20},
    "less": {"kind": "ablate", "says": "one less", "recipe": "less.yaml", "minutes": 5},
    "less_seen": {"kind": "evaluate", "says": "one less", "of": "less", "minutes": 1},
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A repository with the recipes of the list."""
    (tmp_path / "trunk.yaml").write_text("max_steps: 3\n")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"trunk": "shipped", "stages": STAGES, "max_steps": 4}))
    cases = {"base": {"says": "as it is"}, "without_x": {"says": "x", "options": {"lr": 1}}}
    (tmp_path / "less.yaml").write_text(
        yaml.safe_dump({"recipe": "train.yaml", "cases": cases, "options": {"threads": 1}})
    )
    return tmp_path


def make(entries=None, **changes):
    return ProofArguments(**{"entries": entries or LIST, "main": "full_seen", "report": "docs/worlds.md", **changes})


def every(pieces):
    return [run for runs in pieces.values() for run in runs]


def finish(run, **values):
    write_json(run.folder / "result.json", {"settings": run.mark, "seconds": 90.0, "git": [], **values})
    (run.model / "adapter").mkdir(parents=True, exist_ok=True)
    (run.model / "adapter/adapter_model.safetensors").touch()


def names(runs):
    return [f"{run.case}/{run.seed}" for run in runs]


def test_pieces_are_the_seeds_and_cases_of_every_entry(root):
    pieces = plan_pieces(make(), root)
    assert {name: names(runs) for name, runs in pieces.items()} == {
        "trunk": ["trunk/1"],
        "full": ["full/1", "full/2"],
        "full_seen": ["full_seen/1", "full_seen/2"],
        "other": ["other/1"],
        "other_seen": ["other_seen/1"],
        "less": ["base/1", "base/2", "without_x/1", "without_x/2"],
        "less_seen": ["less_seen/base/1", "less_seen/base/2", "less_seen/without_x/1", "less_seen/without_x/2"],
    }
    assert len({run.folder for run in every(pieces)}) == 15
    scripts = [runs[0].script for runs in pieces.values()]
    assert scripts == [TRUNK, TRAIN, EVALUATE, TRAIN, EVALUATE, TRAIN, EVALUATE]
    seen, other = pieces["full_seen"][1].recipe, pieces["other"][0].recipe
    assert seen["model"] == "build/proof/full/seed_2/model" and seen["output_folder"] == "build/proof/full_seen/seed_2"
    assert seen["training_report"] == "build/proof/full/seed_2/model/training_report.json" and seen["resume"] is True
    assert other["trunk"] == "build/proof/trunk/seed_1/model" and pieces["full"][0].recipe["trunk"] == "shipped"
    assert [run.minutes for run in pieces["less"]] == [5] * 4


def test_a_change_repeats_what_it_concerns_and_what_uses_that(root):
    before = {f"{run.case}/{run.seed}": run.mark for run in every(plan_pieces(make(), root))}
    (root / "trunk.yaml").write_text("max_steps: 5\n")
    after = {f"{run.case}/{run.seed}": run.mark for run in every(plan_pieces(make(), root))}
    assert [name for name in before if before[name] != after[name]] == ["trunk/1", "other/1", "other_seen/1"]
    moved = {f"{run.case}/{run.seed}": run.mark for run in every(plan_pieces(make(output="elsewhere"), root))}
    assert moved == after


def test_other_weights_of_the_trunk_repeat_what_starts_from_them(root):
    before = {f"{run.case}/{run.seed}": run.mark for run in every(plan_pieces(make(), root))}
    (root / "shipped").mkdir()
    (root / "shipped/model.safetensors").write_bytes(b"weights")
    after = {f"{run.case}/{run.seed}": run.mark for run in every(plan_pieces(make(), root))}
    assert [name for name in before if before[name] == after[name]] == ["trunk/1", "other/1", "other_seen/1"]


@pytest.mark.slow
def test_the_committed_report_is_what_its_records_say(tmp_path):
    (arguments,) = RecipeParser(ProofArguments).parse_values(
        {**load_yaml(ROOT / "recipes/tiny/proof.yaml"), "output": str(tmp_path)}
    )
    pieces = plan_pieces(arguments, ROOT)
    records = (ROOT / arguments.report).with_suffix("") / "pieces"
    restored = restore_records(every(pieces), tmp_path, records)
    assert len(restored) == len(list(records.rglob("*.json.gz"))), "a record is of other settings than the recipes'"
    evaluated = [run for run in pieces[arguments.main] if run in restored]
    reports = [read_json(run.folder / "evaluation.json") for run in evaluated]
    pooled = Pooled(reports, [read_json(run.folder / "documents.json") for run in evaluated], draws=2)
    committed = {row["name"]: row["seeds"] for row in read_json(records.parent / "proof.json")["bars"]}
    found = {row["name"]: row["seeds"] for row in check_proof(pooled)}
    assert len(found) > 20 and found == {name: pytest.approx(seeds) for name, seeds in committed.items()}


def test_records_name_no_place_of_a_machine():
    for path in (ROOT / "docs/benchmarks/worlds/pieces").rglob("*.json.gz"):
        found = re.search(r"/(?:tmp|home|root|work|Users)/\S*", gzip.decompress(path.read_bytes()).decode())
        assert found is None, f"{path.name}: {found}"


def test_what_starts_has_its_models_and_fits_into_the_cores(root):
    runs = every(plan_pieces(make(), root))
    by_name = dict(zip(names(runs), runs, strict=True))
    assert names(next_pieces(runs, [], 2, None, [])) == ["trunk/1", "base/1"]
    assert names(next_pieces(runs, [by_name["trunk/1"]], 2, None, [])) == ["base/1"]
    assert names(next_pieces(runs, [], 4, None, [])) == ["trunk/1", "full/1", "base/1"]
    # Two threads do not fit beside another piece; where one core is all there is, they go alone.
    assert names(next_pieces(runs, [by_name["base/1"]], 2, None, [])) == ["trunk/1"]
    assert names(next_pieces(runs, [], 1, None, [by_name["trunk/1"]])) == ["full/1"]
    assert next_pieces(runs, [by_name["full/1"]], 1, None, []) == []
    for name in ("trunk/1", "full/1", "base/1", "base/2", "without_x/1", "without_x/2"):
        finish(by_name[name])
    assert names(next_pieces(runs, [], 2, None, [])) == ["full/2"]
    assert names(next_pieces(runs, [by_name["full/2"]], 4, None, [])) == ["full_seen/1"]
    tried = [by_name["full/2"], by_name["full_seen/1"]]
    assert names(next_pieces(runs, [], 2, None, tried)) == ["other/1", "less_seen/base/1"]
    for run in runs:
        finish(run)
    assert next_pieces(runs, [], 2, None, []) == []


def test_no_piece_starts_that_would_take_longer_than_is_left(root):
    runs = every(plan_pieces(make(), root))
    assert names(next_pieces(runs, [], 4, 20.0, [])) == ["base/1", "base/2", "without_x/1", "without_x/2"]
    assert next_pieces(runs, [], 4, 1.0, []) == []
    assert expected_minutes(runs, 2) == pytest.approx(15 + 80 + 40 + 5 + 10 + 10 + 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("full", {"kind": "tain"}, "did you mean 'train'"),
        ("full", {"minutes": 151}, "minutes=151, allowed: a number above 0.0 and at most 150"),
        ("full", {"recipe": None}, "recipe is missing"),
        ("full_seen", {"of": None}, "of is missing"),
        ("full_seen", {"of": "trunk"}, "entries.full_seen.of: 'trunk' is unknown"),
        ("full_seen", {"seeds": [1]}, "they are those of what it uses"),
        ("other", {"of": "full"}, "entries.other.of: 'full' is unknown"),
        ("full", {"seeds": [-1]}, "seeds=-1"),
        ("full", {"sees": 1}, "did you mean"),
    ],
)
def test_entries_are_checked(name, changes, message):
    with pytest.raises(ValueError, match=message):
        make({**LIST, name: {**LIST[name], **changes}})


def test_the_main_entry_is_an_evaluation_of_trainings():
    for main in ("full", "less_seen", "nothing"):
        with pytest.raises(ValueError, match="main: "):
            make(main=main)
    with pytest.raises(ValueError, match="lacks says"):
        Entry.from_mapping("x", {"kind": "trunk", "minutes": 1}, {})


def evaluated(run, hits):
    """An evaluation, and the training behind it, as far as they are read."""
    clusters = {"sibling_fact_recall/pdt": [(hits, 4)] * 10, "curves/bus_lag/1/pdt": [(hits, 4)] * 10}
    rate = {"mean": hits / 4, "low": 0.1, "high": 0.9, "n": 40}
    report = {"sibling_fact_recall": {"pdt": rate}, "curves": {"bus_lag": {"1": {"pdt": rate}}}}
    write_json(run.folder / "evaluation.json", report)
    write_json(run.folder / "documents.json", clusters)
    logs = [{"step": step, "eval_sibling_value_accuracy": step / 100} for step in (10, 20)]
    write_json(run.after[0].model / "training_report.json", {"logs": logs, "step": 20, "seconds": 9.0})
    finish(run)


def test_the_report_is_of_what_is_there(root):
    arguments = make()
    pieces = plan_pieces(arguments, root)
    assert write_proof_report(arguments, pieces, root, "recipes/proof.py") is None and not (root / "docs").exists()
    evaluated(pieces["full_seen"][0], 3)
    path = write_proof_report(arguments, pieces, root, "recipes/proof.py")
    text = path.read_text(encoding="utf-8")
    assert "1 of 2 seeds are evaluated; 0 of 31 bars are met, 30 not measured." in text
    assert "| recall, feasible, all types | >= 0.9 | 0.750 (0.750 to 0.750) | 40 | 0.750 | missed |" in text
    assert "| coverage recall | >= 0.97 |  |  |  | not measured |" in text
    assert "Recipes and trunks" not in text and "Ablations" not in text
    assert (
        "| full_seen | evaluate | measured | 1 of 2 | 2 |  |" in text
        and "| trunk | trunk | a trunk | 0 of 1 |  |  |" in text
    )
    assert {found.name for found in (root / "docs/worlds").iterdir()} == {
        *("proof.json", "recall.png", "factors.png", "learning.png"),
    }
    assert all(f"(worlds/{name}.png)" in text for name in ("recall", "factors", "learning"))

    evaluated(pieces["full_seen"][1], 4)
    evaluated(pieces["other_seen"][0], 2)
    for case, value in (("base", 0.5), ("without_x", 0.25)):
        for run in pieces["less"]:
            if run.case == case:
                git = [{"sha": letter * 40, "dirty": case == "base"} for letter in "ba"]
                finish(run, seconds_per_step=0.5, measures={"sibling_value_accuracy": value}, git=git)
        for run in pieces["less_seen"]:
            if run.case == f"less_seen/{case}":
                evaluated(run, 4 * value)
    text = write_proof_report(arguments, pieces, root, "recipes/proof.py").read_text(encoding="utf-8")
    assert "| 0.875 (0.750 to 1.000) | 80 | 0.750 | 1.000 | missed |" in text
    assert "| measure | measured (2 seeds) | on the trunk (1 seed) |" in text
    assert "| recall, all types | 0.875 (0.750 to 1.000) | 0.500 (0.500 to 0.500) |" in text
    assert "| without_x | base | **-0.250** |" in text
    assert "## Differences, free-running" in text and text.count("| without_x | base | **-0.250** |") == 2
    assert "| without_x | 0.250 (0.250, 0.250) |" in text and "references of a run: recall, core 40 to 40;" in text
    assert "Not complete" not in text
    assert "| less | ablate | one less | 4 of 4 | 6 | aaaaaaa, aaaaaaa changed, bbbbbbb, bbbbbbb changed |" in text
    assert "| full_seen | evaluate | measured | 2 of 2 | 3 |  |" in text
    assert "python recipes/evaluate.py --config build/proof/full_seen/seed_1/recipe.yaml" in text
    data = read_json(root / "docs/worlds/proof.json")
    assert data["pooled"]["sibling_fact_recall"]["pdt"]["n"] == 80
    assert [bar["met"] for bar in data["bars"]] == [False, *[None] * 30]


@pytest.mark.parametrize(("case", "seed"), [("without_x", 2), ("base", 1)])
def test_the_report_names_ablations_that_are_not_complete(root, case, seed):
    arguments = make()
    pieces = plan_pieces(arguments, root)
    evaluated(pieces["full_seen"][0], 3)
    for run, seen in zip(pieces["less"], pieces["less_seen"], strict=True):
        if (run.case, run.seed) != (case, seed):
            finish(run, seconds_per_step=0.5, measures={"sibling_value_accuracy": 0.5})
            evaluated(seen, 2)
    text = write_proof_report(arguments, pieces, root, "recipes/proof.py").read_text(encoding="utf-8")
    there = {1: "2", 2: "1"}[seed]
    for where in ("", ", free-running") if case != "base" else ("",):
        assert f"## Not complete{where}\n\n| case | seeds that are there |\n|---|---|\n| {case} | {there} |\n" in text
    assert ("## Values" in text) is (case != "base")


@pytest.mark.parametrize("name", ["proof", "proof_smoke"])
def test_shipped_lists_are_complete(name):
    (arguments,) = RecipeParser(ProofArguments).parse(["--config", str(ROOT / f"recipes/tiny/{name}.yaml")])
    pieces = plan_pieces(arguments, ROOT)
    assert {entry.kind for entry in arguments.checked.values()} == {"trunk", "train", "ablate", "evaluate"}
    folders = [run.folder for run in every(pieces)]
    assert len(set(folders)) == len(folders)
    training = (PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    for runs in pieces.values():
        for run in {run.case: run for run in runs}.values():
            kinds = {TRAIN: training, EVALUATE: (EvaluationArguments,)}.get(run.script)
            if kinds:
                made = RecipeParser(*kinds).parse_values(run.recipe)
                assert len(made) == 1 or made[3].build(made[4].max_steps).max_steps == run.recipe["max_steps"]
    if name == "proof":
        assert [run.seed for run in pieces["full"]] == [1, 2, 3]
        assert pieces["full"][0].minutes <= 45 and len({run.case for run in pieces["ablations"]}) >= 12


def test_the_full_recipe_says_what_differs_from_the_demos():
    short, full = (load_yaml(ROOT / f"recipes/tiny/{name}.yaml") for name in ("train", "train_full"))
    changed = {key for key in short.keys() | full.keys() if short.get(key) != full.get(key)}
    assert changed == {
        *("stages", "max_steps", "train_documents", "eval_documents", "hard_fraction", "output_dir", "eval_steps"),
        "save_steps",
    }
    assert full["max_steps"] * full["per_device_train_batch_size"] == full["train_documents"]
