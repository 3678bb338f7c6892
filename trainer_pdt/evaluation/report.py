"""Writes the report of an evaluation: `index.html`, `evaluation.md`, figures, and the results in the README.

python -m trainer_pdt.evaluation.report build/demo/evaluation.json --training build/demo/model/training_report.json
python -m trainer_pdt.evaluation.report --readme build/demo/evaluation.json
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..telemetry import MANIFEST_FILE, STAGE_HISTORY_FILE, read_json
from .answer_plots import plot_dependency, plot_judge
from .answer_tables import (
    ANSWER_TABLES,
    consistency_table,
    dependency_table,
    judge_table,
    nli_table,
    similarity_table,
    usage_table,
)
from .further_tables import FURTHER_TABLES
from .page import Section, answer_of, render_page
from .plots import plot_agreement, plot_coverage, plot_learning, plot_recall, plot_timeline
from .tables import (
    Table,
    all_tables,
    bars_table,
    calibration_table,
    cue_table,
    heads_table,
    health_table,
    mixes_table,
    recall_table,
    rollback_table,
    settings_table,
    speed_table,
    text_table,
    timing_table,
    to_markdown,
)
from .values import measure, part

logger = logging.getLogger(__name__)

TITLE = "Parallel Decoder Transformer: evaluation"
PAGE_FILE, MARKDOWN_FILE, PLOTS_FOLDER = "index.html", "evaluation.md", "plots"
RESULTS_START, RESULTS_END = "<!-- results:start -->", "<!-- results:end -->"
MAX_ANSWERS = 3


def write_report(evaluation: Mapping[str, Any], training: Mapping[str, Any] | None, folder: str | Path) -> Path:
    """
    Write `index.html` (self-contained), `evaluation.md` and `plots/*.png`.

    A number that is missing leaves its row out; a figure without data is not made.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        training (`dict`, *optional*): From [`read_training`], or the content of `training_report.json`.
        folder (`str` or `Path`): Where to write.

    Returns:
        `Path`: The page.
    """
    folder = Path(folder)
    plots = folder / PLOTS_FOLDER
    if training is not None and not part(evaluation, "settings", "training"):
        settings = {**part(evaluation, "settings"), "training": part(training, "training")}
        evaluation = {**evaluation, "settings": settings}
    figures = {
        "recall": plot_recall(evaluation, plots / "recall.png"),
        "agreement": plot_agreement(evaluation, plots / "agreement.png"),
        "coverage": plot_coverage(evaluation, plots / "coverage.png"),
        "judge": plot_judge(evaluation, plots / "judge.png"),
        "dependency": plot_dependency(evaluation, plots / "dependency.png"),
        "learning": plot_learning(training, plots / "learning.png"),
    }
    examples = list(evaluation.get("examples") or [])[:MAX_ANSWERS]
    timelines = [plot_timeline(example, plots / f"timeline_{i}.png") for i, example in enumerate(examples, start=1)]
    unfolded = most_telling(examples)
    answers = [
        answer_of(index + 1, example, timelines[index], index == unfolded) for index, example in enumerate(examples)
    ]
    page = render_page(
        TITLE,
        summary_of(evaluation),
        tiles_of(evaluation),
        sections_of(evaluation, figures),
        answers,
        commands_of(evaluation),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    shown = [figure for figure in (*figures.values(), *timelines) if figure is not None]
    (folder / MARKDOWN_FILE).write_text(markdown_of(evaluation, shown, folder), encoding="utf-8")
    return folder / PAGE_FILE


def read_training(path: str | Path) -> dict[str, Any]:
    """
    Read what a training run left behind.

    Args:
        path (`str` or `Path`): `training_report.json`; stage history and manifest are read where they lie beside it.

    Returns:
        `dict`: The report, `stages`, and `training` with `seed`, `steps`, `seconds` and `command` where known.
    """
    path = Path(path)
    report = read_json(path)
    history, manifest = path.with_name(STAGE_HISTORY_FILE), path.with_name(MANIFEST_FILE)
    stages = read_json(history)["stages"] if history.is_file() else []
    run = read_json(manifest) if manifest.is_file() else {}
    facts = {
        **{"seed": run.get("seed"), "steps": report.get("step"), "seconds": report.get("seconds")},
        "command": run.get("command"),
    }
    return {
        **report,
        "stages": stages,
        "training": {name: value for name, value in facts.items() if value is not None},
    }


def most_telling(examples: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the first example with a rollback, 0 when there is none."""
    for index, example in enumerate(examples):
        if any(event["kind"] == "rollback" for event in example.get("events") or []):
            return index
    return 0


def sections_of(evaluation: Mapping[str, Any], figures: Mapping[str, Path | None]) -> list[Section]:
    """
    The page's sections that have anything to show.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        figures (`dict`): PNG by name; missing or `None` where there was no data.
    """
    layout = (
        ("Bars", (bars_table,), ()),
        ("Sibling-fact recall", (recall_table, timing_table), ("recall",)),
        ("Coverage and agreement", (heads_table, calibration_table), ("agreement", "coverage")),
        ("Rollback", (rollback_table,), ()),
        ("Whole answers", (nli_table, consistency_table, similarity_table, judge_table), ("judge",)),
        ("Bounds and factors of decoding", FURTHER_TABLES, ()),
        ("Notes", (dependency_table, usage_table), ("dependency",)),
        ("Notes, sections given", (health_table, mixes_table), ()),
        ("Text and plan", (text_table,), ()),
        ("Speed", (speed_table,), ()),
        ("Training", (), ("learning",)),
        ("Settings", (settings_table, cue_table), ()),
    )
    sections = []
    for title, makers, names in layout:
        tables = [table for table in (maker(evaluation) for maker in makers) if table.rows]
        images = [path for path in map(figures.get, names) if path is not None]
        if tables or images:
            sections.append(Section(title, tables, images))
    return sections


def summary_of(evaluation: Mapping[str, Any]) -> list[str]:
    """Return what the page is about and how this run did, in sentences."""
    settings, training = part(evaluation, "settings"), part(evaluation, "settings", "training")
    lines = [
        "Several streams write the sections of one answer at the same time and see each other only through notes. The "
        "request and the plan never contain a fact's value, so a stream can repeat a sibling's fact only if the notes "
        "carry it.",
    ]
    facts = [
        ("{} held-out documents", _documents(settings.get("documents"))),
        ("{} times as many for the controls with a bar", settings.get("control_factor")),
        ("sampling at temperature {}", settings.get("temperature")),
        ("one training seed ({})", training.get("seed")),
        ("{} training steps", training.get("steps")),
        ("{} minutes of training", _minutes(training.get("seconds"))),
    ]
    told = [text.format(value) for text, value in facts if value is not None]
    if told:
        lines.append("This run: " + ", ".join(told) + ".")
    met = bars_table(evaluation).met
    if met:
        verdict = "all bars" if all(met) else f"{met.count(True)} of {len(met)} bars; the others are marked as missed"
        lines.append(f"It met {verdict}.")
    return lines


def _documents(count: Any) -> str | None:
    if isinstance(count, Mapping):
        return " and ".join(f"{number} {kind}" for kind, number in count.items()) or None
    return None if count is None else str(count)


def _minutes(seconds: Any) -> str | None:
    read = measure(seconds)
    return None if read is None else f"{read.mean / 60:.1f}"


def tiles_of(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the headline figures that exist."""
    recall = part(evaluation, "sibling_fact_recall")
    entries = (
        ("recall with notes", recall.get("pdt"), "sibling facts repeated as the sibling stated them"),
        ("without the bus", recall.get("ablated"), "same adapters, no note visible"),
        ("chance", part(evaluation, "chance").get("overall"), "value of a random other document"),
        ("follows swapped notes", recall.get("swapped_follow"), "notes of another document shown"),
    )
    tiles = [
        {"name": name, "value": f"{read.mean:.2f}", "detail": detail}
        for name, value, detail in entries
        if (read := measure(value)) is not None
    ]
    speed = measure(part(evaluation, "speed").get("parallel_vs_single"))
    if speed is not None:
        detail = "over one stream, same trunk and loop"
        tiles.append({"name": "wall-clock speed-up", "value": f"{speed.mean:.2f}×", "detail": detail})
    return tiles


def commands_of(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the recorded commands: training first, then evaluation."""
    settings = part(evaluation, "settings")
    commands = [part(settings, "training").get("command"), settings.get("command")]
    return [command if isinstance(command, str) else " ".join(command) for command in commands if command]


def markdown_of(evaluation: Mapping[str, Any], figures: Sequence[Path], folder: Path) -> str:
    """
    Return the report as Markdown with links to its figures.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        figures (`list[Path]`): PNG files inside `folder`.
        folder (`Path`): Where the file will lie.
    """
    blocks = [f"# {TITLE}\n", *(line + "\n" for line in summary_of(evaluation))]
    further = [table for maker in (*ANSWER_TABLES, *FURTHER_TABLES) if (table := maker(evaluation)).rows]
    blocks += [to_markdown(table) for table in (*all_tables(evaluation), *further)]
    blocks += [f"![{path.stem.replace('_', ' ')}]({path.relative_to(folder).as_posix()})\n" for path in figures]
    commands = commands_of(evaluation)
    if commands:
        blocks.append("## Commands\n\n```\n" + "\n".join(commands) + "\n```\n")
    return "\n".join(blocks)


def readme_results(evaluation: Mapping[str, Any]) -> str:
    """
    Return what stands between the README's result markers: the run in a sentence, the bars, recall by mode and by the
    time at which the owner stated the fact.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
    """
    shown = (bars_table, recall_table, timing_table)
    tables: list[Table] = [table for table in (make(evaluation) for make in shown) if table.rows]
    if not tables:
        raise ValueError("evaluation: holds neither `bars` nor `sibling_fact_recall`, must hold at least one of them")
    blocks = [
        *(line + "\n" for line in summary_of(evaluation)[1:]),
        *(to_markdown(table, level=0) for table in tables),
    ]
    return "\n".join(blocks)


def update_readme(readme: str | Path, evaluation: Mapping[str, Any]) -> Path:
    """
    Replace what stands between the result markers of a README.

    Args:
        readme (`str` or `Path`): File that holds both markers, in order.
        evaluation (`dict`): Content of `evaluation.json`.
    """
    readme = Path(readme)
    text = readme.read_text(encoding="utf-8")
    if text.count(RESULTS_START) != 1 or RESULTS_END not in text.split(RESULTS_START)[1]:
        raise ValueError(f"{readme}: must hold {RESULTS_START} once, and {RESULTS_END} behind it")
    head, rest = text.split(RESULTS_START)
    tail = rest.split(RESULTS_END, 1)[1]
    body = f"{RESULTS_START}\n{readme_results(evaluation)}{RESULTS_END}"
    readme.write_text(head + body + tail, encoding="utf-8")
    return readme


def main(args: Sequence[str] | None = None) -> None:
    """
    Write the report, or the README's results.

    Args:
        args (`Sequence[str]`, *optional*, defaults to the command line): Words after the program's name.
    """
    parser = argparse.ArgumentParser(
        description="Report of an evaluation: page, Markdown, figures; or README results."
    )
    parser.add_argument("evaluation", type=Path, help="evaluation.json")
    parser.add_argument("--training", type=Path, help="training_report.json of the run, for learning curves")
    parser.add_argument("--folder", type=Path, help="where to write; default: beside evaluation.json")
    parser.add_argument("--readme", action="store_true", help="update the results in README.md and write nothing else")
    parser.add_argument("--readme_file", type=Path, default=Path("README.md"), help="README that holds the markers")
    options = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluation = read_json(options.evaluation)
    if options.readme:
        logger.info("updated %s", update_readme(options.readme_file, evaluation))
        return
    training = read_training(options.training) if options.training else None
    logger.info("wrote %s", write_report(evaluation, training, options.folder or options.evaluation.parent))


if __name__ == "__main__":
    main()
