"""Tables of an evaluation, made once for the page, the Markdown file and the README. A missing number has no row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bars import check_health
from .values import counted, flat, measure, part, scalar, show

MODES: dict[str, str] = {
    "pdt": "PDT, notes on",
    "pdt_core": "PDT, notes on, core documents",
    "pdt_hard": "PDT, notes on, hard documents",
    "pdt_trained_values": "PDT, notes on, values that training states",
    "pdt_heldout_values": "PDT, notes on, values never trained on",
    "independent": "independent streams (trunk only)",
    "ablated": "bus off",
    "zero_notes": "notes zeroed",
    "gate_zero": "SNC gate 0",
    "self_only": "own notes only",
    "norm_scramble": "notes scrambled, norms kept",
    "swapped_follow": "notes of another document: follows them",
    "swapped_own": "notes of another document: its own fact",
    "sequential": "sequential, same trunk",
    "sequential_core": "sequential, core documents",
    "sequential_hard": "sequential, hard documents",
    "sequential_trained_values": "sequential, values that training states",
    "sequential_heldout_values": "sequential, values never trained on",
    "full_text": "streams read each other's text",
    "full_text_core": "streams read each other's text, core documents",
    "full_text_hard": "streams read each other's text, hard documents",
    "full_text_trained_values": "streams read each other's text, values that training states",
    "full_text_heldout_values": "streams read each other's text, values never trained on",
}
"""Decoding modes in the order in which they are shown, with their names for a reader."""

TIMINGS: dict[str, str] = {
    "feasible": "visible earlier round",
    "pending": "earlier round, hidden by the lag",
    "same": "same round",
    "late": "later round",
    "evicted": "no longer on the bus",
    "any": "all that the owner states",
    "never": "the owner leaves it out",
}
"""Classes of references: when the owner stated the fact, all of these, and those to what it never states."""

FLAGS: dict[str, str] = {
    "none": "no rollback",
    "head": "agreement head, fresh notes",
    "head_stale": "agreement head, stale notes (control)",
    "random": "random blocks, fresh notes (control)",
    "oracle": "exactly the contradicting blocks, fresh notes (control)",
    "oracle_stale": "exactly the contradicting blocks, stale notes (control)",
}
"""What decides on a rollback."""


@dataclass(frozen=True)
class Table:
    """
    A table of text.

    Args:
        title (`str`): Heading.
        columns (`tuple[str]`): Column names.
        rows (`list[list[str]]`): Cells.
        note (`str`, *optional*): How to read it.
        met (`list[bool]`, *optional*): Per row, whether a bar was met; only for tables of bars.
        folded (`bool`, *optional*, defaults to `False`): Long and seldom read; folded away on the page.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""
    met: list[bool] | None = None
    folded: bool = False


def _rows(entries: Sequence[tuple[str, Any]]) -> list[list[str]]:
    """Rows name, value, interval, n of the measures that exist."""
    rows = []
    for name, value in entries:
        read = measure(value)
        if read is not None:
            interval = "" if read.low is None or read.high is None else f"{read.low:.3f} to {read.high:.3f}"
            rows.append([name, f"{read.mean:.3f}", interval, "" if read.n is None else str(read.n)])
    return rows


def bars_table(evaluation: Mapping[str, Any]) -> Table:
    """What the system promises, what this run measured, and whether that is enough."""
    rows, met = [], []
    for bar in evaluation.get("bars") or []:
        read = measure(bar.get("value"))
        value = show(bar.get("value")) if read else scalar(bar.get("value"))
        if value:
            count = f", n = {read.n}" if read and read.n is not None else ""
            rows.append([str(bar["name"]), value + count, scalar(bar.get("bar")), "met" if bar["met"] else "missed"])
            met.append(bool(bar["met"]))
    note = (
        "One run. A bar at chance, or on swapped notes, is compared with the upper end of the interval, the others "
        "with the estimate."
    )
    return Table("Bars", ("bar", "measured", "wanted", "result"), rows, note, met)


def recall_table(evaluation: Mapping[str, Any]) -> Table:
    """Sibling-fact recall by decoding mode, with chance and references emitted."""
    recall, emitted = part(evaluation, "sibling_fact_recall"), part(evaluation, "references_emitted")
    rows = [
        [*row, show(emitted.get(mode))] for mode, label in MODES.items() for row in _rows([(label, recall.get(mode))])
    ]
    chance = measure(part(evaluation, "chance").get("overall"))
    if chance is not None:
        rows.append(["chance", f"{chance.mean:.3f}", "", "", ""])
    columns = ("decoding", "recall", "95 % interval", "references", "emitted, relative to sequential")
    note = (
        "Share of references whose value is the one the owner stated in an earlier, visible round. Intervals resample "
        "documents. Chance: the value of a random other document for that cue."
    )
    return Table("Sibling-fact recall", columns, rows, note)


def timing_table(evaluation: Mapping[str, Any]) -> Table:
    """Recall by the time at which the owner stated the fact; one column per class that occurs."""
    classes = part(evaluation, "reference_classes")
    used = [name for name in TIMINGS if any(counted(part(classes, mode).get(name)) for mode in MODES)]
    rows = []
    for mode, label in MODES.items():
        cells = [counted(part(classes, mode).get(name)) for name in used]
        if any(cells):
            rows.append([label, *cells])
    note = "Share of consistent references and, in brackets, their number. Small numbers say little."
    return Table("When the owner stated the fact", ("decoding", *(TIMINGS[name] for name in used)), rows, note)


def heads_table(evaluation: Mapping[str, Any]) -> Table:
    """Coverage and agreement heads with their controls."""
    coverage, agreement = part(evaluation, "coverage"), part(evaluation, "agreement")
    wordings, point = part(coverage, "heldout_wordings"), part(agreement, "operating_point")
    rows = _rows(
        [
            ("coverage precision", coverage.get("precision")),
            ("coverage recall", coverage.get("recall")),
            ("coverage F1", coverage.get("f1")),
            ("coverage, area under precision-recall", coverage.get("average_precision")),
            ("coverage precision, plan wordings never trained", wordings.get("precision")),
            ("coverage recall, plan wordings never trained", wordings.get("recall")),
            *_agreement_rows(agreement, "", "planted contradictions"),
            *_agreement_rows(agreement, "_generated", "own generated text"),
            ("contradicting blocks flagged at the threshold", agreement.get("repaired")),
            ("sound blocks flagged at the threshold", agreement.get("false_rollback")),
            ("agreement threshold", agreement.get("threshold")),
            ("contradicting blocks flagged at the operating point", point.get("repaired")),
            ("sound blocks flagged at the operating point", point.get("false_rollback")),
            ("threshold of the operating point", point.get("threshold")),
        ]
    )
    counts = [
        f"{name}: {agreement[f'blocks{suffix}']} blocks, {agreement[f'positives{suffix}']} contradict"
        for suffix, name in (("", "planted"), ("_generated", "own text"))
        if isinstance(agreement.get(f"blocks{suffix}"), int) and isinstance(agreement.get(f"positives{suffix}"), int)
    ]
    note = "Agreement is scored over blocks that hold a reference whose owner stated the fact in a visible or the "
    note += "same round" + (f" ({'; '.join(counts)})." if counts else ".")
    note = note if agreement else ""
    return Table("Coverage and agreement", ("measure", "value", "95 % interval", "n"), rows, note)


def calibration_table(evaluation: Mapping[str, Any]) -> Table:
    """How the thresholds were set, and how good the heads are on the documents that set them."""
    labels = {
        "coverage": "coverage",
        "agreement": "agreement, own text",
        "agreement_judgeable": "agreement, judgeable blocks of own text",
        "agreement_planted": "agreement, planted contradictions",
    }
    names = ("threshold", "precision", "recall", "f1", "auroc", "average_precision", "expected_calibration_error")
    entries, rules = [], []
    for key, label in labels.items():
        report = part(evaluation, "calibration", key)
        entries += [(f"{label}: {name.replace('_', ' ')}", report.get(name)) for name in names]
        if report.get("rule"):
            rules.append(f"{label}: {report['rule']}")
    scaling = part(evaluation, "calibration", "agreement").get("agreement_scaling")
    if scaling is not None:
        rules.append("an agreement is the sigmoid of {:.2f} times the head's logit {:+.2f}".format(*scaling))
    note = "Validation documents; intervals resample documents." + "".join(f" {rule}." for rule in rules)
    rows = _rows(entries)
    return Table("Calibration", ("measure", "value", "95 % interval", "n"), rows, note if rows else "")


def health_table(evaluation: Mapping[str, Any]) -> Table:
    """Measures with a healthy range, and what it may mean to be outside."""
    found = check_health(part(evaluation, "teacher_forced"))
    rows = [
        [row["name"], show(row["value"]), row["bar"], row["means"], "ok" if row["met"] else "look"] for row in found
    ]
    columns = ("measure", "value", "healthy", "outside", "result")
    note = "Ranges say where to look; they are not bars. docs/metrics.md defines the measures." if rows else ""
    return Table("Health", columns, rows, note, [row["met"] for row in found])


def mixes_table(evaluation: Mapping[str, Any]) -> Table:
    """Measures of the notes by share of true notes on the bus."""
    measures = part(evaluation, "teacher_forced")
    mixed = [name.rpartition("_mix_") for name in measures if "_mix_" in name]
    shares = sorted({share for _, _, share in mixed}, key=float)
    rows = []
    for name in sorted({name for name, _, _ in mixed}):
        cells = [show(measures.get(key)) for key in (name, *(f"{name}_mix_{share}" for share in shares))]
        if any(cells):
            rows.append([name, *cells])
    note = "Sections given. The columns are shares of true notes among the blocks that have one." if rows else ""
    return Table("True notes on the bus", ("measure", "0 (decoding)", *shares), rows, note)


def _agreement_rows(agreement: Mapping[str, Any], suffix: str, text: str) -> list[tuple[str, Any]]:
    controls = part(agreement, "controls")
    return [
        (f"agreement AUROC, {text}", agreement.get(f"auroc{suffix}")),
        ("- expected calibration error", agreement.get(f"expected_calibration_error{suffix}")),
        ("- control: head with zeroed notes", agreement.get(f"zeroed_notes{suffix}")),
        ("- control: log p(no bus) - log p(fresh notes)", controls.get(f"logp_gap{suffix}")),
        (f"agreement AUROC, {text}, all blocks", agreement.get(f"auroc_all_blocks{suffix}")),
        ("- control: 'block holds a reference'", controls.get(f"reference_present{suffix}")),
    ]


def rollback_table(evaluation: Mapping[str, Any]) -> Table:
    """Consistent and contradictory references with and without rollback."""
    rollback = part(evaluation, "rollback")
    rows = []
    for key, label in FLAGS.items():
        entry = part(rollback, key)
        cells = [
            *(scalar(entry.get(name)) for name in ("consistent", "contradictory")),
            *(show(entry.get("rate")), counted(entry.get("same_round")), scalar(entry.get("blocks_rolled"))),
        ]
        if any(cells):
            rows.append([label, *cells])
    columns = ("what is rewritten", "consistent", "contradictory", "rate", "same round", "blocks rolled back")
    note = (
        "Rewriting alone changes a result, because it samples again. What the notes add is the difference to the row "
        "with stale notes; what the head adds, the difference to random blocks."
    )
    return Table("Rollback", columns, rows, note)


def text_table(evaluation: Mapping[str, Any]) -> Table:
    """What the adapters cost elsewhere, and whether the sections follow their plan."""
    text, plan = part(evaluation, "text_ce"), part(evaluation, "plan")
    rows = _rows(
        [
            ("cross-entropy on other tokens, PDT (nats)", text.get("pdt")),
            ("cross-entropy on other tokens, trunk (nats)", text.get("trunk")),
            ("KL from the trunk on other tokens (nats)", text.get("divergence", text.get("kl"))),
            ("excess cross-entropy on other tokens (nats)", text.get("excess")),
            ("cross-entropy of what a sibling told its owner, PDT (nats)", part(text, "told").get("pdt")),
            ("cross-entropy of what a sibling told its owner, trunk (nats)", part(text, "told").get("trunk")),
            ("excess cross-entropy of what a sibling told its owner (nats)", part(text, "told").get("excess")),
            ("KL from the trunk where a sibling told the owner (nats)", part(text, "told").get("divergence")),
            *_plan_rows(plan, "owned_stated", "owned items stated"),
            *_plan_rows(plan, "owned_stated_relative", "owned items stated, relative to the documents' own texts"),
            *_plan_rows(plan, "mentions_on_plan", "mentions that are on the plan"),
            *_plan_rows(plan, "valid_values", "mentions with a value of the cue's pool"),
        ]
    )
    note = (
        "Other tokens: all that are no sibling facts. An owner that states what a sibling has told before repeats it."
    )
    return Table("Text and plan", ("measure", "value", "95 % interval", "n"), rows, note)


def _plan_rows(plan: Mapping[str, Any], name: str, label: str) -> list[tuple[str, Any]]:
    """A measure of the plan, and under it what the trunk reaches alone and in sequence."""
    modes = ("independent", "sequential")
    return [(label, plan.get(name)), *((f"- {MODES[mode]}", part(plan, mode).get(name)) for mode in modes)]


def speed_table(evaluation: Mapping[str, Any]) -> Table:
    """Wall clock against named baselines, each ratio followed by its details."""
    labels = {
        "parallel_vs_single": "speed-up over one stream that writes the same tokens, same trunk and loop",
        "overhead_vs_shared_prefill": "time over batched generate of the same rows with one shared prefill",
    }
    rows = []
    for key, value in part(evaluation, "speed").items():
        read = measure(value)
        if isinstance(value, int):
            rows.append([labels.get(key, key.replace("_", " ")), str(value), "", ""])
        elif read is not None:
            quartiles = "" if read.low is None or read.high is None else f"{read.low:.2f} to {read.high:.2f}"
            pairs = "" if read.n is None else str(read.n)
            rows.append([labels.get(key, key.replace("_", " ")), f"{read.mean:.2f}", quartiles, pairs])
        if isinstance(value, Mapping):
            details = {name: item for name, item in value.items() if name not in ("mean", "low", "high", "n")}
            rows += [[f"- {name}", text, "", ""] for name, text in flat(details)]
    note = "Medians of ratios of interleaved pairs in one run, with their quartiles; of several runs their means."
    return Table("Speed", ("measure", "value", "quartiles", "pairs"), rows, note)


def settings_table(evaluation: Mapping[str, Any]) -> Table:
    """How the numbers were made."""
    rows = [[name, value] for name, value in flat(part(evaluation, "settings"))]
    return Table("Settings", ("setting", "value"), rows)


def cue_table(evaluation: Mapping[str, Any]) -> Table:
    """Chance per fact type."""
    rows = [[cue, show(value)] for cue, value in part(evaluation, "chance", "by_cue").items() if show(value)]
    return Table("Chance per fact type", ("cue", "chance"), rows, folded=True)


def all_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Every table of an evaluation that has rows, in order."""
    makers = (
        *(bars_table, recall_table, timing_table, heads_table, calibration_table, rollback_table),
        *(health_table, mixes_table, text_table, speed_table, settings_table, cue_table),
    )
    return [table for table in (maker(evaluation) for maker in makers) if table.rows]


def to_markdown(table: Table, level: int = 2) -> str:
    """
    Return a table as Markdown, heading and note included.

    Args:
        table ([`Table`]): What to write.
        level (`int`, *optional*, defaults to 2): Level of the heading; 0 = the bare table.
    """
    lines = [f"{'#' * level} {table.title}", ""] if level else []
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in [table.columns, *table.rows]]
    lines.insert(len(lines) - len(table.rows), "|" + "---|" * len(table.columns))
    if level and table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
