"""Reading of documentation files: headings, prose, and what is dropped."""

import pytest

from trainer_pdt.data.markup import OVERVIEW, clean_inline, split_sections

MARKDOWN = """<!-- a comment
over lines -->
# The *Fisher* tool
[![badge](https://a/b.svg)](https://a/b)

Fisher **reads** [logs](https://logs.example)
and writes `reports`.

## Install

```bash
# not a heading
pip install fisher
```

Needs Python 3.9.

| a | b |
|---|---|

- one entry
- another entry
  that goes on

Usage
-----
Call it.
"""

REST = """\
======
Fisher
======

Reads :class:`~logs.Log` objects, see `the site <https://logs.example>`_.

.. note::
   This is dropped.

Install
=======
Run this::

    pip install fisher

:Author: Ann Lee
:License: MIT

Deeper
^^^^^^
Text below.
"""


def test_markdown():
    title, sections = split_sections(MARKDOWN)
    assert title == "The Fisher tool"
    assert sections == (
        (OVERVIEW, "Fisher reads logs and writes reports."),
        ("Install", "Needs Python 3.9.\n\none entry\n\nanother entry that goes on"),
        ("Usage", "Call it."),
    )


def test_restructured_text():
    title, sections = split_sections(REST)
    assert title == "Fisher"
    assert sections == (
        (OVERVIEW, "Reads logs.Log objects, see the site."),
        ("Install", "Run this:\n\n:Author: Ann Lee\n\n:License: MIT"),
        ("Deeper", "Text below."),
    )


@pytest.mark.parametrize(("text", "sections"), [("", ()), ("Words only.", ((OVERVIEW, "Words only."),)), ("---", ())])
def test_text_without_headings(text, sections):
    assert split_sections(text) == ("", sections)


def test_control_characters_vanish():
    assert split_sections("# A\x00b\n\nc\x1b[31md\x07") == ("Ab", ((OVERVIEW, "c[31md"),))


def test_unclosed_markup_is_text():
    assert clean_inline("a * b ` c [d") == "a * b ` c [d"
