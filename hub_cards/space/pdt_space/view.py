"""Boards as HTML: columns that fill, the bus, the comparison. The texts of a model are escaped by the template."""

import difflib
import re
import time
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import bus_view
from .board import Block, Board, Column

FOLDER = Path(__file__).resolve().parent
# Colours in `style.css`, for a light screen and a dark one.
NUM_COLORS = 8
# Seconds that a block which has just been judged is marked for.
FRESH_SECONDS = 1.6
WORDS = re.compile(r"\S+|\s+")

TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a column: `kind` is `block`, `withdrawn`, `waiting` or `draft`; `words` are `(text, differs)`."""

    kind: str
    words: list[tuple[str, bool]]
    number: int = 0
    age: float | None = None
    hint: str = ""


def color(stream: int) -> str:
    """The colour of a stream, as CSS has it."""
    return f"var(--stream-{stream % NUM_COLORS})"


def different_words(text: str, other: str) -> list[bool]:
    """For every word of `text` (spaces are words), whether it is not in `other` at the same turn."""
    words, others = WORDS.findall(text), WORDS.findall(other)
    marks = [True] * len(words)
    for match in difflib.SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
        marks[match.a : match.a + match.size] = [False] * match.size
    return marks


def pieces(column: Column, other: Column | None, now: float) -> list[Piece]:
    """
    The text of a column in the order of its blocks.

    Args:
        column ([`Column`]): What to show.
        other ([`Column`], *optional*): The same stream of another run; words that differ from it are marked.
        now (`float`): Seconds of `time.monotonic`.
    """
    marks = None if other is None else _marks_by_letter(column.text, other.text)
    made, start = [], 0
    for block in column.blocks:
        age = now - block.at
        fresh = age if age < FRESH_SECONDS else None
        if block.stands:
            words = _marked(block.text, marks, start)
            start += len(block.text)
            made.append(Piece("block", words, block.round, fresh, _hint(block)))
        else:
            kind = "waiting" if block.waiting else "withdrawn"
            made.append(Piece(kind, [(block.text, False)], block.round, fresh, _hint(block)))
    if column.draft:
        made.append(Piece("draft", [(column.draft, False)]))
    return made


def _marks_by_letter(text: str, other: str) -> list[bool]:
    words = WORDS.findall(text)
    return [mark for word, mark in zip(words, different_words(text, other), strict=True) for _ in word]


def _marked(text: str, marks: list[bool] | None, start: int) -> list[tuple[str, bool]]:
    """A block's text in stretches of one mark."""
    if marks is None:
        return [(text, False)]
    stretches: list[tuple[str, bool]] = []
    for letter, mark in zip(text, marks[start : start + len(text)], strict=True):
        if stretches and stretches[-1][1] == mark:
            stretches[-1] = (stretches[-1][0] + letter, mark)
        else:
            stretches.append((letter, mark))
    return stretches


def _hint(block: Block) -> str:
    agreement = "no trained judge" if block.agreement is None else f"agreement {bus_view.percent(block.agreement)}"
    if block.stands:
        state = "stands because no retry was left" if block.forced else "committed"
        state = f"waited {block.waits}×, {state}" if block.waits else state
    else:
        state = "waits for notes" if block.waiting else "withdrawn"
    return f"Block {block.round + 1}, {agreement}, {state}"


def comparison(boards: list[Board]) -> list[tuple[str, list[str]]]:
    """Rows of numbers for two finished boards."""

    def row(board: Board) -> list[str]:
        agreements = [block.agreement for column in board.columns for block in column.standing]
        known = [value for value in agreements if value is not None]
        mean = bus_view.percent(sum(known) / len(known) if known else None)
        blocks = (sum(column.withdrawn for column in board.columns), sum(column.waited for column in board.columns))
        return [*map(str, (board.tokens, board.calls, *blocks)), mean]

    names = ("tokens written", "trunk calls", "blocks withdrawn", "blocks that waited", "mean agreement")
    return list(zip(names, map(list, zip(*map(row, boards), strict=True)), strict=True))


def same_words(first: Board, second: Board) -> float:
    """The share of the second answer's words that the first has at the same turn."""
    marks = [
        mark
        for one, other in zip(second.columns, first.columns, strict=True)
        for word, mark in zip(WORDS.findall(one.text), different_words(one.text, other.text), strict=True)
        if word.strip()
    ]
    return 1 - sum(marks) / len(marks) if marks else 1.0


def stage(boards: list[Board]) -> str:
    """All boards of an answer as HTML."""
    compared = len(boards) == 2 and all(board.done for board in boards)
    return TEMPLATES.get_template("stage.html").render(
        boards=boards,
        others=[None, *boards[:1]],
        now=time.monotonic(),
        pieces=pieces,
        bus=bus_view,
        color=color,
        table=comparison(boards) if compared else [],
        same=same_words(boards[0], boards[1]) if compared else None,
        fresh_seconds=FRESH_SECONDS,
    )


def notice(kind: str, text: str) -> str:
    """A message; `kind` is `error` or `info`."""
    return TEMPLATES.get_template("notice.html").render(kind=kind, text=text)


def describe(name: str, facts: list[tuple[str, str]], untrained: tuple[str, ...]) -> str:
    """What is loaded."""
    return TEMPLATES.get_template("model.html").render(name=name, facts=facts, untrained=untrained)
