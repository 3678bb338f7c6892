"""Ablations of a recipe: the same short training once per change and seed, and what each change does to the measures.

Names of cases say what they do: `base` changes nothing, `with_*` adds something, `without_*` takes something away.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .arguments import check_whole
from .curriculum import Curriculum, check_choice
from .evaluation.tables import Table, to_markdown
from .parser import load_yaml
from .runs import Run, place_of, weights_of

BASE, ALL_LOSSES = "base", "with_all_losses"
HIGHER, LOWER = 1, -1
MEASURES: dict[str, int] = {
    "sibling_value_accuracy": HIGHER,
    "sibling_value_accuracy_mix_0.35": HIGHER,
    "sibling_value_accuracy_mix_1": HIGHER,
    "mask_ablation": HIGHER,
    "coverage_f1": HIGHER,
    "agreement_f1": HIGHER,
    "other_kl_trunk": LOWER,
    "stability_kl": LOWER,
    "kd_ce_ratio": LOWER,
    "rollback_kl": LOWER,
    "redundancy": LOWER,
}
"""Measures of `docs/metrics.md` that are compared, and which way is better."""

BAR_MEASURES = ("sibling_value_accuracy", "coverage_f1", "agreement_f1")
"""Recall, coverage and agreement: not worse with all losses on."""


@dataclass
class AblationArguments:
    """
    What is trained and compared. Paths are relative to the repository.

    Args:
        recipe (`str`): Recipe of `recipes/train.py` that every case starts from.
        cases (`dict[str, dict]`): By name, the fields of [`Case`]; one is `base`.
        options (`dict`, *optional*): Fields that replace the recipe's in every case.
        stage_steps (`dict[str, int]`, *optional*): Steps of each stage of the recipe, all of them; missing = the
            recipe's own. `max_steps` follows from them.
        seeds (`list[int]`, *optional*, defaults to `[1, 2]`): At least two: their spread is what a change is held
            against.
        variants (`list[str]`, *optional*): Cases to train, also as `a,b`; missing = all.
        jobs (`int`, *optional*, defaults to 1): Trainings at a time.
        output (`str`, *optional*, defaults to `"build/ablations"`): A folder per training, kept between calls.
        report_folder (`str`, *optional*): Of `ablations.json` and `ablations.md`; missing = `output`.
        report_only (`bool`, *optional*, defaults to `False`): Only write the report of what is there.
    """

    recipe: str = field(metadata={"help": "Recipe of recipes/train.py that every case starts from."})
    cases: dict[str, dict[str, Any]] = field(metadata={"help": "By name: says, options, stages; one is `base`."})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields that replace the recipe's."})
    stage_steps: dict[str, int] | None = field(default=None, metadata={"help": "Steps of each stage of the recipe."})
    seeds: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Seeds, at least two."})
    variants: list[str] = field(default_factory=list, metadata={"help": "Cases to train; default: all."})
    jobs: int = field(default=1, metadata={"help": "Trainings at a time."})
    output: str = field(default="build/ablations", metadata={"help": "A folder per training, kept between calls."})
    report_folder: str | None = field(default=None, metadata={"help": "Folder of the report; default: output."})
    report_only: bool = field(default=False, metadata={"help": "Only write the report of what is there."})

    def __post_init__(self) -> None:
        check_whole("jobs", self.jobs, 1)
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}, allowed: two or more different ones.")
        check_choice("cases", BASE, self.cases)
        for name, entry in self.cases.items():
            check_choice(f"cases.{name}.against", entry.get("against", BASE), self.cases)
            if name != BASE and not name.startswith(("with_", "without_")):
                raise ValueError(f"cases: {name!r}, allowed: {BASE!r}, 'with_...' or 'without_...'.")
        self.variants = [name for words in self.variants for name in words.split(",")] or list(self.cases)
        for name in self.variants:
            check_choice("variants", name, self.cases)


@dataclass(frozen=True)
class Case:
    """
    One change of the base.

    Args:
        says (`str`): What it changes, in words.
        options (`dict`, *optional*): Fields that replace the recipe's; `stages` among them keep their own steps.
        stages (`dict[str, dict | None]`, *optional*): By stage, fields that replace the stage's; `losses` are merged,
            0 turns one off. `None` leaves the stage out, and what follows starts earlier.
        against (`str`, *optional*, defaults to `"base"`): Case that it is compared with.
    """

    says: str
    options: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    against: str = BASE

    @classmethod
    def from_mapping(cls, name: str, entry: Mapping[str, Any]) -> "Case":
        """The checked case of a recipe file."""
        for key in entry:
            check_choice(f"cases.{name}", key, [item.name for item in fields(cls)])
        if not entry.get("says"):
            raise ValueError(f"cases.{name} lacks `says`, allowed: words on what it changes.")
        return cls(**entry)


def case_recipe(arguments: AblationArguments, case: Case, root: Path) -> dict[str, Any]:
    """
    The complete recipe of a case, without seed and folder; its stages are checked.

    Args:
        arguments ([`AblationArguments`]): Base recipe and what all cases change in it.
        case ([`Case`]): What this one changes.
        root (`Path`): Repository.
    """
    recipe = load_yaml(root / arguments.recipe) | arguments.options
    if "stages" in case.options:
        recipe["stages"] = case.options["stages"]
        recipe["max_steps"] = case.options["stages"][-1]["until"]
    whole = Curriculum.from_list(recipe["stages"], recipe["max_steps"])
    lengths = {stage.name: stage.until - start for stage, start in zip(whole.stages, whole.starts, strict=True)}
    if arguments.stage_steps is not None and "stages" not in case.options:
        if arguments.stage_steps.keys() != lengths.keys():
            raise ValueError(
                f"stage_steps={arguments.stage_steps}, allowed: steps of every stage: {', '.join(lengths)}."
            )
        lengths = arguments.stage_steps
    for name in case.stages:
        check_choice("cases.stages", name, lengths)
    stages, until = [], 0
    for stage in recipe["stages"]:
        changes = case.stages.get(stage["name"], {})
        if changes is None:
            continue
        until += lengths[stage["name"]]
        losses = {**stage["losses"], **changes.get("losses", {})}
        stages.append({**stage, **changes, "losses": losses, "until": until})
    Curriculum.from_list(stages, until)
    return {**recipe, **case.options, "stages": stages, "max_steps": until}


def plan_runs(arguments: AblationArguments, root: Path) -> list[Run]:
    """
    Every training of the chosen cases: case by case, so that what is finished can be compared.

    Args:
        arguments ([`AblationArguments`]): What to train.
        root (`Path`): Repository.
    """
    runs = []
    for name in arguments.variants:
        recipe = case_recipe(arguments, Case.from_mapping(name, arguments.cases[name]), root)
        weights = weights_of(recipe, root)
        for seed in arguments.seeds:
            folder = root / arguments.output / name / f"seed_{seed}"
            seeded = {**recipe, "seed": seed, "output_dir": place_of(folder / "model", root)}
            runs.append(Run(name, seed, folder, seeded, weights=weights))
    return runs


def split_complete(
    arguments: AblationArguments, results: Mapping[str, Mapping[int, Any]]
) -> tuple[dict[str, Mapping[int, Any]], dict[str, list[int]]]:
    """Results of the cases that have all seeds, and the seeds that are there of the others."""
    complete = {name: found for name, found in results.items() if all(seed in found for seed in arguments.seeds)}
    return complete, {name: sorted(results.get(name, ())) for name in arguments.cases if name not in complete}


def scatter(values_CS: Sequence[Sequence[float]]) -> float:
    """
    Standard deviation of a run of one case and seed, C cases with S seeds each: what is left when the mean of the case
    and that of the seed are taken off. All cases tell it, as they share a recipe; two seeds of one would hardly.
    """
    if len(values_CS) < 2:
        return math.inf
    cases = [statistics.mean(values_S) for values_S in values_CS]
    seeds = [statistics.mean(values_C) for values_C in zip(*values_CS, strict=True)]
    total = statistics.mean(cases)
    left = sum(
        (value - case - seed + total) ** 2
        for case, values_S in zip(cases, values_CS, strict=True)
        for seed, value in zip(seeds, values_S, strict=True)
    )
    return math.sqrt(left / ((len(cases) - 1) * (len(seeds) - 1)))


def compare(
    arguments: AblationArguments,
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    measures: Mapping[str, int] = MEASURES,
) -> dict[str, Any]:
    """
    What each case does to the measures, against the base, or the case it names, with the same seeds.

    A difference counts as *clear* when it is larger than two standard errors, from how runs of all cases scatter
    ([`scatter`]), and has the same direction with every seed.

    Args:
        arguments ([`AblationArguments`]): What was trained.
        results (`Mapping`): By case and seed, what [`Run.result`] gives; a case that lacks a seed is left out.
        measures (`Mapping[str, int]`, *optional*): What is compared, and which way is better.

    Returns:
        `dict`: `seeds`, `measures`, `incomplete` (the seeds that are there of cases that are left out), and `cases` by
        name: `says`, `against`, `seconds_per_step` where it was measured and, by measure, `values` by seed, `mean`
        and, where both were measured, `difference`, `spread` (two standard errors of it), `clear` and `better`.

    Raises:
        ValueError: Without a complete base.
    """
    complete, incomplete = split_complete(arguments, results)
    if BASE not in complete:
        raise ValueError(f"results: {sorted(results)} with all seeds {arguments.seeds}, must hold {BASE!r}.")

    def values(name: str, measure: str) -> list[float] | None:
        found = [complete[name][seed]["measures"].get(measure) for seed in arguments.seeds]
        return None if None in found else found

    def error(measure: str) -> float:
        found = [values(name, measure) for name in complete]
        return scatter([one for one in found if one is not None]) * math.sqrt(2 / len(arguments.seeds))

    cases, errors = {}, {measure: error(measure) for measure in measures}
    for name in (name for name in arguments.cases if name in complete):
        case, entries = Case.from_mapping(name, arguments.cases[name]), {}
        for measure, direction in measures.items():
            found = values(name, measure)
            before = values(case.against, measure) if case.against in complete and name != BASE else None
            if found is not None:
                entries[measure] = {"values": found, "mean": statistics.mean(found)}
            if found is not None and before is not None:
                entries[measure] |= _difference(before, found, 2 * errors[measure], direction)
        cases[name] = {"says": case.says, "against": None if name == BASE else case.against, "measures": entries}
        seconds = [complete[name][seed].get("seconds_per_step") for seed in arguments.seeds]
        if None not in seconds:
            cases[name]["seconds_per_step"] = round(statistics.mean(seconds), 4)
    return {"seeds": arguments.seeds, "measures": dict(measures), "incomplete": incomplete, "cases": cases}


def _difference(before: Sequence[float], found: Sequence[float], spread: float, direction: int) -> dict[str, Any]:
    pairs = [new - old for old, new in zip(before, found, strict=True)]
    mean = statistics.mean(pairs)
    clear = abs(mean) > spread and all(pair * mean > 0 for pair in pairs)
    return {"difference": mean, "spread": spread, "clear": clear, "better": mean * direction > 0}


def bar_rows(cases: Mapping[str, Any]) -> list[list[str]]:
    """Recall, coverage and agreement with all losses on: measure, base, all losses, difference, spread, verdict."""
    rows = []
    for measure in BAR_MEASURES:
        entry = cases.get(ALL_LOSSES, {}).get("measures", {}).get(measure)
        if entry is None or "difference" not in entry:
            continue
        worse = not entry["better"] and entry["difference"] != 0
        verdict = "not worse" if not worse else "worse" if entry["clear"] else "lower, within the spread"
        base = cases[BASE]["measures"][measure]["mean"]
        numbers = (f"{base:.3f}", f"{entry['mean']:.3f}", f"{entry['difference']:+.3f}", f"{entry['spread']:.3f}")
        rows.append([measure, *numbers, verdict])
    return rows


def hurts(cases: Mapping[str, Any]) -> list[str]:
    """One line per case whose addition makes a measure clearly worse, or whose removal makes one clearly better."""
    lines = []
    for name, case in cases.items():
        removed = name.startswith("without_")
        found = [
            f"{measure} {entry['difference']:+.3f}"
            for measure, entry in case["measures"].items()
            if entry.get("clear") and entry["better"] == removed
        ]
        if found:
            effect = "better" if removed else "worse"
            lines.append(f"- `{name}` ({case['says']}), {effect} than `{case['against']}`: {', '.join(found)}")
    return lines


def difference_tables(report: Mapping[str, Any], how: str, where: str = "") -> list[Table]:
    """
    Differences and values.

    Args:
        report (`Mapping`): From [`compare`].
        how (`str`): How it was measured: the first words of a sentence, after "case minus what it is held against, ".
        where (`str`, *optional*): What follows the tables' titles.
    """
    cases, measures, seeds = report["cases"], report["measures"], ", ".join(map(str, report["seeds"]))
    used = [measure for measure in measures if any(measure in case["measures"] for case in cases.values())]
    arrows = [f"{measure} {'↑' if measures[measure] == HIGHER else '↓'}" for measure in used]
    changes = [
        [name, case["against"], *(_change(case, measure) for measure in used)]
        for name, case in cases.items()
        if name != BASE
    ]
    timed = all("seconds_per_step" in case for case in cases.values())
    numbers = [
        [name, *(_values(case, measure) for measure in used), *([f"{case['seconds_per_step']:.2f}"] if timed else [])]
        for name, case in cases.items()
    ]
    about = (
        f"Mean over seeds {seeds} of case minus what it is held against, {how}. ↑ higher is better, ↓ lower is "
        "better. Bold: larger than two standard errors, from how runs scatter over all cases and seeds, and the same "
        "direction with every seed; by chance that is one cell in twenty or less. A dash: nothing was counted, or "
        "what it is held against is not complete."
    )
    return [
        Table(f"Differences{where}", ("case", "against", *arrows), changes, about),
        Table(
            f"Values{where}",
            ("case", *arrows, *(["s per step"] if timed else [])),
            numbers,
            f"Mean, in brackets seeds {seeds}.",
        ),
    ]


def incomplete_table(incomplete: Mapping[str, Sequence[int]], where: str = "") -> Table:
    """Cases that lack a seed, and are in no other table, with the seeds that are there; empty where none does."""
    rows = [[name, ", ".join(map(str, seeds)) or "none"] for name, seeds in incomplete.items()]
    return Table(f"Not complete{where}", ("case", "seeds that are there"), rows)


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """
    Differences, values and cases; what is not complete.

    Args:
        report (`Mapping`): From [`compare`].
    """
    bars, cases = bar_rows(report["cases"]), report["cases"]
    columns = ("measure", "base", "all losses", "difference", "two standard errors", "verdict")
    how = (
        "teacher-forced on held-out documents (`docs/metrics.md`), other ones for every seed, thresholds 0.5. Two "
        "seeds show large effects only"
    )
    tables = [
        Table("All losses on against the base", columns, bars),
        *difference_tables(report, how),
        Table("Cases", ("case", "what it is"), [[name, case["says"]] for name, case in cases.items()]),
        incomplete_table(report["incomplete"]),
    ]
    return [table for table in tables if table.rows]


def report_markdown(report: Mapping[str, Any], command: str) -> str:
    """
    The report as Markdown.

    Args:
        report (`Mapping`): From [`compare`].
        command (`str`): What wrote it.
    """
    found = hurts(report["cases"]) or ["Nothing that is clear with these seeds."]
    harm = "\n".join(["## Where a part hurts", "", *found, ""])
    head = "# Ablations\n"
    return "\n".join(
        [head, *(to_markdown(table) for table in report_tables(report)), harm, f"Written by `{command}`.\n"]
    )


def _change(case: Mapping[str, Any], measure: str) -> str:
    entry = case["measures"].get(measure, {})
    if "difference" not in entry:
        return "-"
    text = f"{entry['difference']:+.3f}"
    return f"**{text}**" if entry["clear"] else text


def _values(case: Mapping[str, Any], measure: str) -> str:
    entry = case["measures"].get(measure)
    if entry is None:
        return "-"
    return f"{entry['mean']:.3f} ({', '.join(f'{value:.3f}' for value in entry['values'])})"
