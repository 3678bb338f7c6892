"""Figures of what notes change; each saves a PNG and returns its path, or `None` without data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .answer_tables import CONDITIONS
from .plots import BLUE, GREEN, GREY, PALE, PURPLE, RED, figure_of, save_figure, title_of
from .values import measure, part

CONDITION_COLORS = {"notes": BLUE, "true_notes": GREEN, "other_notes": PURPLE, "trunk": GREY}


def plot_dependency(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    Cross-entropy of tokens that depend on a sibling, and of the others, by what is on the bus.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        path (`Path`): PNG to write.
    """
    found = part(evaluation, "dependency_ce")
    panels = {"tokens that depend on a sibling": "dependency", "other tokens": "non_dependency"}
    names = [name for name in CONDITIONS if any(measure(part(found, key).get(name)) for key in panels.values())]
    if not names:
        return None
    figure, axes = figure_of(10, 1.1 + 0.36 * len(names), 2, sharey=True)
    for axis, (title, key) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            axis.axhline(place, color=PALE, linewidth=0.7, zorder=0)
            read = measure(part(found, key).get(name))
            if read is not None:
                color = CONDITION_COLORS.get(name, RED)
                low, high = (read.mean if bound is None else bound for bound in (read.low, read.high))
                axis.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
                axis.plot([read.mean], [place], "o", color=color, markersize=8, markeredgecolor="white")
                axis.annotate(f"{read.mean:.2f}", (read.mean, place), (0, 7), textcoords="offset points", fontsize=8.5)
        axis.set_yticks(range(len(names)), [CONDITIONS[name] for name in names])
        axis.set_ylim(len(names) - 0.4, -0.8)
        axis.set_xlim(left=0)
        axis.set_xlabel("nats per token (95 % interval over documents)", fontsize=9)
        axis.spines["left"].set_visible(False)
        title_of(axis, title)
    return save_figure(figure, path)
