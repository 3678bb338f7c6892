"""The one renderer: how a request, an outline, a stream's header and its section become the text of a row.

Without a chat template a row reads

    Describe the town of Velmar.
    1. Farming: main crop; the orchard fruit
    2. Places: nearby river; park flower

    ## Farming
    Here people name the main crop barley. ...<eos>

With a chat template the request is the user's turn; outline, header and section are the assistant's. Every piece ends
with a line break, so pieces may be tokenized one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from transformers import PreTrainedTokenizerBase

from .data.schema import Document, Span

REQUEST_FORMAT = "{request}\n"
OUTLINE_LINE_FORMAT = "{number}. {header}: {items}\n"
OUTLINE_ITEM_SEPARATOR = "; "
OUTLINE_END = "\n"
HEADER_FORMAT = "## {header}\n"

HARMONY_TURN = "<|start|>assistant"
HARMONY_FINAL = "<|channel|>final<|message|>"

TEMPLATE_DATE = date(2025, 8, 5)
"""The day that chat templates are told it is; a fixed one, so that a row is the same text on every day."""

# transformers hands templates no callable, but what a template defines itself comes before its globals.
_REPLACEMENTS = "".join(f"|replace('%{code}', '{TEMPLATE_DATE.strftime(f'%{code}')}')" for code in "YmdBbyAa")
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_REPLACEMENTS} }}}}{{%- endmacro -%}}"


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text.

    Args:
        text (`str`): The text.
        kind (`str`): ``"request"``, ``"outline"``, ``"header"`` or ``"section"``; a section is followed by EOS.
        stream (`int`): Stream the piece belongs to, -1 for request and outline.
        spans (`tuple[Span]`): Values stated in a section.
    """

    text: str
    kind: str
    stream: int = -1
    spans: tuple[Span, ...] = ()


def render_request(request: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The request with all that precedes the answer: the chat template's turns if `tokenizer` has one."""
    if not request.strip():
        raise ValueError("`request` is empty, must hold at least one character that is not a space.")
    if tokenizer is None or tokenizer.chat_template is None:
        return REQUEST_FORMAT.format(request=request.strip())
    messages = [{"role": "user", "content": request}]
    template = FIXED_DATE + tokenizer.get_chat_template()
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    return text + HARMONY_FINAL if text.endswith(HARMONY_TURN) else text


def render_outline_lines(headers: Sequence[str], items: Sequence[Sequence[str]]) -> str:
    """The outline of an answer: one line per stream with its header and its items, then an empty line."""
    if len(headers) != len(items):
        raise ValueError(f"`items` has {len(items)} entries, must be {len(headers)}, one per header.")
    lines = (
        OUTLINE_LINE_FORMAT.format(number=number, header=header, items=OUTLINE_ITEM_SEPARATOR.join(texts))
        for number, (header, texts) in enumerate(zip(headers, items, strict=True), start=1)
    )
    return "".join(lines) + OUTLINE_END


def render_outline(document: Document) -> str:
    """The outline of a document's plan."""
    items = [[item.text for item in document.items if item.stream == stream.stream_id] for stream in document.streams]
    return render_outline_lines([stream.header for stream in document.streams], items)


def render_prompt(document: Document, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Request and outline: what all streams of a document have in common."""
    return render_request(document.prompt, tokenizer) + render_outline(document)


def render_header(header: str) -> str:
    """The heading line that opens a stream's section."""
    return HEADER_FORMAT.format(header=header)


def render_row(document: Document, stream: int, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Piece]:
    """Pieces of the row of one stream: request, outline, header, section."""
    return _opening(document, tokenizer) + _section(document, stream)


def render_sequential(
    document: Document, order: Sequence[int] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Piece]:
    """Pieces of the whole answer in one row: the sections one after another, in plan order or in `order`."""
    streams = range(len(document.streams)) if order is None else order
    return _opening(document, tokenizer) + [piece for stream in streams for piece in _section(document, stream)]


def _opening(document: Document, tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
    return [Piece(render_request(document.prompt, tokenizer), "request"), Piece(render_outline(document), "outline")]


def _section(document: Document, stream: int) -> list[Piece]:
    record = document.streams[stream]
    return [
        Piece(render_header(record.header), "header", stream),
        Piece(record.text, "section", stream, record.spans),
    ]
