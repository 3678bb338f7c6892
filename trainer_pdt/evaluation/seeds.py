"""One table over several training seeds of a recipe: every bar by seed, mean and spread.

python -m trainer_pdt.evaluation.seeds build/seed*/evaluation.json --output docs/benchmarks/demo/seeds.md
"""

import argparse
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..telemetry import read_json
from .tables import Table, to_markdown
from .values import part

logger = logging.getLogger(__name__)


def seed_of(evaluation: Mapping[str, Any]) -> str:
    """The training seed that an evaluation says it measured, `"?"` where it does not."""
    return str(part(evaluation, "settings", "training").get("seed", "?"))


def seeds_table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """
    Every bar by seed; whether it is met is decided by the mean.

    Args:
        evaluations (`Sequence[dict]`): Contents of `evaluation.json`, one per seed, of the same recipe.

    Raises:
        ValueError: For fewer than two evaluations, or when they were held against different bars.
    """
    if len(evaluations) < 2:
        raise ValueError(f"evaluations: {len(evaluations)} given, must be at least 2.")
    bars = [{bar["name"]: bar for bar in evaluation["bars"]} for evaluation in evaluations]
    if any(list(rows) != list(bars[0]) for rows in bars):
        raise ValueError("evaluations: they were held against different bars, must be of one recipe.")
    rows, met = [], []
    for name, bar in bars[0].items():
        values = [found[name]["value"] for found in bars]
        mean, (comparison, limit) = statistics.mean(values), bar["bar"].split()
        met.append(mean >= float(limit) if comparison == ">=" else mean <= float(limit))
        cells = [f"{value:.3f}" for value in (*values, mean, statistics.stdev(values))]
        rows.append([name, *cells, bar["bar"], "met" if met[-1] else "missed"])
    seeds = [f"seed {seed_of(evaluation)}" for evaluation in evaluations]
    columns = ("measure", *seeds, "mean", "standard deviation", "bar", "by the mean")
    note = (
        "A bar at chance, or on swapped notes, is held against the upper end of each seed's 95 % interval; the others "
        "against the estimate. Where chance differs by seed, the bar is the first seed's."
    )
    return Table("Training seeds", columns, rows, note, met)


def main(args: Sequence[str] | None = None) -> None:
    """
    Write the table.

    Args:
        args (`Sequence[str]`, *optional*, defaults to the command line): Words after the program's name.
    """
    parser = argparse.ArgumentParser(description="One table over several training seeds of a recipe.")
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation.json of every seed")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table = to_markdown(seeds_table([read_json(path) for path in options.evaluations]))
    command = (
        f"python -m trainer_pdt.evaluation.seeds {' '.join(map(str, options.evaluations))} --output {options.output}"
    )
    options.output.write_text(f"{table}\nWritten by `{command}`.\n", encoding="utf-8")
    logger.info("wrote %s", options.output)


if __name__ == "__main__":
    main()
