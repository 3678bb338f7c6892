"""From what a visitor asks for to boards: loads a model, makes the arguments of `generate`, decodes in a thread."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.plan import parse_outline
from modeling_pdt.readings import ReadingRecorder
from trainer_pdt.decode_arguments import DecodeArguments
from trainer_pdt.render import render_outline_lines, render_request

from .board import Board, BoardRecorder

PLANS = {"The model writes it": "trunk", "The text below": "text", "None": "none"}
DISAGREEING = {
    "It is written again": "stream",
    "Its whole round is written again": "round",
    "It waits for more notes": "stall",
}
# Between two looks at the board.
REFRESH_SECONDS = 0.12


@dataclass(frozen=True)
class Loaded:
    """A model that answers, what the page says of it, and the lock that the call which decodes with it holds."""

    name: str
    model: PDTForParallelDecoding
    tokenizer: PreTrainedTokenizerBase
    untrained: tuple[str, ...]
    turn: threading.Lock = field(default_factory=threading.Lock, compare=False)


class ModelShelf:
    """Keeps the model asked for last; one at a time, since a Space has little memory."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.lock = threading.Lock()

    def get(self, name: str) -> Loaded:
        """
        The model of a folder or Hub repository, loaded and checked unless it is the one at hand.

        Code of the repository is not run.

        Raises:
            ValueError: Without a name.
            OSError: For a name that nothing can be loaded from. Other errors of `from_pretrained` and
                `check_conditioning` pass through.
        """
        name = name.strip()
        if not name:
            raise ValueError("Name a folder or a Hub repository of trained adapters, for instance owner/name.")
        with self.lock:
            if self.loaded is None or self.loaded.name != name:
                self.loaded = None
                try:
                    model = PDTForParallelDecoding.from_pretrained(name).eval()
                    tokenizer = AutoTokenizer.from_pretrained(name)
                except OSError as error:
                    raise OSError(f"{name} could not be loaded. {error}") from error
                self.loaded = Loaded(name, model, tokenizer, tuple(model.check_conditioning().untrained))
            return self.loaded


@dataclass(frozen=True)
class Wish:
    """
    What a visitor asks for.

    Args:
        prompt (`str`): The request.
        num_streams (`int`): Sections.
        plan (`str`): `"trunk"`, `"text"` (in `outline`) or `"none"`.
        outline (`str`): A line `1. Header: item; item` per section.
        max_new_tokens (`int`), temperature (`float`), seed (`int`): As in `generate`.
        interventions (`tuple[str]`): Words as `make_interventions` reads them.
        commit_policy (`str`): As in `generate`.
        compare (`bool`): Write the answer again with the bus off.
        calls_per_second (`float`, *optional*): At most so many trunk calls.
    """

    prompt: str
    num_streams: int = 3
    plan: str = "trunk"
    outline: str = ""
    max_new_tokens: int = 96
    temperature: float = 1.0
    seed: int = 0
    interventions: tuple[str, ...] = ()
    commit_policy: str = "stream"
    compare: bool = False
    calls_per_second: float | None = None


def make_call(wish: Wish, tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
    """
    The rendered prompt, outline included where the visitor wrote it, and the arguments of `generate`.

    Raises:
        ValueError: For an empty prompt, a plan that has not one line per stream, or an unknown intervention.
    """
    if not wish.prompt.strip():
        raise ValueError("Write a request first.")
    prompt, own = render_request(wish.prompt, tokenizer), {}
    if wish.plan == "text":
        lines = parse_outline(wish.outline)
        if len(lines) != wish.num_streams:
            raise ValueError(
                f"The plan has {len(lines)} lines of the form '1. Header: item; item', must have {wish.num_streams}, "
                "one per stream."
            )
        headers = [line.header for line in lines]
        prompt += render_outline_lines(headers, [line.items for line in lines])
        items = [{"text": item, "stream": stream} for stream, line in enumerate(lines) for item in line.items]
        own = {"headers": headers, "plan_texts": items}
    arguments = DecodeArguments(
        model="",
        plan="trunk" if wish.plan == "trunk" else "none",
        num_streams=wish.num_streams,
        max_new_tokens=wish.max_new_tokens,
        temperature=wish.temperature,
        seed=wish.seed,
        interventions=list(wish.interventions),
        commit_policy=wish.commit_policy,
        **own,
    )
    return prompt, arguments.generate_arguments()


def decode(loaded: Loaded, wish: Wish, label: str) -> Iterator[Board]:
    """
    Decodes in a thread; yields the board whenever it has changed, and its last state at the end.

    A reader that stops reading stops the call; the next one with this model begins when it has ended. What the call
    raises is raised here.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt, options = make_call(wish, tokenizer)
    inputs = tokenizer([prompt], return_tensors="pt", add_special_tokens=False).to(model.trunk.device)

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    recorder = BoardRecorder(text, label, wish.calls_per_second)

    def work() -> None:
        with loaded.turn:
            callbacks = [ReadingRecorder(), recorder]
            model.generate(inputs["input_ids"], tokenizer=tokenizer, callbacks=callbacks, **options)

    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(work)
        try:
            while not running.done():
                if recorder.changed.wait(REFRESH_SECONDS):
                    yield recorder.snapshot()
                    time.sleep(REFRESH_SECONDS)
        finally:
            recorder.stopped.set()
        running.result()
    yield recorder.snapshot()


def answer(loaded: Loaded, wish: Wish) -> Iterator[list[Board]]:
    """The boards of a wish: the answer, then, to compare, the same with the bus off and nothing else changed."""
    label = "With notes" if wish.compare else "Answer"
    boards: list[Board] = []
    for board in decode(loaded, wish, label):
        boards = [board]
        yield boards
    if wish.compare:
        without = replace(wish, interventions=(*wish.interventions, "ablate"))
        for board in decode(loaded, without, "Without notes"):
            yield [*boards, board]


def outline_of(board: Board) -> str:
    """The plan of an answer as the plan editor has it."""
    lines = (
        f"{number}. {column.title}: {'; '.join(text for text, _ in column.items)}"
        for number, column in enumerate(board.columns, start=1)
    )
    return "\n".join(lines)
