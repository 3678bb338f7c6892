"""Report about decoding runs: their measures side by side, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .decode_metrics import flatten
from .decode_runs import DecodeRun
from .evaluation.plots import BLUE, GREY, ORANGE, RED
from .evaluation.tables import Table, to_markdown
from .evaluation.values import scalar

# Layers that a manifest names although the model that wrote it ran none of them.
ORIGINAL_NOTE = (
    "{names}: written by the original system, whose notes, gates and layers never reached its trunk "
    "and whose streams were written one after another; its speeds say nothing about parallel decoding."
)


def _label(path: str, names: Sequence[str]) -> str:
    """The shortest end of a path that no other run's name shares."""
    parts = Path(path).parts
    for length in range(1, len(parts) + 1):
        tail = "/".join(parts[-length:])
        if sum(name == path or name.endswith("/" + tail) for name in names) == 1:
            return tail
    return path


def labels(runs: Sequence[DecodeRun]) -> list[str]:
    """Short names of runs, each its own."""
    names = [Path(run.name).as_posix() for run in runs]
    return [_label(name, names) for name in names]


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every number of every run: a row per measure, a column per run."""
    flat = {label: flatten(values) for label, values in metrics.items()}
    names = list(dict.fromkeys(name for values in flat.values() for name in values))
    rows = [[name, *(scalar(values[name]) if name in values else "" for values in flat.values())] for name in names]
    return Table("Runs", ("measure", *metrics), rows)


def aggregate_table(aggregated: Mapping[str, Mapping[str, float]]) -> Table:
    """Mean, least and largest of every measure."""
    rows = [
        [name, *(scalar(values[key]) for key in ("mean", "min", "max", "n"))] for name, values in aggregated.items()
    ]
    return Table("Over all runs", ("measure", "mean", "least", "largest", "runs"), rows)


def comparison_table(comparisons: Mapping[str, Mapping[str, Any]], baseline: str) -> Table:
    """Every run beside the baseline."""
    names = list(next(iter(comparisons.values())))
    rows = [
        [label, *("" if values[name] is None else scalar(values[name]) for name in names)]
        for label, values in comparisons.items()
    ]
    return Table(f"Beside {baseline}", ("run", *names), rows)


def plot_blocks(run: DecodeRun, path: Path) -> Path | None:
    """
    What happened at the block boundaries of a run: agreement of every block in order, withdrawn ones marked, and the
    lengths of what was withdrawn.
    """
    judged = [(score, withdrawn) for _, score, withdrawn in run.judged if score is not None]
    if not judged:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for withdrawn, color, marker, name in ((False, BLUE, "o", "stands"), (True, RED, "x", "withdrawn")):
        places = [index for index, (_, gone) in enumerate(judged) if gone == withdrawn]
        left.plot(places, [judged[i][0] for i in places], marker, color=color, markersize=5, label=name)
    left.set(xlabel="judged block", ylabel="agreement", ylim=(-0.02, 1.02))
    left.legend(frameon=False, fontsize=9)
    lengths = [tokens for blocks in run.rollbacks.values() for tokens in blocks]
    right.hist(lengths, bins=range(1, max(lengths, default=1) + 2), color=ORANGE, align="left")
    right.set(xlabel="tokens withdrawn at once", ylabel="blocks")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=GREY, labelsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    return path


def report_markdown(tables: Sequence[Table], figures: Mapping[str, Path], runs: Sequence[DecodeRun]) -> str:
    """Tables and figures as one Markdown page."""
    parts = ["# Decoding runs\n", *(to_markdown(table) for table in tables if table.rows)]
    parts += [f"## Blocks of {label}\n\n![{label}]({path.name})\n" for label, path in figures.items()]
    original = [run.name for run in runs if run.original]
    if original:
        parts.append(ORIGINAL_NOTE.format(names=", ".join(original)) + "\n")
    return "\n".join(parts)
