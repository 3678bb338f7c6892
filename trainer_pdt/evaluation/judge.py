"""A chat model compares answers to the same request, in both orders, along five axes and over all.

The axes are those of Skeleton-of-Thought's evaluation (Ning et al. 2023, 2307.15337), in our own words. A judge that
prefers a place rather than an answer contradicts itself when the answers change places; how often it does, and which
place it prefers, stands beside every win rate.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.chat_answers import About, answer_schema, parse_answer
from ..data.chat_caller import ChatCaller
from ..data.chat_client import BudgetExceeded, ChatRequest, ServerUnavailable
from ..data.chat_prompts import Messages, fenced_messages
from ..data.counting import bootstrap_rate, wilson_rate
from ..data.teachers import Rejection
from .scoring import rate_dict

logger = logging.getLogger(__name__)

RULES_VERSION = 1
"""Raised when requests or the reading of answers change, so that stored answers are not taken."""

Place = Literal["first", "second", "tie"]
PLACES: dict[Place, int] = {"first": 1, "tie": 0, "second": -1}

INSTRUCTIONS = """\
You compare two answers to the same request. Judge what they say, not how long they are or which of them stands \
first. Where one is better say first or second; where neither is, say tie.

First write in one or two sentences what decides. Then judge each question of the form by itself: an answer may win \
one and lose another. Last say which answer is better over all.

Answer with JSON of the given form."""


@dataclass(frozen=True)
class VerdictAnswer:
    """What a judge says about two answers, in the order in which it saw them."""

    reason: Annotated[str, About("One or two sentences on what decides", 1, 2000)]
    relevance: Annotated[Place, About("Which keeps to what was asked, and leaves less of it out?")]
    coherence: Annotated[Place, About("Whose parts fit each other better, in order and without contradiction?")]
    diversity: Annotated[Place, About("Which shows more sides of the matter, and repeats itself less?")]
    integrity: Annotated[Place, About("Which is more honest and fair, and less likely to harm or mislead?")]
    immersion: Annotated[Place, About("Which keeps better to the voice and the part that the request asks for?")]
    overall: Annotated[Place, About("Which is the better answer over all?")]


AXES = ("overall", "relevance", "coherence", "diversity", "integrity", "immersion")
"""What is judged, the verdict over all first."""


@dataclass(frozen=True, kw_only=True)
class Judge(ChatCaller):
    """
    A chat model behind any OpenAI-compatible server. Its other fields are those of
    [`~trainer_pdt.data.chat_client.ChatOptions`]: place of the server, limits, budget, and the file that keeps every
    answer.

    Args:
        model (`str`): Its name.
        answer_tokens (`int`, *optional*, defaults to 600): Tokens of the first attempt at an answer.
        temperature (`float`, *optional*, defaults to 0.0), seed (`int`, *optional*, defaults to 0): Of sampling.
    """

    model: str
    answer_tokens: int = 600
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"temperature": (0, 2), "answer_tokens": (1, 1_000_000)}
        self.check({**ranges, "max_answer_tokens": (self.answer_tokens, 10_000_000)}, {self.model})

    def compare(self, request: str, first: str, second: str) -> VerdictAnswer:
        """
        What the model says about two answers.

        Args:
            request (`str`), first (`str`), second (`str`): What was asked, and the answers in the order shown.

        Raises:
            Rejection, BudgetExceeded, ServerUnavailable: See [`~trainer_pdt.data.chat_client.ChatClient`].
        """
        asked = ChatRequest(
            self.model,
            verdict_messages(request, first, second),
            answer_schema(VerdictAnswer),
            self.answer_tokens,
            self.temperature,
            self.seed,
            RULES_VERSION,
        )
        return self.ask(asked, lambda text: parse_answer(VerdictAnswer, text))


def make_judge(options: Mapping[str, Any], store: str | Path) -> Judge:
    """
    A judge from fields that a recipe gives.

    Args:
        options (`Mapping[str, Any]`): Fields of [`Judge`].
        store (`str` or `Path`): File of the answers, where the fields name none.
    """
    try:
        return Judge(**{"store": Path(store), **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`judge`: {str(error).replace('Judge.__init__() ', '')}") from error


def verdict_messages(request: str, first: str, second: str) -> Messages:
    """The request for a verdict; no text can end the place where it stands."""
    parts = {"request": request, "first-answer": first, "second-answer": second}
    mark = hashlib.sha256("\n".join(parts.values()).encode()).hexdigest()[:8]
    material = "\n\n".join(f"<{name}-{mark}>\n{text}\n</{name}-{mark}>" for name, text in parts.items())
    return fenced_messages(INSTRUCTIONS, material, "Compare the first answer with the second one.")


def judge_pairs(judge: Judge, pairs: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """
    Judges every pair in both orders.

    Args:
        judge ([`Judge`]): Who judges; what it has answered before is not asked again.
        pairs (`Sequence[tuple[str, str, str]]`): Request, answer, and the reference that the answer is held against.

    Returns:
        `dict`: `axes` with [`win_rates`] of each of [`AXES`]; `pairs`, how many there were, and `judged`, how many
        have a verdict in both orders; `failed`, verdicts that could not be had by reason; `stopped`, why the rest was
        not asked for, or `None`; `tokens` and `cost_usd` of all that the store holds.

    Raises:
        BudgetExceeded, ServerUnavailable: Before any pair was judged.
    """
    jobs = [(request, *texts) for request, *both in pairs for texts in (both, both[::-1])]
    failed: Counter[str] = Counter()
    stopped: BudgetExceeded | ServerUnavailable | None = None
    verdicts: list[VerdictAnswer | None] = []
    with ThreadPoolExecutor(judge.max_concurrency) as pool:
        futures = [pool.submit(judge.compare, *job) for job in jobs]
        for future in futures:
            verdict = None
            try:
                verdict = future.result()
            except Rejection as rejection:
                failed[rejection.reason] += 1
            except (BudgetExceeded, ServerUnavailable) as error:
                stopped = stopped or error
                for waiting in futures:
                    waiting.cancel()
            except CancelledError:
                pass
            verdicts.append(verdict)
    both = [(one, other) for one, other in zip(verdicts[::2], verdicts[1::2], strict=True) if one and other]
    if stopped is not None and not both:
        raise stopped
    if stopped is not None:
        logger.warning("judged %d of %d pairs: %s", len(both), len(pairs), stopped)
    tokens, cost = judge.client().store.spent()
    axes = {axis: win_rates([(getattr(a, axis), getattr(b, axis)) for a, b in both]) for axis in AXES}
    if axes["overall"]["bias"]:
        logger.warning("the judge prefers what stands %s, whatever it is", axes["overall"]["bias"])
    return {
        **{"model": judge.model, "pairs": len(pairs), "judged": len(both), "failed": dict(failed)},
        **{"stopped": stopped and str(stopped), "tokens": tokens, "cost_usd": cost, "axes": axes},
    }


def win_rates(verdicts: Sequence[tuple[Place, Place]]) -> dict[str, Any]:
    """
    Wins of answers over references, each judged in both orders.

    Args:
        verdicts (`Sequence[tuple[Place, Place]]`): Per pair, which place won with the answer shown first, and with the
            answer shown second.

    Returns:
        `dict`: `win` and `loss`, shares of pairs that the answer wins or loses in both orders; `tie`, all others;
        `net_win_rate`, wins minus losses; `consistent`, the share whose verdict is the same in both orders; of the
        other ones `first_place`, the share in which the first place gained by the order; `bias`, `"first"` or
        `"second"` where that interval leaves 1/2 out, else `None`. Values are `{mean, low, high, n}`, intervals of
        shares are Wilson's.
    """
    scores = [(PLACES[shown_first], -PLACES[shown_second]) for shown_first, shown_second in verdicts]
    wins, losses = (sum(score == (side, side) for score in scores) for side in (1, -1))
    moved = [one - other for one, other in scores if one != other]
    first_place = rate_dict(wilson_rate(sum(shift > 0 for shift in moved), len(moved)))
    bias = None
    if moved and (first_place["low"] > 0.5 or first_place["high"] < 0.5):
        bias = "first" if first_place["low"] > 0.5 else "second"
    net = bootstrap_rate(((score == (1, 1)) - (score == (-1, -1)), 1) for score in scores)
    return {
        "win": rate_dict(wilson_rate(wins, len(scores))),
        "tie": rate_dict(wilson_rate(len(scores) - wins - losses, len(scores))),
        "loss": rate_dict(wilson_rate(losses, len(scores))),
        "net_win_rate": {name: value for name, value in rate_dict(net).items() if name != "clusters"},
        "consistent": rate_dict(wilson_rate(len(scores) - len(moved), len(scores))),
        "first_place": first_place,
        "bias": bias,
    }
