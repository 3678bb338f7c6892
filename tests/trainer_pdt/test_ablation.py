"""Ablations: what each case trains, what counts as a clear difference, what the report says."""

import random
from pathlib import Path

import pytest

from modeling_pdt import PDTAdapterConfig
from trainer_pdt.ablation import (
    BASE,
    MEASURES,
    AblationArguments,
    Case,
    bar_rows,
    case_recipe,
    compare,
    hurts,
    plan_runs,
    report_markdown,
    scatter,
)
from trainer_pdt.arguments import CurriculumArguments, DataArguments, ModelArguments, PDTTrainingArguments
from trainer_pdt.curriculum import LOSS_NAMES
from trainer_pdt.evaluation_pass import mix_suffix
from trainer_pdt.parser import RecipeParser, load_yaml
from trainer_pdt.runs import RESULT_FILE
from trainer_pdt.telemetry import write_json

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "base": {"says": "as it is"},
    "with_kd": {"says": "distils", "stages": {"bus": {"losses": {"kd": 0.5, "planner": 0}, "lag_jitter": 0.0}}},
    "without_encoder": {"says": "two stages", "stages": {"encoder": None}, "options": {"learning_rate": 0.1}},
    "with_kd_ema": {"says": "distils from averages", "against": "with_kd", "options": {"teacher_kind": "ema"}},
}


def arguments(**changes):
    recipe = {"recipe": "recipes/tiny/train.yaml", "stage_steps": {"bus": 4, "encoder": 2, "gate": 3}, "cases": CASES}
    return AblationArguments(**{**recipe, **changes})


def shipped():
    (found,) = RecipeParser(AblationArguments).parse(["--config", str(ROOT / "recipes/tiny/ablations.yaml")])
    return found


def results(**by_case):
    """Value accuracy by seed, and as many others as named."""
    return {
        name: {
            seed: {"measures": values if isinstance(values, dict) else {"sibling_value_accuracy": values}}
            | {"seconds_per_step": 0.5}
            for seed, values in enumerate(found, start=1)
        }
        for name, found in by_case.items()
    }


def test_a_case_changes_what_it_names_and_nothing_else():
    base = case_recipe(arguments(), Case.from_mapping("base", CASES["base"]), ROOT)
    changed = case_recipe(arguments(), Case.from_mapping("with_kd", CASES["with_kd"]), ROOT)
    shipped_recipe = load_yaml(ROOT / "recipes/tiny/train.yaml")
    assert base["max_steps"] == 9 and [stage["until"] for stage in base["stages"]] == [4, 6, 9]
    assert {**base, "max_steps": 0, "stages": []} == {**shipped_recipe, "max_steps": 0, "stages": []}
    bus, changed_bus = base["stages"][0], changed["stages"][0]
    assert changed_bus.pop("losses") == {**bus.pop("losses"), "kd": 0.5, "planner": 0}
    assert changed_bus == {**bus, "lag_jitter": 0.0}
    assert {**changed, "stages": changed["stages"][1:]} == {**base, "stages": base["stages"][1:]}


def test_a_stage_that_is_left_out_takes_its_steps_along():
    recipe = case_recipe(arguments(), Case.from_mapping("without_encoder", CASES["without_encoder"]), ROOT)
    assert [(stage["name"], stage["until"]) for stage in recipe["stages"]] == [("bus", 4), ("gate", 7)]
    assert recipe["max_steps"] == 7 and recipe["learning_rate"] == 0.1


def test_stages_among_the_options_keep_their_own_steps():
    stages = [
        {"name": "mixed", "until": 2, "train": ["snc"], "losses": {"lm_ce": 1.0}, "bus_mix": 0.5},
        {"name": "bus", "until": 5, "train": ["snc"], "losses": {"lm_ce": 1.0}},
    ]
    case = Case("two others", options={"stages": stages, "learning_rate": 0.1}, stages={"bus": {"lag_jitter": 0.5}})
    recipe = case_recipe(arguments(), case, ROOT)
    assert recipe["max_steps"] == 5 and recipe["learning_rate"] == 0.1
    assert recipe["stages"] == [stages[0], {**stages[1], "lag_jitter": 0.5}]


def test_stages_keep_their_lengths_without_stage_steps():
    whole = load_yaml(ROOT / "recipes/tiny/train.yaml")
    recipe = case_recipe(arguments(stage_steps=None), Case("as it is"), ROOT)
    assert recipe["stages"] == whole["stages"] and recipe["max_steps"] == whole["max_steps"]


def test_runs_are_told_apart_by_settings_not_by_place(tmp_path):
    runs = plan_runs(arguments(output=str(tmp_path / "a"), variants=["base,with_kd"]), ROOT)
    moved = plan_runs(arguments(output=str(tmp_path / "b"), variants=["base,with_kd"]), ROOT)
    assert [(run.case, run.seed) for run in runs] == [("base", 1), ("base", 2), ("with_kd", 1), ("with_kd", 2)]
    assert [run.mark for run in runs] == [run.mark for run in moved] and len({run.mark for run in runs}) == 4
    write_json(runs[0].folder / RESULT_FILE, {"settings": runs[0].mark, "measures": {}})
    write_json(runs[1].folder / RESULT_FILE, {"settings": runs[0].mark, "measures": {}})
    assert runs[0].result() is not None and runs[1].result() is None and runs[2].result() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "seeds=.1., allowed: two or more"),
        ({"seeds": [1, 1]}, "seeds=.1, 1., allowed: two or more"),
        ({"cases": {"with_kd": {}}}, "cases: 'base' is unknown"),
        ({"cases": {**CASES, "more_kd": {}}}, "'more_kd', allowed: 'base', 'with_...' or 'without_...'"),
        ({"cases": {**CASES, "with_x": {"against": "with_k"}}}, "did you mean 'with_kd'"),
        ({"variants": ["base,with_kk"]}, "did you mean 'with_kd'"),
        ({"jobs": 0}, "jobs=0, allowed"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ({"says": ""}, {}, "cases.with_x lacks `says`"),
        ({"says": "x", "stage": {}}, {}, "did you mean 'stages'"),
        ({"says": "x", "stages": {"gates": {}}}, {}, "did you mean 'gate'"),
        ({"says": "x", "stages": {"bus": {"losses": {"kdd": 1.0}}}}, {}, "did you mean 'kd'"),
        ({"says": "x"}, {"stage_steps": {"bus": 3}}, "allowed: steps of every stage: bus, encoder, gate"),
    ],
)
def test_wrong_cases_are_named_before_anything_is_trained(case, changes, message):
    found = arguments(cases={**CASES, "with_x": case}, variants=["with_x"], **changes)
    with pytest.raises(ValueError, match=message):
        plan_runs(found, ROOT)


def test_a_difference_is_clear_beyond_two_standard_errors_and_with_every_seed():
    found = compare(
        arguments(),
        results(base=[0.50, 0.60], with_kd=[0.30, 0.48], without_encoder=[0.52, 0.54], with_kd_ema=[0.5, 0.6]),
    )["cases"]
    kd, encoder, ema = (found[name]["measures"]["sibling_value_accuracy"] for name in list(CASES)[1:])
    # Seeds differ by .10, .18, .02 and .10 in the four cases, around .10: the variance of a run is .0128 / 3 / 2.
    assert all(entry["spread"] == pytest.approx(2 * (0.0128 / 6) ** 0.5) for entry in (kd, encoder, ema))
    assert kd["difference"] == pytest.approx(-0.16) and kd["clear"] and not kd["better"]
    assert encoder["difference"] == pytest.approx(-0.02) and not encoder["clear"]
    assert found["with_kd_ema"]["against"] == "with_kd"
    assert ema["difference"] == pytest.approx(0.16) and ema["better"] and ema["clear"]
    assert "difference" not in found["base"]["measures"]["sibling_value_accuracy"]


def test_a_difference_that_seeds_do_not_share_is_not_clear():
    others = {f"with_{number}": [0.5, 0.5] for number in range(20)}
    cases = {name: CASES[name] for name in ("base", "with_kd")} | {name: {"says": "nothing"} for name in others}
    found = compare(arguments(cases=cases), results(base=[0.5, 0.5], with_kd=[0.9, 0.49], **others))
    entry = found["cases"]["with_kd"]["measures"]["sibling_value_accuracy"]
    assert entry["difference"] > entry["spread"] and not entry["clear"]


def test_by_chance_few_differences_are_clear():
    """25 cases that do nothing, with an effect of the seed that all share: of 1,200 differences some 4 % are clear."""
    rng, clear = random.Random(0), 0
    cases = {"base": CASES["base"]} | {f"with_{number}": {"says": "nothing"} for number in range(24)}
    for _ in range(50):
        seeds = [rng.gauss(0, 0.1) for _ in range(2)]
        runs = {name: [0.5 + shift + rng.gauss(0, 0.01) for shift in seeds] for name in cases}
        found = compare(arguments(cases=cases), results(**runs))["cases"].values()
        clear += sum(case["measures"]["sibling_value_accuracy"].get("clear", False) for case in found)
    assert 0 < clear / 1200 < 0.08


def test_one_case_has_nothing_to_tell_its_scatter_by():
    assert scatter([[0.5, 0.6]]) == float("inf") and scatter([[0.5, 0.6], [0.4, 0.5]]) == pytest.approx(0)


def test_smaller_is_better_where_it_is():
    values = [{"other_kl_trunk": 0.02}, {"other_kl_trunk": 0.03}]
    found = compare(arguments(), results(base=values, with_kd=[{"other_kl_trunk": 0.01}] * 2))["cases"]
    entry = found["with_kd"]["measures"]["other_kl_trunk"]
    assert entry["difference"] == pytest.approx(-0.015) and entry["better"] and entry["clear"]


def test_an_incomplete_case_is_left_out_and_an_incomplete_base_refused():
    found = compare(arguments(), results(base=[0.5, 0.6], with_kd=[0.3]))
    assert list(found["cases"]) == ["base"]
    assert found["incomplete"] == {"with_kd": [1], "without_encoder": [], "with_kd_ema": []}
    assert "| with_kd | 1 |" in report_markdown(found, "c") and "| without_encoder | none |" in report_markdown(
        found, "c"
    )
    with pytest.raises(ValueError, match="must hold 'base'"):
        compare(arguments(), results(base=[0.5], with_kd=[0.3, 0.4]))


def test_a_measure_that_one_seed_lacks_is_not_compared():
    some = [{"agreement_f1": 0.4, "coverage_f1": 0.9}, {"coverage_f1": 0.8}]
    found = compare(arguments(), results(base=some, with_kd=[{"agreement_f1": 0.4, "coverage_f1": 0.9}] * 2))["cases"]
    assert list(found["base"]["measures"]) == ["coverage_f1"]
    assert "difference" not in found["with_kd"]["measures"]["agreement_f1"]
    assert found["with_kd"]["measures"]["coverage_f1"]["difference"] == pytest.approx(0.05)


def test_the_report_says_what_hurts_and_whether_the_bar_is_met():
    names = {**CASES, "with_all_losses": {"says": "all"}}
    report = compare(
        arguments(cases=names),
        results(base=[0.5, 0.62], with_kd=[0.2, 0.3], without_encoder=[0.7, 0.8], with_all_losses=[0.5, 0.605]),
    )
    assert bar_rows(report["cases"]) == [
        ["sibling_value_accuracy", "0.560", "0.552", "-0.008", "0.013", "lower, within the spread"]
    ]
    lines = hurts(report["cases"])
    assert lines == [
        "- `with_kd` (distils), worse than `base`: sibling_value_accuracy -0.310",
        "- `without_encoder` (two stages), better than `base`: sibling_value_accuracy +0.190",
    ]
    text = report_markdown(report, "python recipes/ablate.py")
    assert "| with_kd | base | **-0.310** |" in text and "| with_all_losses | base | -0.008 |" in text
    assert "| base | 0.560 (0.500, 0.620) | 0.50 |" in text and all(line in text for line in lines)
    assert "Written by `python recipes/ablate.py`." in text


def test_the_shipped_file_covers_every_loss_stage_and_teacher():
    found = shipped()
    checks = RecipeParser(PDTAdapterConfig, ModelArguments, DataArguments, CurriculumArguments, PDTTrainingArguments)
    recipes = {run.case: run.recipe for run in plan_runs(found, ROOT)}
    for recipe in recipes.values():
        checks.parse_values(recipe)
    weighed = {
        name: {loss for stage in recipe["stages"] for loss, weight in stage["losses"].items() if weight}
        for name, recipe in recipes.items()
    }
    assert weighed["with_all_losses"] == set(LOSS_NAMES)
    single = [weighed[name] for name in recipes if name != "with_all_losses"]
    assert all(
        any((loss in case) != (loss in weighed[BASE]) for case in single) for loss in set(LOSS_NAMES) - {"notes"}
    )
    assert "notes" not in weighed["without_encoder_stage"]
    assert {recipe.get("teacher_kind", "notes") for recipe in recipes.values()} == {"notes", "ema", "text", "trunk"}
    stages = {stage["name"] for stage in recipes[BASE]["stages"]}
    gone = [stages - {stage["name"] for stage in recipe["stages"]} for recipe in recipes.values()]
    assert {"encoder"} in gone and {"gate"} in gone
    mixes = {mix_suffix(mix) for mix in found.options["eval_bus_mixes"]}
    assert all(
        name.partition("_mix")[1:] == ("", "") or "_mix" + name.partition("_mix")[2] in mixes for name in MEASURES
    )
