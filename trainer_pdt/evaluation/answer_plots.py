"""Figures of whole answers and of what notes change; each saves a PNG and returns its path, or `None` without data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from .answer_tables import CONDITIONS, JUDGED
from .judge import AXES
from .plots import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, figure_of, save_figure, title_of
from .values import Measure, measure, part

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
            read = measure(part(found, key).get(name))
            _dot(axis, place, read, CONDITION_COLORS.get(name, RED))
            if read is not None:
                axis.annotate(f"{read.mean:.2f}", (read.mean, place), (0, 7), textcoords="offset points", fontsize=8.5)
        _name_rows(axis, [CONDITIONS[name] for name in names])
        axis.set_xlim(left=0)
        axis.set_xlabel("nats per token (95 % interval over documents)", fontsize=9)
        title_of(axis, title)
    return save_figure(figure, path)


def plot_judge(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    Wins minus losses against sequential answers by axis, and how often both orders agree.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        path (`Path`): PNG to write.
    """
    found = {mode: part(evaluation, "judge", mode, "axes") for mode in part(evaluation, "judge")}
    judged = [axis for axis in AXES if any(measure(part(by, axis).get("net_win_rate")) for by in found.values())]
    if not judged:
        return None
    figure, (left, right) = figure_of(10, 1.3 + 0.45 * len(judged), 2, sharey=True)
    panels = {"net_win_rate": (left, "wins - losses over sequential"), "consistent": (right, "both orders agree")}
    for key, (axis, title) in panels.items():
        for index, (mode, by) in enumerate(found.items()):
            color, marker = (BLUE, ORANGE)[index % 2], "oD"[index % 2]
            for place, name in enumerate(judged):
                look = {"label": JUDGED.get(mode, mode)} if place == 0 else {}
                height = place + 0.22 * index - 0.11
                _dot(axis, height, measure(part(by, name).get(key)), color, marker, **look)
        _name_rows(axis, judged)
        title_of(axis, title)
    left.axvline(0, color=GREY, linestyle="--", linewidth=1.2)
    left.set_xlim(-1.03, 1.03)
    right.set_xlim(-0.03, 1.03)
    right.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


def _dot(axis: Axes, height: float, read: Measure | None, color: str, marker: str = "o", **look: Any) -> None:
    """A number with its interval on a row of a dot plot."""
    if read is None:
        return
    low, high = (read.mean if bound is None else bound for bound in (read.low, read.high))
    axis.plot([low, high], [height, height], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
    axis.plot([read.mean], [height], marker, color=color, markersize=8, markeredgecolor="white", **look)


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    """A pale line and a name for each row."""
    for place in range(len(names)):
        axis.axhline(place, color=PALE, linewidth=0.7, zorder=0)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.8)
    axis.spines["left"].set_visible(False)
