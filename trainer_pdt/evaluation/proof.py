"""The proof: one list of trunks, trainings, ablations and evaluations, each a piece that is made once and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..ablation import AblationArguments, plan_runs
from ..arguments import check_whole
from ..curriculum import check_choice, check_range
from ..parser import RecipeParser, load_yaml
from ..runs import EVALUATE, TRAIN, TRUNK, Run, place_of, weights_of

LONGEST_PIECE = 150
"""Minutes that one piece may take."""

Kind = Literal["trunk", "train", "ablate", "evaluate"]
KINDS: tuple[str, ...] = get_args(Kind)
USES: dict[str, tuple[str, ...]] = {
    "trunk": (),
    "ablate": (),
    "train": ("trunk",),
    "evaluate": ("train", "ablate"),
}
"""By kind, the kinds of entries whose models it may use."""


@dataclass(frozen=True)
class Entry:
    """
    Pieces of one kind, one per seed (and case).

    Args:
        kind (`str`): `trunk` pretrains one, `train` trains adapters, `ablate` every case of a recipe of
            `recipes/ablate.py`, `evaluate` measures what another entry trained.
        says (`str`): What it is for, in words.
        minutes (`float`): Expected duration of one piece, with the threads that it has.
        recipe (`str`, *optional*): Recipe of its script, relative to the repository; only evaluations do without.
        options (`dict`, *optional*): Fields that replace the recipe's.
        of (`str`, *optional*): Entry that it uses: the trunk of a training, the trained models of an evaluation.
        seeds (`list[int]`, *optional*): Of trunks and trainings; missing = 1. Ablations have their own.
    """

    kind: Kind
    says: str
    minutes: float
    recipe: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    of: str | None = None
    seeds: list[int] = field(default_factory=list)

    @classmethod
    def from_mapping(cls, name: str, entry: Mapping[str, Any], earlier: Mapping[str, "Entry"]) -> "Entry":
        """The checked entry of a recipe file, after the `earlier` ones."""
        where = f"entries.{name}"
        for key in entry:
            check_choice(where, key, [item.name for item in fields(cls)])
        for key in ("kind", "says", "minutes"):
            if key not in entry:
                raise ValueError(f"{where} lacks {key}, allowed: kind, says and minutes in every entry.")
        made = cls(**entry)
        check_choice(f"{where}.kind", made.kind, KINDS)
        check_range(f"{where}.minutes", made.minutes, 0.0, LONGEST_PIECE, above=True)
        if made.recipe is None and made.kind != "evaluate":
            raise ValueError(f"{where}.recipe is missing, allowed: a recipe of {made.kind!r}.")
        if made.of is not None:
            fitting = [other for other, found in earlier.items() if found.kind in USES[made.kind]]
            check_choice(f"{where}.of", made.of, fitting)
        elif made.kind == "evaluate":
            raise ValueError(f"{where}.of is missing, allowed: an earlier entry that trains.")
        if made.seeds and made.kind in ("ablate", "evaluate"):
            raise ValueError(f"{where}.seeds={made.seeds}, allowed: none, they are those of what it uses.")
        for seed in made.seeds:
            check_whole(f"{where}.seeds", seed, 0)
        return replace(made, seeds=made.seeds or [1])


@dataclass
class ProofArguments:
    """
    What the proof is made of. Paths are relative to the repository.

    Args:
        entries (`dict[str, dict]`): By name, in order, the fields of [`Entry`].
        main (`str`): Evaluation that the bars are held against.
        other_tap (`str`, *optional*): Evaluation of the same recipe with notes from the other tap, see
            [`~trainer_pdt.evaluation.proof_bars.check_proof`].
        output (`str`, *optional*, defaults to `"build/proof"`): A folder per piece, kept between calls.
        report (`str`, *optional*, defaults to `"docs/benchmarks/worlds.md"`): Markdown; figures go into a folder of
            the same name beside it.
        cores (`int`, *optional*, defaults to 2): CPU cores; pieces of fewer threads run side by side.
        minutes (`float`, *optional*): Start only pieces that are expected to end within so many minutes, but at least
            one; missing = all.
        report_only (`bool`, *optional*, defaults to `False`): Only write the report of what is there.
    """

    entries: dict[str, dict[str, Any]] = field(metadata={"help": "By name, in order: kind, says, minutes, ..."})
    main: str = field(metadata={"help": "Evaluation that the bars are held against."})
    other_tap: str | None = field(default=None, metadata={"help": "The same with notes from the other tap."})
    output: str = field(default="build/proof", metadata={"help": "A folder per piece, kept between calls."})
    report: str = field(default="docs/benchmarks/worlds.md", metadata={"help": "Markdown file of the report."})
    cores: int = field(default=2, metadata={"help": "CPU cores."})
    minutes: float | None = field(default=None, metadata={"help": "Minutes for this call; default: all pieces."})
    report_only: bool = field(default=False, metadata={"help": "Only write the report of what is there."})

    def __post_init__(self) -> None:
        check_whole("cores", self.cores, 1)
        if self.minutes is not None:
            check_range("minutes", self.minutes, 0.0, above=True)
        self.checked: dict[str, Entry] = {}
        for name, entry in self.entries.items():
            self.checked[name] = Entry.from_mapping(name, entry, self.checked)
        trained = [
            name
            for name, entry in self.checked.items()
            if entry.kind == "evaluate" and self.checked[entry.of or ""].kind == "train"
        ]
        check_choice("main", self.main, trained)
        if self.other_tap is not None:
            check_choice("other_tap", self.other_tap, trained)


def plan_pieces(arguments: ProofArguments, root: Path) -> dict[str, list[Run]]:
    """
    Every piece, by the entry that it belongs to, in order.

    Args:
        arguments ([`ProofArguments`]): The list.
        root (`Path`): Repository.
    """
    pieces: dict[str, list[Run]] = {}
    for name, entry in arguments.checked.items():
        folder = root / arguments.output / name
        recipe = {} if entry.recipe is None else load_yaml(root / entry.recipe)
        recipe |= entry.options
        if entry.kind == "ablate":
            pieces[name] = _ablations(entry, recipe, place_of(folder, root), root)
        elif entry.kind == "evaluate":
            pieces[name] = [_evaluation(name, entry, recipe, run, folder, root) for run in pieces[entry.of or ""]]
        else:
            before = pieces[entry.of][0] if entry.of else None
            pieces[name] = [_training(name, entry, recipe, seed, folder, before, root) for seed in entry.seeds]
    return pieces


def next_pieces(
    runs: Sequence[Run], going: Sequence[Run], cores: int, minutes: float | None, ended: Sequence[Run]
) -> list[Run]:
    """
    Pieces to start now, in the order of the list: missing ones whose models are there, as many as the cores left hold.

    Args:
        runs (`Sequence[Run]`): The whole list.
        going (`Sequence[Run]`): Pieces that are being made.
        cores (`int`): CPU cores; a piece of more threads than that goes alone.
        minutes (`float`, *optional*): Time that is left, no longer piece is started; missing = any.
        ended (`Sequence[Run]`): Pieces that were tried and are not tried again.
    """
    missing, chosen = missing_pieces(runs), []
    free = cores - sum(run.threads for run in going)
    for run in missing:
        if run in going or run in ended or any(before in missing for before in run.after):
            continue
        fits = run.threads <= free or (free == cores and not chosen)
        if fits and (minutes is None or run.minutes <= minutes):
            chosen.append(run)
            free -= run.threads
    return chosen


def missing_pieces(runs: Sequence[Run]) -> list[Run]:
    """Pieces without a result, and those without a model that one of them uses, in the order of the list."""
    missing: list[Run] = []
    for run in reversed(runs):
        used = any(run in other.after for other in missing)
        if run.result() is None or (used and not run.has_model):
            missing.append(run)
    return missing[::-1]


def expected_minutes(runs: Sequence[Run], cores: int) -> float:
    """Minutes that the missing ones of these pieces take together when they fill the cores."""
    return sum(run.minutes / max(1, cores // run.threads) for run in runs if run.result() is None)


def _training(
    name: str, entry: Entry, recipe: dict[str, Any], seed: int, folder: Path, before: Run | None, root: Path
) -> Run:
    folder = folder / f"seed_{seed}"
    recipe = {**recipe, "seed": seed, "output_dir": place_of(folder / "model", root)}
    if before is not None:
        recipe["trunk"] = place_of(before.model, root)
    script = TRUNK if entry.kind == "trunk" else TRAIN
    if before is not None:
        return Run(name, seed, folder, recipe, script, (before,), entry.minutes)
    return Run(name, seed, folder, recipe, script, (), entry.minutes, weights_of(recipe, root))


def _ablations(entry: Entry, recipe: dict[str, Any], folder: str, root: Path) -> list[Run]:
    (arguments,) = RecipeParser(AblationArguments).parse_values({**recipe, "output": folder})
    return [replace(run, minutes=entry.minutes) for run in plan_runs(arguments, root)]


def _evaluation(name: str, entry: Entry, recipe: dict[str, Any], run: Run, folder: Path, root: Path) -> Run:
    case = name if entry.of == run.case else f"{name}/{run.case}"
    folder = folder.parent / case / f"seed_{run.seed}"
    places = {
        "model": place_of(run.model, root),
        "output_folder": place_of(folder, root),
        "training_report": place_of(run.model / "training_report.json", root),
    }
    return Run(case, run.seed, folder, {**recipe, **places, "resume": True}, EVALUATE, (run,), entry.minutes)
