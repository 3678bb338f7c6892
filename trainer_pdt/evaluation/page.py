"""The self-contained HTML page of an evaluation: tables, figures as data, answers with their rollbacks struck out."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .tables import Table

STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #5c6670; --line: #d9dee3; --pale: #f5f7f9; --blue: #0072b2;
  --green: #00704f; --red: #b34700; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.stream h3 { margin-top: 0; } p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; background: var(--pale); } .met { color: var(--green); font-weight: 600; }
.missed { color: var(--red); font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
pre { background: var(--pale); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .85rem; white-space: pre-wrap; } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { flex: 1 1 150px; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; } .tile span { color: var(--soft); font-size: .85rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .9rem; margin: .8rem 0; }
.stream { border: 1px solid var(--line); border-radius: 8px; padding: .8rem .9rem; }
.stream p { white-space: pre-wrap; } .odd { background: #eaf2f8; } del { color: var(--red); background: #fdf0e7; }
ins.good { text-decoration: none; color: var(--green); font-weight: 700; } .odd, del { border-radius: 3px; }
ins.bad { text-decoration: underline wavy var(--red); color: var(--red); font-weight: 700; }
del { margin-right: .3em; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } summary { cursor: pointer; font-weight: 600; }
"""

PAGE = """{%- macro draw(table, headed) %}{% if table.folded %}<details><summary>{{ table.title }}</summary>
{%- elif headed %}<h3>{{ table.title }}</h3>{% endif %}
<div class="scroll"><table><thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}{% set number = loop.index0 %}
<tr>{% for cell in row %}<td{% if table.met and loop.last %} class="{{ "met" if table.met[number] else "missed" }}"
{%- endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% if table.note %}<p class="soft">{{ table.note }}</p>{% endif %}
{%- if table.folded %}</details>{% endif %}{% endmacro -%}
{%- macro draw_section(section) %}<section><h2>{{ section.title }}</h2>
{% for figure in section.figures %}<img alt="{{ figure.alt }}" src="data:image/png;base64,{{ figure.data }}">
{% endfor %}{% for table in section.tables %}{{ draw(table, table.title != section.title) }}{% endfor %}
</section>{% endmacro -%}
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style|safe }}</style></head>
<body><main>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}{% if tiles %}<div class="tiles">{% for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b>{{ tile.name }}<br><span>{{ tile.detail }}</span></div>{% endfor %}
</div>{% endif %}
{% for section in sections[:1] %}{{ draw_section(section) }}{% endfor %}
{% if answers %}<section><h2>Decoded answers</h2>
<p class="soft">Shading alternates with blocks. Struck out: a block that was withdrawn before its note was published,
in front of what was written in its place. <ins class="good">Green</ins>: a sibling's fact, repeated as the sibling
stated it. <ins class="bad">Underlined</ins>: a value that differs from the sibling's.</p>
{% for answer in answers %}<details{{ " open" if answer.open }}><summary>{{ answer.title }}</summary>
<pre>{{ answer.prompt }}</pre>
{% if answer.figure %}<img alt="Timeline of blocks" src="data:image/png;base64,{{ answer.figure }}">{% endif %}
<div class="columns">{% for stream in answer.streams %}<div class="stream"><h3>{{ stream.header }}</h3><p>
{%- for piece in stream.pieces -%}
{%- if piece.kind == "withdrawn" %}<del title="{{ piece.title }}">{{ piece.text }}</del>{% else -%}
<span{% if piece.block % 2 %} class="odd"{% endif %} title="{{ piece.title }}">
{%- if piece.kind == "text" %}{{ piece.text }}{% else %}<ins class="{{ piece.kind }}">{{ piece.text }}</ins>
{%- endif %}</span>{% endif %}
{%- endfor %}</p></div>{% endfor %}</div></details>
{% endfor %}</section>{% endif %}
{% for section in sections[1:] %}{{ draw_section(section) }}{% endfor %}
{% if commands %}<section><h2>Commands</h2><pre>{% for command in commands %}{{ command }}
{% endfor %}</pre></section>{% endif %}
</main></body></html>
"""


@dataclass(frozen=True)
class Section:
    """
    A part of the page.

    Args:
        title (`str`): Heading.
        tables (`list[Table]`): Tables; one with the section's own title needs no second heading.
        figures (`list[Path]`): PNG files, embedded.
    """

    title: str
    tables: list[Table]
    figures: list[Path]


def image_data(path: Path) -> str:
    """Return a file as base64 text."""
    return base64.b64encode(path.read_bytes()).decode("ascii")


def pieces_of(
    stream: Mapping[str, Any], withdrawn: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """
    Cut a section into pieces to be shown one after another.

    Args:
        stream (`dict`): `tokens` and `blocks` (token ranges) of an example's stream; tokens behind its `text` (the
            end of the section) are not shown.
        withdrawn (`list[dict]`): Its rollback events; `text` or a list of strings `tokens` is what was withdrawn.
        references (`list[dict]`): Its references: `start` (character), `value`, `consistent`.

    Returns:
        `list[dict]`: `kind` (`"text"`, `"good"`, `"bad"`, `"withdrawn"`), `text`, `block`, `title`.
    """
    tokens, pieces, offset = stream["tokens"], [], 0
    whole, section = "".join(tokens), stream.get("text", "")
    limit = len(section) if section and whole.startswith(section) else len(whole)
    spans = {
        (entry["start"], entry["start"] + len(entry["value"])): "good" if entry["consistent"] else "bad"
        for entry in references
    }
    for number, (start, end) in enumerate(stream["blocks"]):
        for event in withdrawn:
            if event["start"] == start:
                pieces.append({"kind": "withdrawn", "text": _withdrawn_text(event), "block": number, **_named(event)})
        text = "".join(tokens[start:end])[: max(0, limit - offset)]
        marks = [span for span in spans if span[0] < offset + len(text) and span[1] > offset]
        cuts = sorted({0, len(text), *(min(max(edge - offset, 0), len(text)) for span in marks for edge in span)})
        for left, right in pairwise(cuts):
            kinds = [spans[span] for span in marks if span[0] <= offset + left and offset + right <= span[1]]
            kind = kinds[0] if kinds else "text"
            pieces.append({"kind": kind, "text": text[left:right], "block": number, "title": f"round {number}"})
        offset += len(text)
    return pieces


def _withdrawn_text(event: Mapping[str, Any]) -> str:
    tokens = event.get("text", event.get("tokens"))
    if isinstance(tokens, str):
        return tokens
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return "".join(tokens)
    return f"[{event['end'] - event['start']} tokens]"


def _named(event: Mapping[str, Any]) -> dict[str, str]:
    score = event.get("agreement")
    judged = "" if score is None else f", agreement {score:.2f}"
    return {"title": f"round {event['round']}, attempt {event.get('attempt', 0)}, withdrawn{judged}"}


def answer_of(number: int, example: Mapping[str, Any], figure: Path | None, is_open: bool) -> dict[str, Any]:
    """
    What the page shows of one decoded answer.

    Args:
        number (`int`): Its place, from 1.
        example (`dict`): Entry of `examples` in `evaluation.json`.
        figure (`Path`, *optional*): Timeline.
        is_open (`bool`): Unfolded when the page opens.
    """
    rollbacks = [event for event in example.get("events") or [] if event["kind"] == "rollback"]
    references = example.get("references") or []
    streams = []
    for index, stream in enumerate(example["streams"]):
        own = [event for event in rollbacks if event["stream"] == index]
        judged = [
            reference
            for reference in references
            if reference.get("stream") == index and {"start", "value", "consistent"} <= reference.keys()
        ]
        streams.append({"header": stream["header"], "pieces": pieces_of(stream, own, judged)})
    noun = "block" if len(rollbacks) == 1 else "blocks"
    return {
        "title": f"Answer {number}: {len(rollbacks)} {noun} written again",
        "prompt": _request(example),
        "figure": image_data(figure) if figure is not None else "",
        "streams": streams,
        "open": is_open,
    }


def _request(example: Mapping[str, Any]) -> str:
    """The request, and the plan's items by stream when they are there."""
    lines = [example.get("prompt", "")]
    for index, stream in enumerate(example["streams"]):
        items = [text for text, owner in example.get("outline") or [] if owner == index]
        if items:
            lines.append(f"{index + 1}. {stream['header']}: {'; '.join(items)}")
    return "\n".join(lines)


def render_page(
    title: str,
    summary: Sequence[str],
    tiles: Sequence[Mapping[str, str]],
    sections: Sequence[Section],
    answers: Sequence[Mapping[str, Any]],
    commands: Sequence[str],
) -> str:
    """
    Return the page as HTML. Everything that is not written here is escaped.

    Args:
        title (`str`): Heading of the page.
        summary (`list[str]`): Paragraphs under it.
        tiles (`list[dict]`): Headline figures: `name`, `value`, `detail`.
        sections (`list[Section]`): Tables and figures.
        answers (`list[dict]`): From [`answer_of`].
        commands (`list[str]`): How to make the page again.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    shown = [
        {
            "title": section.title,
            "tables": section.tables,
            "figures": [{"alt": path.stem.replace("_", " "), "data": image_data(path)} for path in section.figures],
        }
        for section in sections
    ]
    return environment.from_string(PAGE).render(
        title=title,
        style=STYLE,
        summary=summary,
        tiles=tiles,
        sections=shown,
        answers=answers,
        commands=commands,
    )
