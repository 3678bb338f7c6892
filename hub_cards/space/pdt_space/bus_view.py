"""The bus as lanes: one per stream, its blocks from left to right, and curves from notes to the blocks that read them.

Heights are pixels, widths shares of the lane, so that the drawing fits a phone and a wide screen alike.
"""

from dataclasses import dataclass

from .board import Block, Board

LANE, CELL_TOP, CELL = 68, 26, 30
# Where in its cell a block has its note, and where it reads.
NOTE_AT, READ_AT = 0.86, 0.14
# Curves per block, and the least share of attention that is drawn.
MOST_CURVES, LEAST_SHARE = 4, 0.01


@dataclass(frozen=True)
class Cell:
    """A block in its lane: `left` and `width` in percent, `gate` from 0 to 1, `retries` withdrawn attempts."""

    left: float
    width: float
    block: Block
    retries: int
    gate: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A reading: `path` in the units of an SVG of 1000 by the height of all lanes, `share` of attention."""

    stream: int
    path: str
    share: float
    label: str


def height(board: Board) -> int:
    """Height of all lanes in pixels."""
    return LANE * len(board.columns)


def rounds(board: Board, least: int = 4) -> int:
    """Columns of the drawing: the most blocks of a stream."""
    return max([least, *(block.round + 1 for column in board.columns for block in column.blocks)])


def percent(value: float | None) -> str:
    """A share as text."""
    return "–" if value is None else f"{100 * value:.0f} %"


def cells(board: Board, stream: int) -> list[Cell]:
    """The newest attempt of every block of a stream."""
    count, newest = rounds(board), {}
    for block in board.columns[stream].blocks:
        newest[block.round] = block
    made = []
    for number, block in newest.items():
        gate = block.reading["gate"] if block.reading else 0.0
        label = f"Block {number + 1}: agreement {percent(block.agreement)}, gate {percent(gate)}"
        label += f", rewritten {block.attempt}×" if block.attempt else ""
        label += f", waited {block.waits}×" if block.waits else ""
        label += ", stands because no retry was left" if block.forced else ""
        retries = block.attempt + (not block.stands and not block.waiting)
        made.append(Cell(100 * number / count, 100 / count, block, retries, min(1.0, gate), label))
    return made


def curves(board: Board) -> list[Curve]:
    """The strongest readings of every block that stands, weakest first."""
    count, found = rounds(board), []
    for stream, column in enumerate(board.columns):
        for block in column.standing:
            notes = [note for note in (block.reading or {"notes": []})["notes"] if note["weight"] >= LEAST_SHARE]
            for note in sorted(notes, key=lambda note: -note["weight"])[:MOST_CURVES]:
                start = 1000 * (note["round"] + NOTE_AT) / count, _middle(note["stream"])
                end = 1000 * (block.round + READ_AT) / count, _middle(stream)
                bend = max(30.0, abs(end[0] - start[0]) / 2)
                path = (
                    f"M{start[0]:.0f} {start[1]} C{start[0] + bend:.0f} {start[1]} "
                    f"{end[0] - bend:.0f} {end[1]} {end[0]:.0f} {end[1]}"
                )
                writer = board.columns[note["stream"]].title
                label = f"{column.title}, block {block.round + 1} reads {writer}, block {note['round'] + 1}: "
                found.append(Curve(note["stream"], path, note["weight"], label + percent(note["weight"])))
    return sorted(found, key=lambda curve: curve.share)


def gate_of(board: Board, stream: int) -> float | None:
    """Mean gate over the blocks of a stream that read anything; `None` before the first."""
    gates = [block.reading["gate"] for block in board.columns[stream].standing if block.reading]
    return sum(gates) / len(gates) if gates else None


def shares_of(board: Board, stream: int) -> list[tuple[str, int | None, float]]:
    """Where a stream's attention went: `(name, writer, share)` for plan, every writer, and nowhere (the sink)."""
    readings = [block.reading for block in board.columns[stream].standing if block.reading]
    if not readings:
        return []
    shares = [("plan", None, sum(reading["plan"] for reading in readings))]
    for writer, column in enumerate(board.columns):
        total = sum(note["weight"] for reading in readings for note in reading["notes"] if note["stream"] == writer)
        if total:
            shares.append((column.title, writer, total))
    shares.append(("no note", None, sum(reading["sink"] for reading in readings)))
    return [(name, writer, share / len(readings)) for name, writer, share in shares]


def _middle(stream: int) -> int:
    return stream * LANE + CELL_TOP + CELL // 2
