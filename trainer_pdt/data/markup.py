"""Markdown, reStructuredText and underlined plain text as a title and sections of readable prose.

A reader of documentation files, not a renderer: it finds headings, keeps paragraphs and list items as single lines,
and drops what is not prose (code, directives, tables, images, badges, comments). Standard library only.
"""

import re
import unicodedata
from collections.abc import Iterator

MARKUP_VERSION = 1
"""Raised when the same text gives other sections."""

MARKUP_FILES = (".md", ".markdown", ".rst")

OVERVIEW = "Overview"
"""Header of the text before the first heading, or between the title and the next one."""

_UNDERLINE = re.compile(r"^([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.+?)\s*#*\s*$")
_HTML_HEADING = re.compile(r"^\s*<h([1-6])\b[^>]*>(.+?)</h\1>\s*$", re.IGNORECASE)
_FENCE = re.compile(r"^\s*(```+|~~~+)")
_DIRECTIVE = re.compile(r"^(\s*)\.\.(\s|$)")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+")
_FIELD_LINE = re.compile(r"^\s*(?::[\w -]{2,40}:\s|[A-Z][\w /-]{1,40}:\s+\S)")
_NOT_PROSE = re.compile(r"^\s*(?:\||\+[-=+]{3,}|>>>|\.\.\.( |$)|\$ |\[[^\]]+\]:\s|=+( +=+)+\s*$)")

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_INLINE = (
    (re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])"), ""),
    (re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r":[\w.+:-]+:`~?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?"), r"\1"),
    (re.compile(r"<(https?://[^>\s]+)>"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^>]*>"), ""),
    (re.compile(r"\|[\w -]+\|_{0,2}"), ""),
    (re.compile(r"`{1,3}([^`]+)`{1,3}_{0,2}"), r"\1"),
    (re.compile(r"\*{1,3}([^*\s](?:[^*]*[^*\s])?)\*{1,3}"), r"\1"),
    (re.compile(r"\s*\[#?\w{1,4}\]_"), ""),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!|-])"), r"\1"),
)


def split_sections(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """
    Title and sections of a document.

    Args:
        text (`str`): Markdown, reStructuredText or plain text with underlined headings.

    Returns:
        The title (the first heading if nothing but dropped material precedes it, else empty) and (header, text) of
        every section in reading order. Sub-sections are sections of their own; headings without text are left out.
        Without a heading there is one section, called [`OVERVIEW`]; without prose there is none.
    """
    title, header, lines = "", OVERVIEW, []
    sections: list[tuple[str, list[str]]] = []
    for kind, content in _blocks(_COMMENT.sub("", _printable(text))):
        if kind == "heading":
            sections.append((header, lines))
            is_title = not title and not any(text for _, text in sections)
            title, header, lines = (content, OVERVIEW, []) if is_title else (title, content, [])
        else:
            lines.append(content)
    sections.append((header, lines))
    return title, tuple((name, "\n\n".join(found)) for name, found in sections if found)


def _printable(text: str) -> str:
    """Text with plain line ends and without control characters."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join("".join(c for c in line if unicodedata.category(c) not in ("Cc", "Cs", "Cn")) for line in lines)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """("heading", text) and ("prose", paragraph or list item) in order."""
    lines, paragraph = list(_prose_lines(text.split("\n"))), []
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        heading = _heading(line, following, alone=not paragraph)
        if heading is None and line.strip() and not _UNDERLINE.match(line):
            if paragraph and (_LIST_ITEM.match(line) or _FIELD_LINE.match(line)):
                yield from _prose(paragraph)
                paragraph = []
            paragraph.append(line)
            continue
        yield from _prose(paragraph)
        paragraph = []
        if heading:
            yield "heading", heading
    yield from _prose(paragraph)


def _heading(line: str, following: str, alone: bool) -> str | None:
    """The heading that a line holds, empty if markup is all there is in it; `None` if it is none."""
    found = _HEADING.match(line)
    if found:
        return clean_inline(found.group(2))
    found = _HTML_HEADING.match(line)
    if found:
        return clean_inline(found.group(2))
    name = clean_inline(line)
    underlined = alone and bool(_UNDERLINE.match(following)) and not _UNDERLINE.match(line)
    fits = 0 < len(name) <= 100 and len(following.strip()) >= min(len(line.strip()), 3)
    return name if underlined and fits and not _LIST_ITEM.match(line) else None


def _prose(lines: list[str]) -> Iterator[tuple[str, str]]:
    text = clean_inline(" ".join(line.strip() for line in lines))
    text = _LIST_ITEM.sub("", text)
    if any(character.isalpha() for character in text):
        yield "prose", text


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """Lines without code: fenced and literal blocks, directives and their bodies, tables, sessions."""
    fence, skip_below, pending_literal = "", -1, False
    for line in lines:
        if fence:
            fence = "" if line.strip().startswith(fence) else fence
            continue
        indent = len(line) - len(line.lstrip())
        if skip_below >= 0 and (not line.strip() or indent > skip_below):
            continue
        skip_below = -1
        if pending_literal and line.strip():
            pending_literal = False
            if indent > 0:
                skip_below = indent - 1
                continue
        opening = _FENCE.match(line)
        directive = _DIRECTIVE.match(line)
        if opening:
            fence = opening.group(1)
        elif directive:
            skip_below = len(directive.group(1))
        elif _NOT_PROSE.match(line):
            yield ""
        else:
            pending_literal = pending_literal or line.rstrip().endswith("::")
            yield re.sub(r"::\s*$", ":", line)


def clean_inline(text: str) -> str:
    """A line without inline markup: links and roles become their text, images and tags vanish."""
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())
