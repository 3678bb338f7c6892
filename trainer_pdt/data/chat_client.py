"""Asks a chat model for an answer of a fixed form, until it has one, within limits.

Limits on requests in flight, time, attempts and cost; every answer is kept, and none is paid for twice.
"""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import InferenceClient, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError

from .chat_answers import InvalidAnswer
from .chat_store import FINISHED, AnswerStore, Usage
from .teachers import Rejection

Answer = TypeVar("Answer")

BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token, for estimates."""

FEWEST_BYTES_PER_TOKEN = 2
"""The same where an estimate may not be exceeded: what a request reserves of the budget."""

MAX_BACKOFF_S = 60.0
FATAL_STATUS, TEMPORARY_STATUS = (401, 402, 403, 404, 405), (408, 409, 425, 429)
TEMPORARY = ("rate_limited", "server_error")
STOPPED = "stopped"
"""Outcome of a request that the end of the build has ended; it tells nothing of the server."""

CORRECTION = "Your answer cannot be used: {problem} Give the whole answer again, as JSON and with this corrected."


class BudgetExceeded(RuntimeError):
    """The next request may cost more than the budget has left. What is finished is kept."""


class ServerUnavailable(RuntimeError):
    """The server answers nothing any more, or refuses every request. What is finished is kept."""


@dataclass(frozen=True)
class ChatRequest:
    """
    What a model is asked.

    Args:
        model (`str`): Its name.
        messages (`tuple[tuple[str, str]]`): (role, text).
        schema (`dict`): JSON Schema of the answer.
        max_tokens (`int`): Tokens of the first attempt; doubled where an answer was cut off.
        temperature (`float`), seed (`int`): Of sampling.
        version (`int`): Of the rules by which the answer is read.
    """

    model: str
    messages: tuple[tuple[str, str], ...]
    schema: Mapping[str, Any]
    max_tokens: int
    temperature: float
    seed: int
    version: int

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that the answer depends on."""
        parts = [self.model, self.messages, self.schema, self.temperature, self.seed, self.version]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def bytes(self) -> int:
        """UTF-8 bytes of what is sent."""
        return sum(len(text.encode()) for _, text in self.messages) + len(json.dumps(self.schema))


@dataclass(frozen=True)
class ChatOptions:
    """
    How a server is asked.

    Args:
        store (`Path`): File of the answers, see [`AnswerStore`].
        base_url (`str`, *optional*): Of any OpenAI-compatible server, for example `http://localhost:8000/v1`;
            missing = a provider of the Hub.
        provider (`str`, *optional*): Provider of the Hub; missing = its choice.
        api_key_variable (`str`, *optional*): Environment variable that holds the key. Missing: the token that the Hub
            has stored, for its own providers only; servers at a `base_url` get no secret.
        max_concurrency (`int`): Most requests in flight, at most 100: as many connections the session of
            `huggingface_hub` opens.
        timeout_s (`float`): Longest wait for an answer.
        attempts (`int`): Most requests per answer.
        backoff_s (`float`): Wait before the second attempt, doubled for each further one.
        max_answer_tokens (`int`): Most tokens of an answer, however often it was cut off.
        prices (`Mapping[str, tuple[float, float]]`): US dollars per million input and output tokens, by model.
        budget_tokens (`int`, *optional*), budget_usd (`float`, *optional*): Caps on all requests of the store.
    """

    store: Path
    base_url: str | None = None
    provider: str | None = None
    api_key_variable: str | None = None
    max_concurrency: int = 8
    timeout_s: float = 120.0
    attempts: int = 6
    backoff_s: float = 1.0
    max_answer_tokens: int = 16_000
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    budget_tokens: int | None = None
    budget_usd: float | None = None

    def usage(self, model: str, input_tokens: float, output_tokens: float) -> Usage:
        """Tokens with their price."""
        price_in, price_out = self.prices.get(model, (0.0, 0.0))
        cost = (input_tokens * price_in + output_tokens * price_out) / 1e6
        return Usage(int(input_tokens), int(output_tokens), cost)


class _Failure(Exception):
    """An attempt that gave no usable answer.

    Args:
        reason (`str`), detail (`str`): Why.
        usage ([`Usage`]): What it took.
        wait_s (`float`, *optional*): Seconds that the server asks for; missing = the usual wait.
        is_answer (`bool`): The model answered, and is told what is wrong.
    """

    def __init__(
        self, reason: str, detail: str, usage: Usage, wait_s: float | None = None, is_answer: bool = False
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.usage = reason, detail, usage
        self.wait_s, self.is_answer = wait_s, is_answer


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The wish for an answer of a JSON Schema, as OpenAI-compatible servers take it."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


class _PlaceClient(InferenceClient):
    """
    Holds a place while a request is on its way, and at no other time: not while it is written or its answer read.

    For a server at a `base_url`, `InferenceClient` writes schemas as TGI does; others would ignore that form.

    Args:
        place (`Callable[[], AbstractContextManager]`): Waits for a place and frees it at its end.
    """

    def __init__(self, place: Callable[[], AbstractContextManager[None]], **choices: Any) -> None:
        super().__init__(**choices)
        self._place = place

    def _inner_post(self, request_parameters: Any, **choices: Any) -> Any:
        form = request_parameters.json["response_format"]
        if form["type"] == "json_object":
            request_parameters.json["response_format"] = response_format(form["value"])
        with self._place():
            return super()._inner_post(request_parameters, **choices)


class ChatClient:
    """
    Asks until an answer can be used, gives up after some attempts. Safe to call from many threads.

    Args:
        options ([`ChatOptions`]): How.
        api_key (`str`, *optional*): The key.
    """

    def __init__(self, options: ChatOptions, api_key: str | None) -> None:
        if is_offline_mode():
            raise ServerUnavailable("HF_HUB_OFFLINE is set, and requests to a chat model go through huggingface_hub.")
        self.options = options
        self.store = AnswerStore(options.store, options.budget_tokens, options.budget_usd)
        # Without a key the client would send the Hub's token to whatever server is named.
        token = api_key or ("none" if options.base_url else None)
        self._client = _PlaceClient(
            self._place,
            base_url=options.base_url,
            provider=options.provider,  # type: ignore[arg-type]
            token=token,
            timeout=options.timeout_s,
        )
        self._places = threading.Semaphore(options.max_concurrency)
        self._settled = threading.Condition()
        self._in_flight = self._failures_in_a_row = 0

    def ask(self, request: ChatRequest, read: Callable[[str], Answer]) -> Answer:
        """
        The answer to a request, from the store if it is there. A stored one that cannot be used, since answers are
        checked for more than they were, is asked for again.

        Args:
            request ([`ChatRequest`]): The request.
            read (`Callable[[str], Answer]`): Makes the answer of the model's text; raises [`InvalidAnswer`].

        Raises:
            [`Rejection`]: After the last attempt, with the reason of its failure; at once if the server refuses just
                this request (`refused_request`).
            [`BudgetExceeded`], [`ServerUnavailable`]: The build has to stop.
        """
        max_tokens, problem = request.max_tokens, None
        stored = self.store.answer(request.key)
        if stored is not None:
            try:
                return read(stored)
            except InvalidAnswer as invalid:
                problem = invalid.detail
        for attempt in range(self.options.attempts):
            try:
                return self._attempt(request, max_tokens, problem, read)
            except _Failure as failure:
                last = failure
            if last.reason == "no_access":
                raise ServerUnavailable(f"the server refuses all requests: {last.detail}") from last
            if last.reason == "refused_request":
                break
            if last.reason == "truncated_answer":
                max_tokens = min(2 * max_tokens, self.options.max_answer_tokens)
            if last.is_answer:
                problem = last.detail
            elif attempt + 1 < self.options.attempts:
                self._wait(attempt, last.wait_s)
        raise Rejection(last.reason, last.detail)

    def _attempt(
        self, request: ChatRequest, max_tokens: int, problem: str | None, read: Callable[[str], Answer]
    ) -> Answer:
        """One request, entered before and settled after; raises `_Failure`."""
        most = self._most(request, max_tokens, problem)
        number = self._reserve(request, most)
        outcome, usage, text = STOPPED, most, None
        try:
            text, usage = self._send(request, max_tokens, problem, most)
            answer = read(text)
            outcome = FINISHED
            return answer
        except _Failure as failure:
            outcome, usage = failure.reason, failure.usage
            raise
        except InvalidAnswer as invalid:
            outcome = invalid.reason
            raise _Failure(invalid.reason, invalid.detail, usage, is_answer=True) from invalid
        except ServerUnavailable:
            # It was waiting for a place, and is not sent.
            usage = Usage()
            raise
        finally:
            self._settle(number, outcome, usage, text if outcome == FINISHED else None)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """
        One of the places for requests in flight; nothing more is sent to a server that has failed too often.

        How the request ended is counted before its place is free: who waits for it knows of the last failure.
        """
        with self._places:
            self._require_server()
            try:
                yield
            except (HfHubHTTPError, HTTPError) as error:
                self._count(_is_temporary(error))
                raise
            self._count(False)

    def _most(self, request: ChatRequest, max_tokens: int, problem: str | None) -> Usage:
        size = request.bytes() + len((problem or "").encode())
        return self.options.usage(request.model, size / FEWEST_BYTES_PER_TOKEN + 64, max_tokens)

    def _reserve(self, request: ChatRequest, most: Usage) -> int:
        """Enters the request; waits where only requests in flight leave the budget no room."""
        with self._settled:
            self._require_server()
            while (number := self.store.reserve(request.key, most)) is None:
                if not self._in_flight:
                    tokens, cost = self.store.spent()
                    raise BudgetExceeded(
                        f"the next request may take {most.tokens} tokens (${most.cost_usd:.4f}); spent: {tokens} of "
                        f"budget_tokens={self.options.budget_tokens} and ${cost:.4f} of "
                        f"budget_usd={self.options.budget_usd}. Raise the budget to go on; what is finished is kept."
                    )
                self._settled.wait()
                self._require_server()
            self._in_flight += 1
        return number

    def _settle(self, number: int, outcome: str, usage: Usage, answer: str | None = None) -> None:
        with self._settled:
            self.store.settle(number, outcome, usage, answer)
            self._in_flight -= 1
            self._settled.notify_all()
            self._require_server()

    def _count(self, failed: bool) -> None:
        with self._settled:
            self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0

    def _require_server(self) -> None:
        """Raises where too many requests in a row failed: nothing more is sent."""
        most = self.options.attempts * self.options.max_concurrency
        if self._failures_in_a_row >= most:
            raise ServerUnavailable(f"{most} requests in a row failed. What is finished is kept; run the build again.")

    def _send(self, request: ChatRequest, max_tokens: int, problem: str | None, most: Usage) -> tuple[str, Usage]:
        """The model's text and what it took; a request without a count may have taken the most."""
        messages = [{"role": role, "content": text} for role, text in request.messages]
        if problem is not None:
            messages.append({"role": "user", "content": CORRECTION.format(problem=problem)})
        try:
            output = self._client.chat_completion(
                messages,
                model=request.model,
                max_tokens=max_tokens,
                temperature=request.temperature,
                seed=request.seed,
                response_format=response_format(request.schema),  # type: ignore[arg-type]
            )
        except InferenceTimeoutError as error:
            raise _Failure("timed_out", f"no answer in {self.options.timeout_s} s", most) from error
        except HfHubHTTPError as error:
            raise _http_failure(error) from error
        except HTTPError as error:
            raise _Failure("connection_failed", f"{type(error).__name__}: {error}"[:200], most) from error
        except ValueError as error:
            raise _Failure("malformed_response", f"{type(error).__name__}: {error}"[:200], most) from error
        return self._text(request, output, most)

    def _text(self, request: ChatRequest, output: Any, most: Usage) -> tuple[str, Usage]:
        """The text of a response; usage as the server counts it, else the most that it may be."""
        # What a server sends is parsed without checks: a field that it left out is `None`, one of another type stays.
        counts = getattr(output, "usage", None)
        tokens = [getattr(counts, name, None) for name in ("prompt_tokens", "completion_tokens")]
        usage = self.options.usage(request.model, *tokens) if all(isinstance(n, int) for n in tokens) else most
        choices = getattr(output, "choices", None)
        choice = choices[0] if choices and isinstance(choices, list) else None
        text = getattr(getattr(choice, "message", None), "content", None)
        if not isinstance(text, str):
            raise _Failure("malformed_response", "the response holds no text", usage)
        if getattr(choice, "finish_reason", None) == "length":
            raise _Failure("truncated_answer", f"cut off after {usage.output_tokens} tokens", usage, 0.0)
        return text, usage

    def _wait(self, attempt: int, wait_s: float | None) -> None:
        if wait_s is None:
            wait_s = self.options.backoff_s * 2**attempt * (0.5 + random.random() / 2)
        time.sleep(min(wait_s, MAX_BACKOFF_S))


def _is_temporary(error: HfHubHTTPError | HTTPError) -> bool:
    """Whether the same request may be answered later: no connection, no answer in time, or a status that says so."""
    return not isinstance(error, HfHubHTTPError) or _http_failure(error).reason in TEMPORARY


def _http_failure(error: HfHubHTTPError) -> _Failure:
    """How a refusal is taken; a refused request costs nothing."""
    status = error.response.status_code
    if status in FATAL_STATUS:
        return _Failure("no_access", str(error)[:300], Usage())
    if status in TEMPORARY_STATUS or status >= 500:
        asked = error.response.headers.get("retry-after", "")
        wait_s = float(asked) if asked.replace(".", "", 1).isdigit() else None
        return _Failure("rate_limited" if status == 429 else "server_error", f"status {status}", Usage(), wait_s)
    return _Failure("refused_request", f"status {status}: {error}"[:300], Usage())
