"""A terminal view of parallel decoding: sections side by side as they are written, withdrawn blocks struck out."""

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from modeling_pdt.streaming import ParallelStreamer

WITHDRAWN_STYLE, DRAFT_STYLE, WAITING_STYLE = "red strike", "dim", "yellow"


class LiveView(ParallelStreamer):
    """
    Streamer that shows every stream in a column of its own, blocks that nobody has judged yet dimmed and those that
    wait in yellow; without a terminal, one line per block.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes the sections.
        num_prompts (`int`), num_streams (`int`): Rows and columns of the view.
        console (`Console`, *optional*): Where to write; standard output by default.

    Example:

    ```python
    >>> with LiveView(tokenizer, num_prompts=1, num_streams=3) as view:
    ...     output = model.generate(**inputs, streamer=view)
    ```
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_prompts: int, num_streams: int, console: Console | None = None
    ) -> None:
        self.tokenizer, self.num_prompts, self.num_streams = tokenizer, num_prompts, num_streams
        self.console = console if console is not None else Console()
        places = [(prompt, stream) for prompt in range(num_prompts) for stream in range(num_streams)]
        self.tokens: dict[tuple[int, int], list[int]] = {place: [] for place in places}
        self.texts: dict[tuple[int, int], Text] = {place: Text() for place in places}
        self.drafts: dict[tuple[int, int], list[int]] = {place: [] for place in places}
        self.withdrawn: dict[tuple[int, int], int] = dict.fromkeys(places, 0)
        self.waiting: set[tuple[int, int]] = set()
        self.wants_drafts = self.console.is_terminal
        self.live: Live | None = None

    def __enter__(self) -> "LiveView":
        if self.console.is_terminal:
            self.live = Live(self.render(), console=self.console, refresh_per_second=12)
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.update(self.render(), refresh=True)
            self.live.stop()

    def draft(self, prompt: int, stream: int, token_id: int) -> None:
        """Shows a token of a block that is being written."""
        self.drafts[prompt, stream].append(token_id)
        if self.live is not None:
            self.live.update(self.render())

    def put(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Appends a committed block to its column."""
        tokens = self.tokens[prompt, stream]
        before = self._decode(tokens)
        tokens.extend(token_ids)
        self._show(prompt, stream, self._decode(tokens)[len(before) :], "")

    def rollback(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Shows a withdrawn block, struck out."""
        self.withdrawn[prompt, stream] += 1
        self._show(prompt, stream, self._decode(token_ids), WITHDRAWN_STYLE)

    def stall(self, prompt: int, stream: int, token_ids: list[int]) -> None:
        """Shows a block that waits for its siblings' notes."""
        place = prompt, stream
        begins = place not in self.waiting
        self.waiting.add(place)
        if self.live is not None:
            self.drafts[place] = list(token_ids)
            self.live.update(self.render())
        elif begins:
            self._print(prompt, stream, "waits", self._decode(token_ids))

    def render(self) -> Table:
        """The columns as they stand: one row of panels per prompt."""
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in range(self.num_streams):
            table.add_column(ratio=1)
        for prompt in range(self.num_prompts):
            table.add_row(*(self._panel(prompt, stream) for stream in range(self.num_streams)))
        return table

    def _panel(self, prompt: int, stream: int) -> Panel:
        count = self.withdrawn[prompt, stream]
        waits = (prompt, stream) in self.waiting
        notes = [f"[red]{count} block{'s' if count > 1 else ''} rewritten[/red]"] if count else []
        notes += [f"[{WAITING_STYLE}]waiting[/{WAITING_STYLE}]"] if waits else []
        written, draft = self.tokens[prompt, stream], self.drafts[prompt, stream]
        text = self.texts[prompt, stream].copy()
        text.append(
            self._decode(written + draft)[len(self._decode(written)) :], style=WAITING_STYLE if waits else DRAFT_STYLE
        )
        return Panel(text, title=f"stream {stream}", subtitle=", ".join(notes) or None)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _show(self, prompt: int, stream: int, text: str, style: str) -> None:
        self.drafts[prompt, stream].clear()
        self.waiting.discard((prompt, stream))
        self.texts[prompt, stream].append(text, style=style)
        if self.live is not None:
            self.live.update(self.render())
            return
        self._print(prompt, stream, "rolled back" if style else "committed", text)

    def _print(self, prompt: int, stream: int, action: str, text: str) -> None:
        where = f"stream {stream}" if self.num_prompts == 1 else f"prompt {prompt} stream {stream}"
        self.console.print(f"{where} {action}: {text!r}", markup=False, highlight=False, soft_wrap=True)
