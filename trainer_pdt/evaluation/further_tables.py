"""Tables of the sections that have documents of their own: upper bounds, two hops, factors of decoding."""

from collections.abc import Mapping
from typing import Any

from .tables import MODES, Table
from .values import counted, measure, part, show

WAYS: dict[str, str] = {
    **{mode: MODES[mode] for mode in ("pdt", "ablated", "sequential", "full_text")},
    "note_text": "streams read each other's facts as text, as many tokens as notes",
}
"""Ways of writing, with their names for a reader."""

HOPS = {
    "linked": "linked fact: equals a sibling's fact",
    "repeated": "repeats a sibling's linked fact, which that sibling could read",
    "guessed": "repeats a sibling's linked fact, which that sibling had to guess",
}

FACTORS = {
    "bus_lag": "lag",
    "num_streams": "streams",
    "block_size": "tokens per block",
    "bus_capacity": "rounds kept on the bus",
    "agreement_threshold": "threshold of the gate",
}
"""Factors of decoding, with their names for a reader."""


def bounds_table(evaluation: Mapping[str, Any]) -> Table:
    """Recall by notes against text of the same size, and what could be reached, on the same core documents."""
    rows, found = [], part(evaluation, "note_text")
    for way, name in WAYS.items():
        read = measure(found.get(way))
        if read is not None:
            rows.append([name, show(found[way]), "" if read.n is None else str(read.n)])
    note = "Facts as text are found by the parser, the most favourable text of that size." if rows else ""
    return Table("Upper bounds, core documents", ("decoding", "recall", "references"), rows, note)


def hops_table(evaluation: Mapping[str, Any]) -> Table:
    """Facts over one and over two hops."""
    rows = []
    for hop, label in HOPS.items():
        found = part(evaluation, "two_hop", hop)
        cells = [counted(found.get(way)) for way in ("pdt", "ablated", "sequential")]
        if any(cells):
            rows.append([label, *cells])
    columns = ("fact", *(MODES[way] for way in ("pdt", "ablated", "sequential")))
    note = "Share of consistent references and, in brackets, their number; where the source is visible."
    return Table("Two hops", columns, rows, note if rows else "")


def curve_table(evaluation: Mapping[str, Any]) -> Table:
    """Recall by factor of decoding, nothing retrained."""
    rows = []
    for factor, label in FACTORS.items():
        for value, point in part(evaluation, "curves", factor).items():
            ways = [show(point.get(way)) for way in ("pdt", "ablated", "sequential")]
            if any(ways):
                same = counted(part(point, "classes").get("same"))
                rows.append([label, value, *ways, counted(part(point, "classes").get("feasible")), same])
    columns = ("factor", "value", *(MODES[way] for way in ("pdt", "ablated", "sequential")))
    note = "Every row counts with its own lag and capacity. A class: share of consistent references and their number."
    return Table("Factors of decoding", (*columns, "visible earlier round", "same round"), rows, note if rows else "")


def threshold_table(evaluation: Mapping[str, Any]) -> Table:
    """What the gate does at other thresholds."""
    rows = []
    for value, point in part(evaluation, "curves", "agreement_threshold").items():
        cells = [show(point.get("rate")), counted(point.get("same_round"))]
        rows.append([value, *cells, str(point.get("blocks_rolled", "")), str(point.get("blocks", ""))])
    columns = ("threshold", "consistent references", "same round", "blocks rolled back", "blocks")
    return Table("Thresholds of the gate", columns, rows)


FURTHER_TABLES = (bounds_table, hops_table, curve_table, threshold_table)
"""Makers of these tables, in order."""
