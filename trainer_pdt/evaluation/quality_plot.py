"""The figure of a dataset's quality report."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plots import BLUE, GREEN, ORANGE, figure_of, save_figure, title_of

MAX_REASONS = 10


def plot_quality(report: Mapping[str, Any], path: Path) -> Path:
    """
    Documents that each stage kept, why the others were turned away, and streams per document.

    Args:
        report (`Mapping`): `quality_report.json` of a build.
        path (`Path`): PNG that is written.
    """
    figure, (kept, reasons, streams) = figure_of(10.0, 3.2, columns=3)
    stages = report["stages"]
    turned = [sum(stage["rejects"].values()) for stage in stages.values()]
    rows = [stage["rows"] for stage in stages.values()]
    kept.bar(list(stages), rows, color=BLUE, label="kept")
    kept.bar(list(stages), turned, bottom=rows, color=ORANGE, hatch="//", label="rejected")
    kept.legend(frameon=False, fontsize=8)
    title_of(kept, "documents by stage")
    counts: Counter[str] = Counter()
    for stage in stages.values():
        counts.update(stage["rejects"])
    common = counts.most_common(MAX_REASONS)[::-1]
    reasons.barh([name.replace("_", " ") for name, _ in common], [count for _, count in common], color=ORANGE)
    title_of(reasons, "reasons of rejection")
    numbers: Counter[str] = Counter()
    for split in report["splits"].values():
        numbers.update(split["streams"])
    streams.bar([int(number) for number in numbers], list(numbers.values()), color=GREEN)
    streams.set_xticks(sorted(map(int, numbers)))
    title_of(streams, "exported documents by streams")
    return save_figure(figure, path)
