"""Tables of what the sections of an answer say together, and of what notes change in it."""

from collections.abc import Mapping
from typing import Any

from .tables import MODES, Table
from .values import measure, part, scalar, show

JUDGED: dict[str, str] = {
    **MODES,
    "pdt_gate": "PDT, notes on, rollback",
    "given": "held-out documents themselves (control)",
    "planted": "the same with planted contradictions (control)",
}
"""Whose sections are held against each other, with their names for a reader."""

CONDITIONS: dict[str, str] = {
    "notes": "notes as written",
    "true_notes": "true notes",
    "no_notes": "no notes (bus off)",
    "zero_notes": "notes zeroed",
    "other_notes": "notes of another document",
    "trunk": "trunk alone",
}
"""What is on the bus while given text is read, with their names for a reader."""


JUDGE_COLUMNS: dict[str, str] = {
    "net_win_rate": "wins - losses",
    "win": "wins",
    "tie": "ties",
    "loss": "losses",
    "consistent": "both orders agree",
    "first_place": "where not: first place gains",
}
"""Measures of a judge with their names for a reader."""


SIMILARITIES: dict[str, str] = {
    "rouge_l": "ROUGE-L",
    "tf_idf_cosine": "TF-IDF cosine",
    "bert_score_f1": "BERTScore F1",
    "words_more": "words more",
}
"""Measures of two answers' likeness with their names for a reader."""


def nli_table(evaluation: Mapping[str, Any]) -> Table:
    """Contradictions between the sections of an answer, as an NLI scorer sees them."""
    found, rows = part(evaluation, "nli_violation"), []
    for name, label in JUDGED.items():
        pairs = measure(part(found, name).get("contradicting"))
        if pairs is not None:
            cells = [show(part(found, name).get(key)) for key in ("contradicting", "violation")]
            rows.append([label, *cells, "" if pairs.n is None else str(pairs.n)])
    columns = ("sections", "share of pairs that contradict", "mean violation", "pairs")
    note = f"Scorer: {scalar(found.get('scorer'))}. Every two sections of an answer, in both orders." if rows else ""
    return Table("Contradictions between sections", columns, rows, note)


def consistency_table(evaluation: Mapping[str, Any]) -> Table:
    """How much the sections of an answer repeat each other, and whether they state attributes alike."""
    found, rows = part(evaluation, "consistency"), []
    for name, label in JUDGED.items():
        values = [part(found, name).get(key) for key in ("attribute_consistency", "redundancy")]
        if any(map(show, values)):
            attributes = measure(values[0])
            count = "" if attributes is None or attributes.n is None else str(attributes.n)
            rows.append([label, show(values[0]), count, show(values[1])])
    columns = ("sections", "shared attributes stated alike", "shared attributes", "redundancy of words")
    note = "Facts are found by the parser. Redundancy: mean relu(cosine - 0.7) over pairs of sections." if rows else ""
    return Table("Consistency of the sections", columns, rows, note)


def similarity_table(evaluation: Mapping[str, Any]) -> Table:
    """Answers of each mode beside sequential ones."""
    found, rows = part(evaluation, "similarity"), []
    for name, label in {**JUDGED, "sequential": "sequential (control)"}.items():
        cells = [show(part(found, name).get(key)) for key in SIMILARITIES]
        if any(cells):
            rows.append([label, *cells])
    used = [place for place in range(len(SIMILARITIES)) if any(row[place + 1] for row in rows)]
    rows = [[row[0], *(row[place + 1] for place in used)] for row in rows]
    note = "Means over prompts, beside sequential answers with other draws; the control says what draws alone make."
    columns = ("decoding", *(list(SIMILARITIES.values())[place] for place in used))
    return Table("Answers beside sequential ones", columns, rows, note if rows else "")


def dependency_table(evaluation: Mapping[str, Any]) -> Table:
    """Cross-entropy of tokens that depend on a sibling and of the others, by what is on the bus."""
    found, rows = part(evaluation, "dependency_ce"), []
    for name, label in CONDITIONS.items():
        keys = ("dependency", "dependency_gain", "non_dependency", "non_dependency_gain")
        cells = [show(part(found, key).get(name)) for key in keys]
        if any(cells):
            rows.append([label, *cells])
    columns = ("on the bus", "dependent tokens", "gain of notes", "other tokens", "gain of notes there")
    note = "Sections given, nats per token. Dependent: tokens of repeated facts that a visible note can have told."
    return Table("What notes change", columns, rows, note if rows else "")


def usage_table(evaluation: Mapping[str, Any]) -> Table:
    """Shares of attention, and whether it goes to the note that tells."""
    found, rows = part(evaluation, "note_usage"), []
    labels = {
        "gate": "gate of SNC",
        "sink": "attention to the sink",
        "plan": "attention to the plan",
        "notes": "attention to siblings' notes",
        "source": "of that, to the round that stated the repeated fact",
        "source_even": "- if all visible rounds got the same (control)",
    }
    for name, label in labels.items():
        read = measure(found.get(name))
        if read is not None:
            rows.append([label, show(found[name]), "" if read.n is None else str(read.n)])
    note = "Parallel decoding, per block; the last two over repeated facts whose statement the block could see."
    return Table("Use of notes", ("measure", "value", "n"), rows, note if rows else "")


def judge_rows(label: str, report: Mapping[str, Any]) -> list[list[str]]:
    """A row per axis of what [`~trainer_pdt.evaluation.judge.judge_pairs`] found, or one that there is nothing."""
    rows = []
    for axis in part(report, "axes"):
        cells = [show(part(report, "axes", axis).get(name)) for name in JUDGE_COLUMNS]
        if any(cells):
            rows.append([label, axis, *cells])
    if not rows and report.get("stopped"):
        rows.append([label, "", "not judged", *[""] * (len(JUDGE_COLUMNS) - 1)])
    return rows


def judge_table(evaluation: Mapping[str, Any], reference: str = "sequential answers") -> Table:
    """Wins of answers over those of a reference, as a chat model sees them in both orders."""
    comparisons, rows, notes = part(evaluation, "judge"), [], []
    for mode in comparisons:
        label, report = JUDGED.get(mode, mode), part(comparisons, mode)
        rows += judge_rows(label, report)
        notes += judge_notes(label, report)
    columns = ("answers", "judged by", *JUDGE_COLUMNS.values())
    return Table(f"Judged against {reference}", columns, rows, " ".join(notes) if rows else "")


def judge_notes(label: str, report: Mapping[str, Any]) -> list[str]:
    """Who judged how many pairs, whether the place decided, and why some pairs have no verdict."""
    notes = [f"{label}: {scalar(report.get('judged'))} of {scalar(report.get('pairs'))} pairs judged by "]
    notes[0] += f"{scalar(report.get('model'))}, wins and losses hold in both orders."
    bias = part(report, "axes", "overall").get("bias")
    if bias:
        notes.append(f"This judge prefers what stands {bias}, whatever it is: see how often both orders agree.")
    if report.get("stopped"):
        notes.append(f"Not all pairs were judged: {report['stopped']}")
    return notes


ANSWER_TABLES = (nli_table, consistency_table, similarity_table, judge_table, dependency_table, usage_table)
"""Makers of these tables, in order."""
