"""Where recall is lost: core and hard documents apart, by what the value is that the owner stated."""

from collections.abc import Mapping, Sequence

from .pooled import Pooled
from .tables import MODES, Table
from .values import counted

KINDS = ("values that training states", "values never trained on", "no value of the cue")


def value_kinds_table(pooled: Pooled) -> Table:
    """Recall by mode, kind of document and kind of value."""
    rows = []
    for mode in ("pdt", "sequential", "full_text"):
        path = f"sibling_fact_recall/{mode}"
        if f"{path}_core" not in pooled.documents[0]:
            continue
        cores = len(pooled.documents[0][f"{path}_core"])
        for kind, place in (("core", slice(cores)), ("hard", slice(cores, None))):
            seeds = [by_kind(found, path, place) for found in pooled.documents]
            cells = [counted(pooled.rate_of(path, [kinds[name] for kinds in seeds]).as_dict()) for name in KINDS]
            rows.append([MODES[f"{mode}_{kind}"], *cells])
    note = (
        "Share of consistent references to facts of earlier, visible rounds and, in brackets, their number. "
        "No value of the cue: what the owner stated, sampled at temperature 1, is none of the values that the cue has."
    )
    return Table("What is lost, by what the owner stated", ("decoding", *KINDS), rows, note)


def by_kind(documents: Mapping[str, Sequence], path: str, place: slice) -> dict[str, list[tuple[int, int]]]:
    """Hits and references of some documents, which come core ones first, for each of [`KINDS`]."""
    names = (path, f"{path}_trained_values", f"{path}_heldout_values")
    every, trained, never = ([tuple(pair) for pair in documents[name][place]] for name in names)
    rest = [(a - b - c, m - n - o) for (a, m), (b, n), (c, o) in zip(every, trained, never, strict=True)]
    return dict(zip(KINDS, (trained, never, rest), strict=True))
