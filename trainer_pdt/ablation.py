"""Ablations of a recipe: the same short training once per change and seed, and what each change does to the measures.

Names of cases say what they do: `base` changes nothing, `with_*` adds something, `without_*` takes something away.
"""

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


def compare(arguments: AblationArguments, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """
    What each case does to the measures, against the base, or the case it names, with the same seeds.

    A difference counts as *clear* when it is larger than the distance between the base's seeds and has the same
    direction with every seed.

    Args:
        arguments ([`AblationArguments`]): What was trained.
        results (`Mapping`): By case and seed, what [`Run.result`] gives; a case that lacks a seed is left out.

    Returns:
        `dict`: `seeds`, and `cases` by name: `says`, `against`, `seconds_per_step` and, by measure, `values` by seed,
        `mean` and, where both were measured, `difference`, `spread` of the base's seeds, `clear` and `better`.

    Raises:
        ValueError: Without a complete base.
    """
    complete = {name: found for name, found in results.items() if all(seed in found for seed in arguments.seeds)}
    if BASE not in complete:
        raise ValueError(f"results: {sorted(results)} with all seeds {arguments.seeds}, must hold {BASE!r}.")

    def values(name: str, measure: str) -> list[float] | None:
        found = [complete[name][seed]["measures"].get(measure) for seed in arguments.seeds]
        return None if None in found else found

    cases = {}
    for name in (name for name in arguments.cases if name in complete):
        case, entries = Case.from_mapping(name, arguments.cases[name]), {}
        for measure, direction in MEASURES.items():
            found, base = values(name, measure), values(BASE, measure)
            before = values(case.against, measure) if case.against in complete and name != BASE else None
            if found is not None:
                entries[measure] = {"values": found, "mean": statistics.mean(found)}
            if found is not None and before is not None and base is not None:
                entries[measure] |= _difference(before, found, max(base) - min(base), direction)
        seconds = statistics.mean(complete[name][seed]["seconds_per_step"] for seed in arguments.seeds)
        about = {"says": case.says, "against": None if name == BASE else case.against}
        cases[name] = {**about, "seconds_per_step": round(seconds, 4), "measures": entries}
    return {"seeds": arguments.seeds, "cases": cases}


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


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """
    Differences, values and cases.

    Args:
        report (`Mapping`): From [`compare`].
    """
    cases, seeds = report["cases"], ", ".join(map(str, report["seeds"]))
    used = [measure for measure in MEASURES if any(measure in case["measures"] for case in cases.values())]
    arrows = [f"{measure} {'↑' if MEASURES[measure] == HIGHER else '↓'}" for measure in used]
    changes = [
        [name, case["against"], *(_change(case, measure) for measure in used)]
        for name, case in cases.items()
        if name != BASE
    ]
    numbers = [
        [name, *(_values(case, measure) for measure in used), f"{case['seconds_per_step']:.2f}"]
        for name, case in cases.items()
    ]
    bars = bar_rows(cases)
    columns = ("measure", "base", "all losses", "difference", "distance of the base's seeds", "verdict")
    how = (
        f"Mean over seeds {seeds} of case minus what it is held against, teacher-forced on held-out documents "
        "(`docs/metrics.md`), thresholds 0.5. ↑ higher is better, ↓ lower is better. Bold: "
        "larger than the distance between the base's seeds, and the same direction with every seed. Two seeds show "
        "large effects only. A dash: nothing was counted."
    )
    return [
        *([Table("All losses on against the base", columns, bars)] if bars else []),
        Table("Differences", ("case", "against", *arrows), changes, how),
        Table("Values", ("case", *arrows, "s per step"), numbers, f"Mean, in brackets seeds {seeds}."),
        Table("Cases", ("case", "what it is"), [[name, case["says"]] for name, case in cases.items()]),
    ]


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
