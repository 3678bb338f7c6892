"""Figures of an evaluation, one function per figure; each saves a PNG and returns its path, or `None` without data.

Colours are the palette of Okabe and Ito, which colour-blind readers can tell apart; shape or text repeats every
distinction that a colour makes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .tables import MODES
from .values import measure, part

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE, DASHES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY), ("-", "--", ":")
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"
KINDS = ("", "_core", "_hard", "_trained_values", "_heldout_values")
MODE_COLORS = {
    **dict.fromkeys((f"pdt{kind}" for kind in KINDS), BLUE),
    **dict.fromkeys((f"{mode}{kind}" for mode in ("sequential", "full_text") for kind in KINDS), GREEN),
    **dict.fromkeys(("swapped_follow", "swapped_own"), PURPLE),
}
"""Colours by group of modes: notes on, references with text, swapped notes; all others are controls without notes."""

KINDS = {
    **{"train": (BLUE, ""), "held out": (ORANGE, "o"), "bus off": (RED, "D"), "trunk alone": (GREEN, "s")},
    **{"true notes 0.35": (SKY, "^"), "true notes 1": (PURPLE, "v")},
}
"""Colour and marker by kind of learning curve; another share of true notes is grey."""


def figure_of(
    width: float, height: float, columns: int = 1, rows: int = 1, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the house style, sizes in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=9, length=3)
    return figure, list(axes.flat)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    return path


def title_of(axis: Axes, text: str) -> None:
    """A panel's title."""
    axis.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)


def _whisker(axis: Axes, y: float, value: Any, color: str, marker: str = "o") -> None:
    """A dot with its interval and its number, on a row of a dot plot over 0 to 1."""
    read = measure(value)
    if read is None:
        return
    low, high = (read.mean if bound is None else bound for bound in (read.low, read.high))
    axis.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
    axis.plot([read.mean], [y], marker, color=color, markersize=8, markeredgecolor="white")
    axis.text(max(high, read.mean) + 0.02, y, f"{read.mean:.2f}", va="center", fontsize=9, color=INK)


def plot_recall(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    Sibling-fact recall by decoding mode with intervals, and the line of chance.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        path (`Path`): PNG to write.
    """
    recall = part(evaluation, "sibling_fact_recall")
    modes = [mode for mode in MODES if measure(recall.get(mode)) is not None]
    if not modes:
        return None
    figure, (axis,) = figure_of(9, 0.9 + 0.36 * len(modes))
    for place, mode in enumerate(modes):
        axis.axhline(place, color=PALE, linewidth=0.7, zorder=0)
        _whisker(axis, place, recall[mode], MODE_COLORS.get(mode, RED), "o" if mode in MODE_COLORS else "D")
    chance = measure(part(evaluation, "chance").get("overall"))
    if chance is not None:
        axis.axvline(chance.mean, color=GREY, linestyle="--", linewidth=1.2)
        axis.text(chance.mean, -0.75, f"chance {chance.mean:.2f}", ha="center", fontsize=8.5, color=GREY)
    axis.set_yticks(range(len(modes)), [MODES[mode] for mode in modes])
    axis.set_ylim(len(modes) - 0.4, -1.0)
    axis.set_xlim(-0.01, 1.09)
    axis.set_xlabel("references that repeat the fact their sibling chose (95 % interval over documents)", fontsize=9)
    axis.spines["left"].set_visible(False)
    title_of(axis, "Sibling-fact recall, free-running decoding")
    return save_figure(figure, path)


def log_history(training: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """
    The log entries of a run, from `training_report.json` (`logs`) or `trainer_state.json` (`log_history`).

    Args:
        training (`dict`, *optional*): Parsed file.
    """
    for key in ("log_history", "logs"):
        entries = (training or {}).get(key)
        if isinstance(entries, list):
            return [entry for entry in entries if isinstance(entry, Mapping) and measure(entry.get("step"))]
    return []


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """
    Curves by panel: panel name -> kind of `KINDS` -> points (step, value).

    A panel is a loss, a loss part (`loss_*`), `grad_norm` or a held-out measure (`eval_*`, beside it its control, or
    the same with true notes on the bus); timings, counts and rates are left out.

    Args:
        history (`list[dict]`): Log entries with `step`.
    """
    known = {key for entry in history for key in entry}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in history:
        for key, value in entry.items():
            name, read = key.removeprefix("eval_"), measure(value)
            kind = "held out" if name != key else "train"
            wanted = kind != "train" or name in ("loss", "grad_norm") or name.startswith("loss_")
            skipped = (
                key == "eval_loss" or name.startswith(("n_", "runtime", "model_")) or name.endswith("_per_second")
            )
            if kind == "held out" and "_mix_" in name:
                name, _, share = name.rpartition("_mix_")
                kind = f"true notes {share}"
            for ending, control in (("_ablated", "bus off"), ("_trunk", "trunk alone")):
                if name.endswith(ending) and key.removesuffix(ending) in known:
                    name, kind = name.removesuffix(ending), control
            if wanted and not skipped and read is not None:
                panels.setdefault(name, {}).setdefault(kind, []).append((float(entry["step"]), read.mean))
    order = sorted(panels, key=lambda name: (name != "loss", "held out" not in panels[name], name))
    return {name: panels[name] for name in order}


def plot_learning(training: Mapping[str, Any] | None, path: Path) -> Path | None:
    """
    Learning curves as small multiples, one panel per loss part or held-out measure, stages marked.

    Args:
        training (`dict`, *optional*): `training_report.json` or `trainer_state.json`, with `stages` to mark.
        path (`Path`): PNG to write.
    """
    panels = curves(log_history(training))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = figure_of(3.6 * columns, 0.5 + 2.3 * rows, columns, rows, sharex=True)
    stages = [stage for stage in (training or {}).get("stages") or [] if isinstance(stage, Mapping)]
    for index, (axis, (name, lines)) in enumerate(zip(axes, panels.items(), strict=False)):
        for kind, points in lines.items():
            color, marker = KINDS.get(kind, (GREY, "x"))
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.5, label=kind)
        axis.set_title(name.replace("_", " "), loc="left", fontsize=9.5, color=INK)
        if len(lines) > 1 or index == 0:
            axis.legend(frameon=False, fontsize=8)
        _mark_stages(axis, stages, index < columns)
        if index + columns >= len(panels):
            axis.set_xlabel("optimizer step", fontsize=9)
            axis.tick_params(labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return save_figure(figure, path)


def plot_gradients(lines: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """
    Gradient norms over steps on a logarithmic scale: of each weighted loss, and of their sum by parameter group.

    Args:
        lines (`list[dict]`): Lines of `gradient_norms_from_*.jsonl`.
        path (`Path`): PNG to write.
    """
    by_loss: dict[str, list[tuple[float, float]]] = {}
    by_group: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        groups = {name: value for name, value in line["total"].items() if name != "all"}
        for found, values in ((by_loss, {k: v["all"] for k, v in line["losses"].items()}), (by_group, groups)):
            for name, value in values.items():
                if (read := measure(value)) is not None and read.mean > 0:
                    found.setdefault(name, []).append((float(line["step"]), read.mean))
    if not by_loss:
        return None
    figure, axes = figure_of(10.8, 3.2, 2, sharex=True, sharey=True)
    for axis, curves_of, title in zip(
        axes, (by_loss, by_group), ("by weighted loss", "by parameter group"), strict=True
    ):
        for index, (name, points) in enumerate(sorted(curves_of.items())):
            color, dash = PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]
            axis.plot(*zip(*points, strict=True), dash, color=color, marker="o", markersize=3, label=name)
        axis.set_yscale("log")
        axis.set_title(f"gradient norm {title}", loc="left", fontsize=9.5, color=INK)
        axis.set_xlabel("finished optimizer steps", fontsize=9)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(figure, path)


def _mark_stages(axis: Axes, stages: Sequence[Mapping[str, Any]], named: bool) -> None:
    """A line where a stage begins; its name on the first row of panels."""
    for stage in stages:
        start = measure(stage.get("first_step", stage.get("start")))
        if start is None:
            continue
        axis.axvline(start.mean, color=GREY, linestyle=":", linewidth=1)
        if named:
            where = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "left", "va": "top"}
            back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
            axis.text(start.mean, 0.97, f" {stage.get('name', '')}", fontsize=7, color=GREY, bbox=back, **where)


def plot_agreement(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    ROC of the agreement head (planted contradictions, own text) and its area beside the controls.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        path (`Path`): PNG to write.
    """
    agreement = part(evaluation, "agreement")
    controls = part(agreement, "controls")
    lines = [
        (agreement.get("roc"), "planted", BLUE, "-"),
        (agreement.get("roc_generated"), "own generated text", ORANGE, "--"),
    ]
    areas = [
        ("head, planted", agreement.get("auroc"), BLUE, "o"),
        ("head, own generated text", agreement.get("auroc_generated"), ORANGE, "o"),
        ("notes zeroed", agreement.get("zeroed_notes"), RED, "D"),
        ("'block holds a reference'", controls.get("reference_present"), RED, "D"),
        ("log p(no bus) - log p(notes)", controls.get("logp_gap"), RED, "D"),
        ("same on own text", controls.get("logp_gap_generated"), RED, "D"),
    ]
    areas = [area for area in areas if measure(area[1]) is not None]
    if not areas and not any(line[0] for line in lines):
        return None
    figure, (left, right) = figure_of(10, 4, 2)
    left.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    for points, name, color, style in lines:
        if points:
            left.plot(*zip(*points, strict=True), style, color=color, linewidth=2, label=name)
    if any(line[0] for line in lines):
        left.legend(frameon=False, fontsize=9, loc="lower right")
    left.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel="sound blocks flagged", ylabel="contradictions flagged")
    title_of(left, "Agreement head, ROC")
    right.axvline(0.5, color=GREY, linestyle="--", linewidth=1.2)
    for place, (_, value, color, marker) in enumerate(areas):
        right.axhline(place, color=PALE, linewidth=0.7, zorder=0)
        _whisker(right, place, value, color, marker)
    right.set_yticks(range(len(areas)), [area[0] for area in areas])
    right.set(xlim=(0, 1.1), ylim=(len(areas) - 0.4, -0.6), xlabel="area under the ROC (0.5 = guessing)")
    right.spines["left"].set_visible(False)
    title_of(right, "Head and controls")
    return save_figure(figure, path)


def plot_coverage(evaluation: Mapping[str, Any], path: Path) -> Path | None:
    """
    Precision over recall of the coverage head on generated text, operating points marked.

    Args:
        evaluation (`dict`): Content of `evaluation.json`.
        path (`Path`): PNG to write.
    """
    coverage = part(evaluation, "coverage")
    curve = [point for point in coverage.get("curve") or [] if all(measure(value) for value in point[:2])]
    marks = [
        ("decoding threshold", coverage, BLUE, "o"),
        ("plan wordings never trained", part(coverage, "heldout_wordings"), ORANGE, "D"),
    ]
    points = [
        (name, measure(entry.get("recall")), measure(entry.get("precision")), color, marker)
        for name, entry, color, marker in marks
    ]
    points = [point for point in points if point[1] is not None and point[2] is not None]
    if not curve and not points:
        return None
    figure, (left, right) = figure_of(10, 4, 2)
    if curve:
        left.plot([point[0] for point in curve], [point[1] for point in curve], color=SKY, linewidth=2)
    for name, recall, precision, color, marker in points:
        label = f"{name}: {precision.mean:.3f} / {recall.mean:.3f}"
        left.plot([recall.mean], [precision.mean], marker, color=color, markersize=9, label=label)
    if points:
        left.legend(frameon=False, fontsize=8.5, loc="best", title="precision / recall", title_fontsize=8.5)
    values = [value for point in curve for value in point[:2]] + [m.mean for point in points for m in point[1:3]]
    low = max(0.0, min([*values, 0.9]) - 0.05)
    left.set(xlim=(low, 1.005), ylim=(low, 1.005), xlabel="recall", ylabel="precision")
    title_of(left, "Coverage per block and plan item")
    steps = [point for point in curve if len(point) > 2 and measure(point[2])]
    for column, name, color, style in ((1, "precision", BLUE, "-"), (0, "recall", ORANGE, "--")):
        axis_values = [point[column] for point in steps]
        right.plot([point[2] for point in steps], axis_values, style, color=color, linewidth=2, label=name)
    right.set(xlim=(0, 1), ylim=(low, 1.005), xlabel="threshold")
    right.legend(frameon=False, fontsize=9, loc="best")
    right.set_visible(bool(steps))
    title_of(right, "By threshold")
    return save_figure(figure, path)


def plot_timeline(example: Mapping[str, Any], path: Path) -> Path | None:
    """
    Blocks and rollbacks of one answer: a row per stream, over trunk calls.

    Args:
        example (`dict`): Entry of `examples` in `evaluation.json`.
        path (`Path`): PNG to write.
    """
    events = [event for event in example.get("events") or [] if event.get("kind") in ("commit", "rollback")]
    streams = example.get("streams") or []
    if not events or not streams:
        return None
    figure, (axis,) = figure_of(10, 1.4 + 0.62 * len(streams))
    began = [0.0] * len(streams)
    for event in sorted(events, key=lambda event: event["call"]):
        stream, call = event["stream"], float(event["call"])
        _draw_block(axis, began[stream], call, stream, event)
        began[stream] = call
    axis.set_yticks(range(len(streams)), [str(stream.get("header", "")) for stream in streams])
    axis.set(
        ylim=(len(streams) - 0.45, -0.65), xlim=(0, max(began) * 1.005), xlabel="trunk calls (one token per stream)"
    )
    axis.spines["left"].set_visible(False)
    looks = {"committed": (BLUE, None), "withdrawn": (RED, "////"), "written again": (GREEN, None)}
    handles = [
        Rectangle((0, 0), 1, 1, facecolor="white" if hatch else color, edgecolor=color, hatch=hatch, label=name)
        for name, (color, hatch) in looks.items()
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8.5, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    title_of(axis, "Blocks of one answer, numbers are rounds")
    return save_figure(figure, path)


def _draw_block(axis: Axes, start: float, end: float, stream: int, event: Mapping[str, Any]) -> None:
    """One block: filled when it stands, hatched when it was withdrawn; its round and agreement inside."""
    withdrawn, again = event["kind"] == "rollback", event.get("attempt", 0) > 0
    color = RED if withdrawn else GREEN if again else BLUE
    face, hatch, ink = ("white", "////", RED) if withdrawn else (color, None, "white")
    look = {"facecolor": face, "edgecolor": "white" if not withdrawn else color, "hatch": hatch, "linewidth": 1}
    axis.add_patch(Rectangle((start, stream - 0.34), end - start, 0.68, **look))
    score = measure(event.get("agreement"))
    text = str(event["round"]) + ("" if score is None else f"\n{score.mean:.2f}")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if withdrawn else None
    axis.text((start + end) / 2, stream, text, ha="center", va="center", fontsize=8, color=ink, bbox=box)
