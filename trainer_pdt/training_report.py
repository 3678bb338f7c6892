"""The report of a training run for people: Markdown, and one HTML page with curves per stage.

python -m trainer_pdt.training_report build/demo/model
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .evaluation.page import Section, render_page
from .evaluation.plots import log_history, plot_gradients, plot_learning
from .evaluation.report import read_training
from .evaluation.tables import Table, health_table, mixes_table, to_markdown
from .evaluation.values import measure
from .gradient_norms import norm_files
from .telemetry import REPORT_FILE

logger = logging.getLogger(__name__)

TITLE = "Parallel Decoder Transformer: training"
PAGE_FILE, MARKDOWN_FILE, PLOTS_FOLDER = "training_report.html", "training_report.md", "training_plots"
EVALUATED = "eval_"


def write_training_report(folder: str | Path) -> Path:
    """
    Write `training_report.html` (self-contained), `training_report.md` and `training_plots/*.png`.

    Args:
        folder (`str` or `Path`): Of the run, with `training_report.json`; stage history and manifest are read where
            they are there.

    Returns:
        `Path`: The page.
    """
    folder = Path(folder)
    plots = folder / PLOTS_FOLDER
    training, norms = read_training(folder / REPORT_FILE), read_gradient_norms(folder)
    whole = plot_learning(training, plots / "all.png")
    sections = [
        Section("Run", _shown(stages_table(training), health_of(training), gates_table(training)), []),
        Section("Skipped steps", _shown(skipped_table(training)), []),
        Section("Curves", [], [whole] if whole else []),
        Section("Held-out documents", _shown(held_out_table(training), mixes_table(last_evaluation(training))), []),
    ]
    for index, stage in enumerate(training["stages"], start=1):
        logs, lines = stage_logs(training, stage), stage_norms(norms, stage)
        figures = [
            plot_learning({"logs": logs}, plots / f"stage_{index}.png"),
            plot_gradients(lines, plots / f"gradients_{index}.png"),
        ]
        tables = _shown(values_table(training, stage), gradients_table(lines))
        sections.append(Section(f"Stage {stage['name']}", tables, [path for path in figures if path]))
    sections = [section for section in sections if section.tables or section.figures]
    command = training["training"].get("command")
    commands = [command] if command else []
    page = render_page(TITLE, summary_of(training), tiles_of(training), sections, [], commands)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    (folder / MARKDOWN_FILE).write_text(markdown_of(training, sections, folder), encoding="utf-8")
    return folder / PAGE_FILE


def _shown(*tables: Table) -> list[Table]:
    return [table for table in tables if table.rows]


def stage_logs(training: Mapping[str, Any], stage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Log entries with a loss that fall into a stage: after its first step, up to and including its last."""
    return [
        entry
        for entry in log_history(training)
        if "loss" in entry and stage["first_step"] < entry["step"] <= stage["last_step"]
    ]


def read_gradient_norms(folder: Path) -> list[dict[str, Any]]:
    """
    Lines of a run's `gradient_norms_from_*.jsonl`, by step; what a continuation measured again counts once, as it
    measured it. A last line that was cut off by the end of its process is left out.

    Args:
        folder (`Path`): Of the run.
    """
    lines: dict[int, dict[str, Any]] = {}
    for first, path in norm_files(folder).items():
        lines = {step: line for step, line in lines.items() if step < first}
        # A line without its end was being written when the process died.
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def stage_norms(lines: Sequence[Mapping[str, Any]], stage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lines of gradient norms that a stage wrote; their `step` counts the steps finished before."""
    return [line for line in lines if stage["first_step"] <= line["step"] < stage["last_step"]]


def gradients_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Norm of the gradient of every weighted loss of a stage, and the parameter groups that it reaches."""
    rows = []
    for name in dict.fromkeys(name for line in lines for name in line["losses"]):
        found = [line["losses"][name] for line in lines if name in line["losses"]]
        norms = [read.mean for entry in found if (read := measure(entry["all"])) is not None]
        groups = sorted(
            {group for entry in found for group, norm in entry.items() if norm and group not in ("all", "weight")}
        )
        if norms:
            figures = (found[-1]["weight"], norms[0], norms[-1], mean(norms), max(norms))
            rows.append([name, *(f"{figure:.4g}" for figure in figures), ", ".join(groups), str(len(norms))])
    columns = ("loss", "weight", "first", "last", "mean", "largest", "reaches", "lines")
    note = "Norms of the weighted losses' gradients, of one micro-batch, before clipping." if rows else ""
    return Table("Gradient norms", columns, rows, note)


def gates_table(training: Mapping[str, Any]) -> Table:
    """Mean gate of every site; 0 shuts notes out, 1 lets them through."""
    gates = [read.mean for gate in training.get("gates") or [] if (read := measure(gate)) is not None]
    note = "From the lowest layer up, between 0 (shut) and 1." if gates else ""
    return Table("Gates", ("site", "mean gate"), [[str(n), f"{gate:.4f}"] for n, gate in enumerate(gates)], note)


def skipped_table(training: Mapping[str, Any]) -> Table:
    """Steps that changed nothing, because their loss or gradient was not finite or far above the usual."""
    rows = [
        [str(entry["step"]), str(entry["reason"]), ", ".join(map(str, entry.get("documents") or []))]
        for entry in training.get("skipped") or []
    ]
    return Table("Skipped steps", ("step", "reason", "documents"), rows)


def last_evaluation(training: Mapping[str, Any]) -> dict[str, Any]:
    """`{"teacher_forced": measures}` of the last evaluation, names without `eval_`; empty when there was none."""
    evaluations = [entry for entry in log_history(training) if any(key.startswith(EVALUATED) for key in entry)]
    last = evaluations[-1] if evaluations else {}
    names = {key.removeprefix(EVALUATED): value for key, value in last.items() if key.startswith(EVALUATED)}
    return {"teacher_forced": names}


def health_of(training: Mapping[str, Any]) -> Table:
    """Health of the last evaluation."""
    return health_table(last_evaluation(training))


def summary_of(training: Mapping[str, Any]) -> list[str]:
    """How far the run is and how long it took, in a sentence; missing numbers are left out."""
    facts = [
        ("{} of {} optimizer steps", (training.get("step"), training.get("max_steps"))),
        ("{:.1f} minutes", (_minutes(training),)),
        ("{} s per step", (training.get("seconds_per_step"),)),
        ("seed {}", (training["training"].get("seed"),)),
    ]
    told = [text.format(*values) for text, values in facts if None not in values]
    return [", ".join(told) + "."] if told else []


def _minutes(training: Mapping[str, Any]) -> float | None:
    seconds = measure(training.get("seconds"))
    return None if seconds is None else seconds.mean / 60


def tiles_of(training: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures of the last evaluation that exist."""
    found = last_evaluation(training)["teacher_forced"]
    entries = (
        ("repeated values right", "sibling_value_accuracy", "notes on, sections given"),
        ("without notes", "sibling_value_accuracy_ablated", "nothing but the plan on the bus"),
        ("KL from the trunk elsewhere", "other_kl_trunk", "nats per token that no sibling decides"),
    )
    return [
        {"name": name, "value": f"{read.mean:.2f}", "detail": detail}
        for name, key, detail in entries
        if (read := measure(found.get(key))) is not None
    ]


def stages_table(training: Mapping[str, Any]) -> Table:
    """The curriculum as it was carried out."""
    rows = [
        [
            str(stage["name"]),
            f"{stage['first_step'] + 1} to {stage['last_step']}",
            ", ".join(stage.get("train") or []),
            ", ".join(f"{name} {weight:g}" for name, weight in (stage.get("losses") or {}).items()),
        ]
        for stage in training["stages"]
    ]
    return Table("Stages", ("stage", "steps", "what learnt", "losses"), rows)


def values_table(training: Mapping[str, Any], stage: Mapping[str, Any]) -> Table:
    """First, last, mean, smallest and largest logged value of every loss of a stage."""
    logs = stage_logs(training, stage)
    names = dict.fromkeys(key for entry in logs for key in entry if key == "loss" or key.startswith("loss_"))
    rows = []
    for name in [*names, "grad_norm"]:
        values = [read.mean for entry in logs if (read := measure(entry.get(name))) is not None]
        if values:
            figures = (values[0], values[-1], mean(values), min(values), max(values))
            rows.append([name, *(f"{figure:.4f}" for figure in figures), str(len(values))])
    columns = ("value", "first", "last", "mean", "smallest", "largest", "logs")
    note = "Parts are means since the log before, without their weights." if rows else ""
    return Table(f"Stage {stage['name']}", columns, rows, note)


def held_out_table(training: Mapping[str, Any]) -> Table:
    """Every measure of the last evaluation that is no speed and was taken with the bus of decoding."""
    skipped = ("runtime", "samples_per_second", "steps_per_second")
    rows = [
        [name, f"{read.mean:g}" if name.startswith("n_") else f"{read.mean:.4f}"]
        for name, value in last_evaluation(training)["teacher_forced"].items()
        if name not in skipped and "_mix_" not in name and (read := measure(value)) is not None
    ]
    return Table("Held-out documents", ("measure", "last evaluation"), rows)


def markdown_of(training: Mapping[str, Any], sections: Sequence[Section], folder: Path) -> str:
    """
    The report as Markdown with links to its figures.

    Args:
        training (`dict`): From `read_training`.
        sections (`list[Section]`): What the page shows.
        folder (`Path`): Where the file will lie.
    """
    blocks = [f"# {TITLE}\n", *(line + "\n" for line in summary_of(training))]
    for section in sections:
        blocks.append(f"## {section.title}\n")
        blocks += [f"![{path.stem}]({path.relative_to(folder).as_posix()})\n" for path in section.figures]
        blocks += [to_markdown(table, 0 if table.title == section.title else 3) for table in section.tables]
    command = training["training"].get("command")
    if command:
        blocks.append(f"## Command\n\n```\n{command}\n```\n")
    return "\n".join(blocks)


def main(args: Sequence[str] | None = None) -> None:
    """
    Write the report of a run.

    Args:
        args (`Sequence[str]`, *optional*, defaults to the command line): The run's folder.
    """
    parser = argparse.ArgumentParser(description="Report of a training run: page, Markdown, figures.")
    parser.add_argument("folder", type=Path, help="output_dir of the run, with training_report.json")
    options = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("wrote %s", write_training_report(options.folder))


if __name__ == "__main__":
    main()
