"""An OpenAI-compatible server on the loopback that plans and notes toy documents, and fails as it is told."""

import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from trainer_pdt.data.teachers import SourceDocument

KINDS = ("429", "500", "timeout", "truncated", "malformed", "schema", "language", "dropped")
CUES = ("mayor", "harbour", "festival", "bridge", "market")
FILLER = "It is one of the things that visitors of the town hear about on the first day, and that they like to tell."
GERMAN = "Was in der Stadt von den Leuten und auch von der Geschichte zu sagen war, das wird nicht für sich erzählt."


def toy_document(number, sections=3):
    """A town whose sections state a fact each; all but the first repeat the first one's."""
    values = [f"{'ABCDE'[n]}rno{number}" for n in range(sections)]
    texts = [f"The {CUES[n]} of the town is {values[n]}. {FILLER}" for n in range(sections)]
    texts[1:] = [f"{text} Here too the {CUES[0]} is {values[0]}." for text in texts[1:]]
    headers = tuple(f"On the {cue}" for cue in CUES)
    return SourceDocument(f"toy-{number:05d}", "toys", f"Town {number}", tuple(zip(headers, texts, strict=False)))


def make_plan(text):
    """One section per passage."""
    streams = []
    for number, passage in re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE):
        (cue,) = re.findall(r"The (\w+) of the town", passage)
        items = [{"cue": cue, "text": f"what the {cue} of the town is and that it is this"}]
        place = {"first_passage": int(number), "last_passage": int(number)}
        streams.append({"header": f"The {cue}", "summary": f"It is about the {cue}.", **place, "items": items})
    return {"prompt": "Describe the town for the people that come to it.", "streams": streams}


def make_notes(text):
    """Every statement of an item."""
    statements, section, items = [], 0, {}
    for line in text.splitlines():
        if found := re.match(r"Section (\d+):", line):
            section = int(found.group(1))
        elif found := re.match(r"- item (s\d/(\w+)):", line):
            items[found.group(2)] = found.group(1)
    for line in text.splitlines():
        section = int(found.group(1)) if (found := re.match(r"Section (\d+):", line)) else section
        for found in re.finditer(r"[Tt]he (\w+)(?: of the town)? is ([A-Z]\w+)", line):
            place = {"item_id": items[found.group(1)], "section": section, "entity_id": "e0", "certainty": 1}
            statements.append({**place, "quote": found.group(), "value": found.group(2)})
    return {"entities": [], "statements": statements, "coverage": []}


class ChatServer(ThreadingHTTPServer):
    """
    Counts what it is asked.

    Args:
        failures: Share of requests that fail, by kinds in turn of chance.
        kinds: Kinds of failures.
        latency: Seconds per answer.
        seed: Which requests fail follows from it and from the request alone.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, failures=0.0, kinds=KINDS, latency=0.0, seed=0, hang=1.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.kinds, self.latency, self.seed, self.hang = failures, kinds, latency, seed, hang
        self.lock = threading.Lock()
        self.active = self.most_active = 0
        self.calls, self.good, self.outcomes = Counter(), Counter(), Counter()
        self.bodies, self.headers_seen = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

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


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        """Nothing on the terminal."""

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
        self.reply(200, self.answer(body, failure))

    def answer(self, body, failure):
        schema, text = body["response_format"]["json_schema"]["schema"], body["messages"][1]["content"]
        is_plan = "streams" in schema["properties"]
        answer = make_plan(text) if is_plan else make_notes(text)
        if failure == "schema":
            answer.pop(next(iter(answer)))
        if failure == "language":
            answer = {**answer, "prompt": GERMAN} if is_plan else {"statements": []}
            for stream in answer.get("streams", ()):
                stream.update(header=GERMAN[:40], summary=GERMAN)
        content, reason = json.dumps(answer), "stop"
        if failure in ("truncated", "malformed"):
            content, reason = content[: len(content) // 2], "length" if failure == "truncated" else "stop"
        message = {"role": "assistant", "content": content}
        usage = {
            "prompt_tokens": len(json.dumps(body["messages"])) // 4,
            "completion_tokens": min(len(content) // 4, body["max_tokens"]),
        }
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}

    def reply(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(**choices):
    """A running [`ChatServer`]."""
    server = ChatServer(**choices)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
