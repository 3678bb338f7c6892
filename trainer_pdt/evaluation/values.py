"""Numbers of an evaluation as they stand in its JSON, and as text. What is missing becomes nothing, never a zero."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """
    A number with, where it is a share, its 95 % interval and count.

    Args:
        mean (`float`): The number.
        low, high (`float`, *optional*): Interval.
        n (`int`, *optional*): What was counted.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


def measure(value: Any) -> Measure | None:
    """
    Read a number or `{mean, low, high, n}`.

    Args:
        value (`float`, `dict` or `None`): As it stands in `evaluation.json`.

    Returns:
        [`Measure`], or `None` when there is no finite number.
    """
    if isinstance(value, Mapping):
        mean, low, high = (_finite(value.get(key)) for key in ("mean", "low", "high"))
        n = value.get("n")
        count = n if isinstance(n, int) and not isinstance(n, bool) else None
        return None if mean is None else Measure(mean, low, high, count)
    mean = _finite(value)
    return None if mean is None else Measure(mean)


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def show(value: Any) -> str:
    """Return a number or measure in words a reader can check: `0.612 (0.560 to 0.661)`; empty when it is missing."""
    read = measure(value)
    if read is None:
        return ""
    interval = f" ({read.low:.3f} to {read.high:.3f})" if read.low is not None and read.high is not None else ""
    return f"{read.mean:.3f}{interval}"


def scalar(value: Any) -> str:
    """A setting or a detail as text; whole numbers stay whole."""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".") if math.isfinite(value) else ""
    if isinstance(value, Mapping):
        return show(value)
    return "" if value is None else str(value)


def part(evaluation: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping under `keys`, empty when one of them is missing."""
    current: Any = evaluation
    for key in keys:
        current = current.get(key) if isinstance(current, Mapping) else None
    return current if isinstance(current, Mapping) else {}


def counted(value: Any) -> str:
    """A measure with its count, `0.612 (412)`; empty when it is missing."""
    read = measure(value)
    if read is None:
        return ""
    return f"{read.mean:.3f}" + ("" if read.n is None else f" ({read.n})")


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and text of all scalars and measures in nested mappings; lists and missing values are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key.removesuffix('_s')}".replace("_", " ") + (" (s)" if key.endswith("_s") else "")
        if isinstance(value, Mapping) and measure(value) is None:
            pairs += flat(value, f"{name}: ")
        elif not isinstance(value, list | tuple) and scalar(value):
            pairs.append((name, scalar(value)))
    return pairs
