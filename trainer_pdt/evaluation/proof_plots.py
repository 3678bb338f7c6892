"""Figures of the proof: learning curves of all seeds, recall by factors of decoding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .further_tables import FACTORS
from .plots import BLUE, GREEN, GREY, ORANGE, RED, SKY, figure_of, log_history, plot_recall, save_figure, title_of
from .values import measure, part

LEARNING = {
    "eval_sibling_value_accuracy": "repeated values, all tokens right",
    "eval_sibling_ce": "cross-entropy of repeated facts (nats)",
    "eval_other_kl_trunk": "KL from the trunk elsewhere (nats)",
}
WAYS = {"pdt": (BLUE, "notes on"), "sequential": (GREEN, "sequential"), "ablated": (RED, "bus off")}
SEED_COLORS = (BLUE, ORANGE, GREEN, SKY, RED)


def plot_seeds(trainings: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """
    Held-out measures by optimizer step, one line per seed, stages marked.

    Args:
        trainings (`Mapping`): From [`read_training`], by name of the seed.
        path (`Path`): PNG to write.
    """
    if not any(_points(training, name) for training in trainings.values() for name in LEARNING):
        return None
    figure, axes = figure_of(11, 3.2, columns=len(LEARNING))
    for axis, (name, label) in zip(axes, LEARNING.items(), strict=True):
        for color, (seed, training) in zip(SEED_COLORS, trainings.items(), strict=False):
            if points := _points(training, name):
                axis.plot(*zip(*points, strict=True), color=color, label=f"seed {seed}")
        for stage in next(iter(trainings.values())).get("stages", []):
            axis.axvline(stage["first_step"], color=GREY, linewidth=0.7, linestyle=":")
        axis.set_xlabel("optimizer step", fontsize=9)
        title_of(axis, label)
    axes[0].legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def _points(training: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    return [(e["step"], e[name]) for e in log_history(training) if measure(e.get(name)) is not None]


def plot_factors(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    Recall by factor of decoding, with intervals.

    Args:
        evaluation (`Mapping`): Of [`Pooled.report`], with `curves`.
        path (`Path`): PNG to write.
    """
    factors = [name for name in FACTORS if any("pdt" in point for point in part(evaluation, "curves", name).values())]
    if not factors:
        return None
    figure, axes = figure_of(3.4 * len(factors), 3.2, columns=len(factors), sharey=True)
    for axis, factor in zip(axes, factors, strict=True):
        points = part(evaluation, "curves", factor)
        for way, (color, label) in WAYS.items():
            found = [(place, measure(point.get(way))) for place, point in enumerate(points.values())]
            kept = [(place, read) for place, read in found if read is not None]
            if not kept:
                continue
            axis.plot([x for x, _ in kept], [read.mean for _, read in kept], "o-", color=color, label=label)
            for x, read in kept:
                if read.low is not None and read.high is not None:
                    axis.plot([x, x], [read.low, read.high], color=color, linewidth=3, alpha=0.4)
        axis.set_xticks(range(len(points)), list(points))
        axis.legend(fontsize=8, frameon=False)
        axis.set_ylim(-0.02, 1.04)
        title_of(axis, FACTORS[factor])
    axes[0].set_ylabel("sibling-fact recall", fontsize=9)
    return save_figure(figure, path)


def figures_of(pooled: Mapping[str, Any], trainings: Mapping[str, Mapping[str, Any]], folder: Path) -> Sequence[Path]:
    """All figures that have data."""
    made = (
        plot_recall(pooled, folder / "recall.png"),
        plot_factors(pooled, folder / "factors.png"),
        plot_seeds(trainings, folder / "learning.png"),
    )
    return [path for path in made if path is not None]
