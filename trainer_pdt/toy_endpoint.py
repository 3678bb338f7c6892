"""An OpenAI-compatible server on the loopback that plans and notes toy documents, always rightly.

Builds with the chat teacher are measured against it; tests make it fail as they need.
"""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .data.teachers import SourceDocument

CUES = ("mayor", "harbour", "festival", "bridge", "market")
FILLER = "It is one of the things that visitors of the town hear about on the first day, and that they like to tell."


def toy_document(number: int, sections: int = 3) -> SourceDocument:
    """
    A town whose sections state a fact each; all but the first repeat the first one's.

    Args:
        number (`int`): Which town.
        sections (`int`, *optional*, defaults to 3): 1 to 5.
    """
    values = [f"{'ABCDE'[n]}rno{number}" for n in range(sections)]
    texts = [f"The {CUES[n]} of the town is {values[n]}. {FILLER}" for n in range(sections)]
    texts[1:] = [f"{text} Here too the {CUES[0]} is {values[0]}." for text in texts[1:]]
    headers = tuple(f"On the {cue}" for cue in CUES)
    return SourceDocument(f"toy-{number:05d}", "toys", f"Town {number}", tuple(zip(headers, texts, strict=False)))


def make_plan(text: str) -> dict[str, Any]:
    """The answer to a request for a plan: one section per passage."""
    streams = []
    for number, passage in re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE):
        (cue,) = re.findall(r"The (\w+) of the town", passage)
        items = [{"cue": cue, "text": f"what the {cue} of the town is and that it is this"}]
        place = {"first_passage": int(number), "last_passage": int(number)}
        streams.append({"header": f"The {cue}", "summary": f"It is about the {cue}.", **place, "items": items})
    return {"prompt": "Describe the town for the people that come to it.", "streams": streams}


def make_notes(text: str) -> dict[str, Any]:
    """The answer to a request for notes: every statement of an item."""
    statements, section = [], 0
    items: dict[str, str] = {}
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


class ToyHandler(BaseHTTPRequestHandler):
    """Answers after the server's latency; keeps connections open, as servers of models do."""

    protocol_version = "HTTP/1.1"
    # A response is one packet: a second one would wait for the client to acknowledge the first.
    wbufsize = -1

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        """A right answer, the server's latency after the request."""
        due = time.monotonic() + self.server.latency  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.completion(body, json.dumps(self.answer(body)))
        time.sleep(max(0.0, due - time.monotonic()))
        self.reply(200, answer)

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The right answer to a request, which is one for a plan or for notes by its schema."""
        schema, text = body["response_format"]["json_schema"]["schema"], body["messages"][1]["content"]
        return make_plan(text) if "streams" in schema["properties"] else make_notes(text)

    def completion(self, body: Mapping[str, Any], content: str, reason: str = "stop") -> dict[str, Any]:
        """A response that holds a text, with a count of tokens."""
        usage = {
            "prompt_tokens": len(json.dumps(body["messages"])) // 4,
            "completion_tokens": min(len(content) // 4, body["max_tokens"]),
        }
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}

    def reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Sends JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class ToyServer(ThreadingHTTPServer):
    """
    The server, on a free port.

    Args:
        latency (`float`, *optional*, defaults to 0.0): Seconds from a request to its answer, its making included.
        handler (`type`, *optional*, defaults to [`ToyHandler`]): What answers.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency: float = 0.0, handler: type[ToyHandler] = ToyHandler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.latency = latency

    @property
    def url(self) -> str:
        """What `base_url` of a teacher has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(server: ToyServer) -> Iterator[ToyServer]:
    """Runs a server in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
