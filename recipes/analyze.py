"""Measures decoding runs: `python recipes/analyze.py --manifests runs/a.json runs/b.json --output_folder runs/report`

Reads manifests of `recipes/decode.py` and of the original system. With `--baseline` every run is also set beside one,
with `--judge` by a chat model. Writes `analysis.json`, `analysis.md` and a figure per run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer_pdt.decode_metrics import aggregate, compare_texts, run_metrics
from trainer_pdt.decode_report import (
    aggregate_table,
    comparison_table,
    labels,
    metrics_table,
    plot_blocks,
    report_markdown,
)
from trainer_pdt.decode_runs import check_comparable, paired_answers, read_run
from trainer_pdt.evaluation.answer_tables import judge_table
from trainer_pdt.evaluation.judge import judge_pairs, make_judge
from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import command_line, write_json


@dataclass
class AnalyzeArguments:
    manifests: list[str] = field(metadata={"help": "Manifests to measure."})
    output_folder: str = field(metadata={"help": "Folder for the report."})
    baseline: str | None = field(default=None, metadata={"help": "Manifest that the others are set beside."})
    judge: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of a judge that compares answers with the baseline's."}
    )
    coverage_threshold: float = field(default=0.5, metadata={"help": "Probability that counts as covered."})
    partial_band: float = field(default=0.2, metadata={"help": "Within it of the threshold an item is partial."})

    def __post_init__(self) -> None:
        if self.judge and self.baseline is None:
            raise ValueError(f"judge={self.judge}, allowed: none without a baseline whose answers it compares with.")
        if not 0 <= self.partial_band <= min(self.coverage_threshold, 1 - self.coverage_threshold):
            raise ValueError(
                f"partial_band must be in [0, {min(self.coverage_threshold, 1 - self.coverage_threshold):.2f}] with "
                f"coverage_threshold={self.coverage_threshold}, got {self.partial_band}."
            )


def main(args: list[str] | None = None) -> dict:
    """Reads, measures, compares, writes; returns what was written to `analysis.json`."""
    (arguments,) = RecipeParser(AnalyzeArguments).parse(args)
    folder = Path(arguments.output_folder)
    runs = [read_run(path) for path in arguments.manifests]
    baseline = read_run(arguments.baseline) if arguments.baseline is not None else None
    check_comparable([*([baseline] if baseline else []), *runs])
    names = labels(runs)
    metrics = {
        name: run_metrics(run, arguments.coverage_threshold, arguments.partial_band)
        for name, run in zip(names, runs, strict=True)
    }
    report: dict = {"command": command_line(), "runs": metrics}
    tables = [metrics_table(metrics)]
    if len(runs) > 1:
        report["aggregate"] = aggregate(list(metrics.values()))
        tables.append(aggregate_table(report["aggregate"]))
    if baseline is not None:
        report["baseline"] = {name: compare_texts(run, baseline) for name, run in zip(names, runs, strict=True)}
        tables.append(comparison_table(report["baseline"], baseline.name))
    if arguments.judge:
        judge = make_judge(arguments.judge, folder / "judge.sqlite")
        report["judge"] = {
            name: judge_pairs(judge, paired_answers(run, baseline)) for name, run in zip(names, runs, strict=True)
        }
        tables.append(judge_table(report, baseline.name))
    figures = {
        name: figure
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
        if (figure := plot_blocks(run, folder / f"blocks_{index}.png")) is not None
    }
    write_json(folder / "analysis.json", report)
    (folder / "analysis.md").write_text(report_markdown(tables, figures, runs), encoding="utf-8")
    print(f"analyze: {len(runs)} runs, wrote {folder / 'analysis.md'}")
    return report


if __name__ == "__main__":
    main()
