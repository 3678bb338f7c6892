"""An OpenAI-compatible server on the loopback that plans and notes toy documents, and fails as it is told."""

import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

from trainer_pdt.toy_endpoint import ToyHandler, ToyServer, serving, toy_document

__all__ = ["KINDS", "ChatServer", "Handler", "chat_server", "toy_document"]

KINDS = ("429", "500", "timeout", "truncated", "malformed", "schema", "language", "dropped")
GERMAN = "Was in der Stadt von den Leuten und auch von der Geschichte zu sagen war, das wird nicht für sich erzählt."


class ChatServer(ToyServer):
    """
    Counts what it is asked.

    Args:
        failures: Share of requests that fail, by kinds in turn of chance.
        kinds: Kinds of failures.
        latency: Seconds per answer.
        seed: Which requests fail follows from it and from the request alone.
        handler: What answers.
    """

    def __init__(self, failures=0.0, kinds=KINDS, latency=0.0, seed=0, hang=1.0, handler=None):
        super().__init__(latency, handler or Handler)
        self.failures, self.kinds, self.seed, self.hang = failures, kinds, seed, hang
        self.lock = threading.Lock()
        self.active = self.most_active = 0
        self.calls, self.good, self.outcomes = Counter(), Counter(), Counter()
        self.bodies, self.headers_seen = [], []

    def handle_error(self, request, client_address):
        """A client that has gone away is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def draw(self, body):
        """Name of the request without corrections, and how it fails, if it does."""
        key = hashlib.sha256(json.dumps([body["model"], body["messages"][:2]]).encode()).hexdigest()
        with self.lock:
            self.calls[key] += 1
            self.bodies.append(body)
            attempt = self.calls[key]
        rng = random.Random(f"{self.seed}/{key}/{attempt}")
        return key, rng.choice(self.kinds) if rng.random() < self.failures else None


class Handler(ToyHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key, failure = server.draw(body)
        with server.lock:
            server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        time.sleep(server.latency)
        with server.lock:
            server.active -= 1
            server.outcomes[failure or "good"] += 1
        if failure == "timeout":
            time.sleep(server.hang)
        if failure in ("timeout", "dropped"):
            self.close_connection = True
            return
        if failure in ("429", "500", "401", "400"):
            self.reply(int(failure), {"error": "told to"}, {"Retry-After": "0"} if failure == "429" else {})
            return
        if failure is None:
            with server.lock:
                server.good[key] += 1
        self.reply(200, self.failed(body, failure))

    def failed(self, body, failure):
        """A response that is wrong in the way of a failure, or right."""
        answer = self.answer(body)
        if failure == "schema":
            answer.pop(next(iter(answer)))
        if failure == "language":
            answer = {**answer, "prompt": GERMAN} if "streams" in answer else {"statements": []}
            for stream in answer.get("streams", ()):
                stream.update(header=GERMAN[:40], summary=GERMAN)
        content, reason = json.dumps(answer), "stop"
        if failure in ("truncated", "malformed"):
            content, reason = content[: len(content) // 2], "length" if failure == "truncated" else "stop"
        return self.completion(body, content, reason)


@contextmanager
def chat_server(**choices):
    """A running [`ChatServer`]."""
    with serving(ChatServer(**choices)) as server:
        yield server
