"""Boards as HTML: every text escaped, words that differ marked, the bus where it belongs."""

import re

import pytest

from pdt_space import bus_view, view
from pdt_space.board import Block, Board, Column


def reading(plan=0.5, gate=0.25, notes=()):
    notes = [{"prompt": 0, "stream": stream, "round": number, "weight": weight} for stream, number, weight in notes]
    sink = 1 - plan - sum(note["weight"] for note in notes)
    return {"gate": gate, "sink": sink, "plan": plan, "notes": notes}


def block(text, number=0, stands=True, notes=(), at=0.0, **changes):
    values = {"attempt": 0, "agreement": 0.9, "forced": False, "reading": reading(notes=notes), "at": at}
    return Block(text=text, round=number, stands=stands, **{**values, **changes})


@pytest.fixture
def board():
    first = Column(
        "Farming", [("main crop", 0.9), ("river", 0.2)], [block("The crop is <b>rye</b>."), block(" So.", 1)]
    )
    lost = block(" Old oats.", 1, stands=False, agreement=0.01)
    kept = block(" Rye.", 1, notes=[(0, 0, 0.3), (0, 1, 0.002)], attempt=1, forced=True)
    second = Column("Trade", [], [block("They sell"), lost, kept], draft=" and", live=True)
    first.live = False
    return Board("Answer", [first, second], calls=20, tokens=31)


def test_texts_are_escaped(board):
    html = view.stage([board])
    assert "<b>rye" not in html and "&lt;b&gt;rye&lt;/b&gt;" in html
    assert "<img" not in view.notice("error", "<img src=x>")
    assert "<img" not in view.describe("<img src=x>", [("streams", "<img>")], ())


def test_a_column_shows_blocks_drafts_and_what_was_withdrawn(board):
    html = view.stage([board])
    assert re.search(r'class="pdt-withdrawn odd"[^>]*title="Block 2, agreement 1 %, withdrawn"> Old oats\.<', html)
    assert re.search(r'class="pdt-block odd"[^>]*stands because no retry was left"> Rye\.<', html)
    assert '<span class="pdt-draft"' in html and html.count("pdt-caret") == 1
    assert 'class="covered" title="covered: 90 %">main crop' in html and "covered: 20 %" in html
    assert "31 tokens in 20 trunk calls…" in html and "1 withdrawn" in html


def test_a_block_that_waits_is_told_from_one_that_was_withdrawn(board):
    waiting = block(" Oats.", 2, stands=False, waits=2, waiting=True, reading=None)
    board.columns[1].blocks.append(waiting)
    board.columns[1].draft = ""
    html = view.stage([board])
    assert re.search(r'class="pdt-waiting"[^>]*title="Block 3, agreement 90 %, waits for notes"> Oats\.<', html)
    assert "1 withdrawn" in html and "1 waited" in html and "pdt-caret" not in html
    assert bus_view.cells(board, 1)[2].label == "Block 3: agreement 90 %, gate 0 %, waited 2×"
    assert 'class="pdt-cell waiting"' in html and 'title="waited 2×"' in html
    board.columns[1].blocks[-1] = block(" Oats.", 2, waits=2)
    html = view.stage([board])
    assert "pdt-waiting" not in html and "1 waited" in html
    assert "Block 3, agreement 90 %, waited 2×, committed" in html


def test_only_what_has_just_happened_flashes(board):
    pieces = view.pieces(board.columns[1], None, now=0.5)
    assert [piece.age for piece in pieces] == [0.5, 0.5, 0.5, None]
    assert {piece.age for piece in view.pieces(board.columns[1], None, now=view.FRESH_SECONDS)} == {None}


def test_the_bus_draws_who_read_which_note(board):
    (curve,) = bus_view.curves(board)
    assert curve.stream == 0 and curve.share == 0.3
    assert curve.label == "Trade, block 2 reads Farming, block 1: 30 %"
    start, end = curve.path[1:].split(" C")[0], curve.path.split()[-2:]
    assert start == f"{1000 * bus_view.NOTE_AT / 4:.0f} {bus_view.CELL_TOP + bus_view.CELL // 2}"
    assert end[1] == str(bus_view.LANE + bus_view.CELL_TOP + bus_view.CELL // 2)
    cells = bus_view.cells(board, 1)
    assert [(cell.left, cell.retries, cell.gate) for cell in cells] == [(0.0, 0, 0.25), (25.0, 1, 0.25)]
    shares = bus_view.shares_of(board, 1)
    assert [(name, round(share, 3)) for name, _, share in shares] == [
        ("plan", 0.5),
        ("Farming", 0.151),
        ("no note", 0.349),
    ]


def test_a_block_without_reading_has_an_empty_gate():
    board = Board("Answer", [Column("One", [], [block("a", reading=None, agreement=None)])])
    assert bus_view.gate_of(board, 0) is None and bus_view.shares_of(board, 0) == []
    assert bus_view.cells(board, 0)[0].label == "Block 1: agreement –, gate 0 %"
    assert "no trained judge" in view.stage([board])


def test_words_that_differ_are_marked_across_blocks():
    one = Column("One", [], [block("the blue fl"), block("ag of rye", 1)])
    other = Column("One", [], [block("the teal flag of rye")])
    marked = [word for piece in view.pieces(one, other, 9.0) for word in piece.words]
    assert marked == [("the ", False), ("blue", True), (" fl", False), ("ag of rye", False)]
    first, second = Board("a", [other], done=True, tokens=5), Board("b", [one], done=True, tokens=7, calls=3)
    assert view.same_words(first, second) == pytest.approx(4 / 5)
    html = view.stage([first, second])
    assert "<mark>blue</mark>" in html and "<b>80 %</b>" in html
    assert view.comparison([first, second])[0] == ("tokens written", ["5", "7"])
    assert "What the notes changed" not in view.stage([first, Board("b", [one])])


def test_streams_keep_a_colour_each():
    assert len({view.color(stream) for stream in range(8)}) == 8 and view.color(8) == view.color(0)


def luminance(color):
    """As WCAG 2.2 has it, from 0 (black) to 1 (white)."""
    digits = color * 2 if len(color) == 3 else color
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_and_colours_can_be_read(theme):
    style = (view.FOLDER / "style.css").read_text()
    block = style.split("}")[0] if theme == "light" else re.search(r"\n\.dark [^{]*\{([^}]*)", style)[1]
    colors = {name: luminance(color) for name, color in re.findall(r"--([\w-]+): #(\w+);", block)}

    def contrast(one, other):
        high, low = sorted((colors[one], colors[other]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for stream in range(8):
        assert contrast(f"stream-{stream}", "paper") >= 4.5 and contrast("on-stream", f"stream-{stream}") >= 4.5
    assert min(contrast(ink, paper) for ink in ("ink", "soft", "red") for paper in ("paper", "pale")) >= 4.5
    assert contrast("ink", "mark") >= 4.5
