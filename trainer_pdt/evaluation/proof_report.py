"""Writes the report of the proof from what its pieces left: bars, tables over seeds, comparisons, commands."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..ablation import (
    BASE,
    HIGHER,
    MEASURES,
    AblationArguments,
    compare,
    difference_tables,
    incomplete_table,
    report_tables,
    split_complete,
)
from ..parser import RecipeParser, load_yaml
from ..runs import RECIPE_FILE, Run, place_of
from ..telemetry import read_json, write_json
from .further_tables import FURTHER_TABLES
from .pooled import Pooled
from .proof import Entry, ProofArguments
from .proof_bars import check_proof
from .proof_plots import figures_of
from .report import read_training
from .sections import DOCUMENTS_FILE
from .tables import (
    Table,
    heads_table,
    recall_table,
    rollback_table,
    speed_table,
    text_table,
    timing_table,
    to_markdown,
)
from .value_kinds import value_kinds_table
from .values import measure, show

POOLED_TABLES = (timing_table, *FURTHER_TABLES, heads_table, rollback_table, text_table, speed_table)
COMPARED: tuple[tuple[str, str], ...] = (
    ("recall, all types", "sibling_fact_recall/pdt"),
    ("recall, core", "sibling_fact_recall/pdt_core"),
    ("recall, hard", "sibling_fact_recall/pdt_hard"),
    ("sequential, core", "sibling_fact_recall/sequential_core"),
    ("sequential, hard", "sibling_fact_recall/sequential_hard"),
    ("independent streams", "sibling_fact_recall/independent"),
    ("follows swapped notes", "sibling_fact_recall/swapped_follow"),
    ("values never trained on", "sibling_fact_recall/pdt_heldout_values"),
    ("two hops", "two_hop/repeated/pdt"),
    ("owner follows", "reference_classes/pdt/late"),
    ("references to all that the owner states", "reference_classes/pdt/any"),
    ("lag 2", "curves/bus_lag/2/pdt"),
    ("decoded with 2 streams", "curves/num_streams/2/pdt"),
    ("decoded with 4 streams", "curves/num_streams/4/pdt"),
    ("decoded with 6 streams", "curves/num_streams/6/pdt"),
    ("coverage precision", "coverage/precision"),
    ("coverage recall", "coverage/recall"),
    ("agreement AUROC, planted", "agreement/auroc"),
    ("agreement AUROC, own text", "agreement/auroc_generated"),
    ("KL from the trunk elsewhere", "text_ce/divergence"),
)
"""Figures in which evaluated trainings are compared, and where they stand."""

FREE_RUNNING = {
    "recall, core": "curves/bus_lag/1/pdt",
    "lag 2": "curves/bus_lag/2/pdt",
    "owner follows": "curves/bus_lag/1/classes/late",
    "two hops": "two_hop/repeated/pdt",
}
"""Free-running figures of ablations: the shares of consistent references, and where they stand."""
FREE = ", free-running"
FOLLOWS = "Owner follows: of facts that a sibling repeated before their owner stated them, those that agree."

RESULTS = {True: "met", False: "missed", None: "not measured"}
ABOUT = (
    "Held-out documents of the procedural worlds ([worlds.md](../worlds.md)), free-running decoding at temperature 1. "
    "Estimates are means over training seeds. Intervals (95 %) resample seeds and documents, the same documents for "
    "every seed; seeds are few, so the single ones stand beside the mean. A lower bar is held against the estimate, "
    "an upper one against the upper end of the interval. Counts are over all seeds; what the trunk alone writes is "
    "the same for each and counts once."
)


def read_pooled(runs: Sequence[Run]) -> Pooled | None:
    """The finished evaluations among these as one; `None` where there is none."""
    done = [run for run in runs if run.result() is not None]
    if not done:
        return None
    reports = [read_json(run.folder / "evaluation.json") for run in done]
    return Pooled(reports, [read_json(run.folder / DOCUMENTS_FILE) for run in done])


def write_proof_report(
    arguments: ProofArguments, pieces: Mapping[str, Sequence[Run]], root: Path, command: str
) -> Path | None:
    """
    Writes the Markdown report, and beside it, in a folder of its name, figures and `proof.json`.

    Args:
        arguments ([`ProofArguments`]): The list.
        pieces (`Mapping`): From [`plan_pieces`].
        root (`Path`): Repository.
        command (`str`): What writes it.

    Returns:
        `Path`: The report; `None`, and nothing is written, while no seed of the main evaluation is finished.
    """
    main = read_pooled(pieces[arguments.main])
    if main is None:
        return None
    path = root / arguments.report
    folder = path.with_suffix("")
    other_tap = read_pooled(pieces[arguments.other_tap]) if arguments.other_tap else None
    pooled, bars = main.report(), check_proof(main, other_tap)
    done = [run for run in pieces[arguments.main] if run.result() is not None]
    trainings = {str(run.seed): read_training(run.after[0].model / "training_report.json") for run in done}
    figures = figures_of(pooled, trainings, folder)
    tables = [bars_table(bars, [run.seed for run in done]), recall_table(pooled), value_kinds_table(main)]
    tables += [table for table in (maker(pooled) for maker in POOLED_TABLES) if table.rows]
    tables += [
        compared_table(arguments, pieces),
        *ablation_tables(arguments, pieces, root),
        list_table(arguments, pieces),
    ]
    met = [bar["met"] for bar in bars]
    head = [
        "# The proof on procedural worlds\n",
        ABOUT + "\n",
        f"{len(done)} of {len(pieces[arguments.main])} seeds are evaluated; {met.count(True)} of {len(met)} bars are "
        f"met{f', {met.count(None)} not measured' * (None in met)}.\n",
    ]
    images = [f"![{figure.stem}]({folder.name}/{figure.name})\n" for figure in figures]
    shown = [to_markdown(table) for table in tables if table.rows]
    text = "\n".join([*head, shown[0], *images, *shown[1:], commands_of(pieces, root, command)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / "proof.json", {"bars": bars, "pooled": pooled, "command": command})
    path.write_text(text, encoding="utf-8")
    return path


def bars_table(bars: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Table:
    """Every bar with its estimate, the single seeds, and whether it is met."""
    rows = []
    for bar in bars:
        value = bar["value"] or {"n": None}
        shown = "" if bar["value"] is None else show(value) or "nothing counted"
        seeds_shown = [show(one) or "-" for one in bar["seeds"]]
        seeds_shown += [""] * (len(seeds) - len(seeds_shown))
        cells = [shown, "" if value["n"] is None else str(value["n"]), *seeds_shown]
        rows.append([bar["name"], bar["bar"], *cells, RESULTS[bar["met"]]])
    columns = ("measure", "wanted", "estimate", "n", *(f"seed {seed}" for seed in seeds), "result")
    return Table("Bars", columns, rows, "", [bool(bar["met"]) for bar in bars])


def compared_table(arguments: ProofArguments, pieces: Mapping[str, Sequence[Run]]) -> Table:
    """Evaluated trainings side by side."""
    found = {}
    for name, entry in arguments.checked.items():
        if entry.kind == "evaluate" and arguments.checked[entry.of or ""].kind == "train":
            pooled = read_pooled(pieces[name])
            if pooled is not None:
                count = len(pooled.reports)
                found[f"{entry.says} ({count} seed{'s' * (count > 1)})"] = pooled
    rows = []
    for label, path in COMPARED:
        cells = [show(_figure(pooled, path)) for pooled in found.values()]
        if any(cells):
            rows.append([label, *cells])
    note = (
        "All on held-out documents of the same split. Core documents are its first ones, hard documents those whose "
        "numbers follow: with another number of core documents (`core_documents` of the recipes) they are others, "
        f"which alone moves sequential writing as far as the table shows. {FOLLOWS}"
    )
    return Table("Recipes and trunks", ("measure", *found), rows if len(found) > 1 else [], note)


def ablation_tables(arguments: ProofArguments, pieces: Mapping[str, Sequence[Run]], root: Path) -> list[Table]:
    """What each choice buys: teacher-forced, and free-running where evaluated."""
    tables: list[Table] = []
    for name, entry in arguments.checked.items():
        source = arguments.checked.get(entry.of or "")
        if entry.kind == "ablate":
            found = [(run, run.result()) for run in pieces[name]]
            tables += _compared(entry, found, root, MEASURES, report_tables)
        elif entry.kind == "evaluate" and source is not None and source.kind == "ablate":
            found = [(run, _free_running(run)) for run in pieces[name]]
            measures = dict.fromkeys(FREE_RUNNING, HIGHER)
            tables += _compared(source, found, root, measures, partial(_free_running_tables, found=found))
    return tables


def _compared(
    entry: Entry,
    found: Sequence[tuple[Run, dict[str, Any] | None]],
    root: Path,
    measures: Mapping[str, int],
    tables: Callable[[dict[str, Any]], list[Table]],
) -> list[Table]:
    """Tables of what was found of the ablations of an entry; without a complete base only what is there."""
    values = load_yaml(root / str(entry.recipe)) | entry.options
    (ablation,) = RecipeParser(AblationArguments).parse_values(values)
    results: dict[str, dict[int, Any]] = {}
    for run, result in found:
        if result is not None:
            results.setdefault(run.case.rpartition("/")[2], {})[run.seed] = result
    complete, incomplete = split_complete(ablation, results)
    if BASE in complete:
        return tables(compare(ablation, results, measures))
    return [incomplete_table(incomplete)] if results else []


def _free_running(run: Run) -> dict[str, Any] | None:
    pooled = read_pooled([run])
    if pooled is None:
        return None
    found = {label: measure(_figure(pooled, path)) for label, path in FREE_RUNNING.items()}
    return {
        "measures": {label: one.mean for label, one in found.items() if one is not None},
        "counted": {label: one.n for label, one in found.items() if one is not None},
    }


def _free_running_tables(report: dict[str, Any], found: Sequence[tuple[Run, dict[str, Any] | None]]) -> list[Table]:
    ranges = []
    for label in report["measures"]:
        counts = [result["counted"][label] for _, result in found if result and label in result["counted"]]
        ranges += [f"{label} {min(counts)} to {max(counts)}"] if counts else []
    how = f"free-running on the same held-out documents with every seed; references of a run: {', '.join(ranges)}; "
    how += FOLLOWS[0].lower() + FOLLOWS[1:].rstrip(".")
    return [*difference_tables(report, how, FREE), incomplete_table(report["incomplete"], FREE)]


def list_table(arguments: ProofArguments, pieces: Mapping[str, Sequence[Run]]) -> Table:
    """The list of pieces: what is done, how long it took, and the commits of the code that made it."""
    rows = []
    for name, runs in pieces.items():
        results = [result for result in (run.result() for run in runs) if result is not None]
        minutes = sum(result["seconds"] for result in results) / 60
        entry = arguments.checked[name]
        states = [state for result in results for state in result.get("git", []) if state]
        code = sorted({state["sha"][:7] + (" changed" if state["dirty"] else "") for state in states})
        cells = [f"{len(results)} of {len(runs)}", f"{minutes:.0f}" if results else "", ", ".join(code)]
        rows.append([name, entry.kind, entry.says, *cells])
    return Table("Pieces", ("entry", "kind", "what it is", "done", "minutes", "code"), rows)


def commands_of(pieces: Mapping[str, Sequence[Run]], root: Path, command: str) -> str:
    """How it was made: the command of every finished piece, which reads its complete recipe."""
    done = [run for runs in pieces.values() for run in runs if run.result() is not None]
    lines = [f"python {run.script} --config {place_of(run.folder / RECIPE_FILE, root)}" for run in done]
    about = f"Written by `python {command}`. `make proof` makes all pieces; each one is a command of its own."
    return "\n".join(["## Commands", "", about, "", "```", *lines, "```", ""])


def _figure(pooled: Pooled, path: str) -> dict[str, Any] | None:
    try:
        return pooled.get(path).as_dict()
    except KeyError:
        return None
