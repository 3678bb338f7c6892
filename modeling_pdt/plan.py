"""Plans: the outline that the trunk writes, plan items, and the buckets that the planner predicts."""

import hashlib
import re
from dataclasses import dataclass

OUTLINE_LINE = re.compile(r"^\s*(\d+)\.\s*([^:\n]+):?\s*(.*?)\s*$")
OUTLINE_END = "\n\n"


@dataclass(frozen=True)
class PlanEntry:
    """
    One plan item as decoding sees it.

    Args:
        text (`str`): What the item is about.
        stream (`int`, *optional*): Stream that owns it; `None` when nobody was named.
    """

    text: str
    stream: int | None = None


@dataclass(frozen=True)
class StreamPlan:
    """
    One line of an outline.

    Args:
        header (`str`): Title of the section.
        items (`tuple[str]`): What the section is to state.
    """

    header: str
    items: tuple[str, ...]


def format_outline(streams: list[StreamPlan]) -> str:
    """The outline as text: a numbered line per stream, `1. Header: item; item`, ended by an empty line."""
    lines = [f"{k}. {stream.header}: {'; '.join(stream.items)}\n" for k, stream in enumerate(streams, start=1)]
    return "".join(lines) + "\n"


def parse_outline(text: str) -> list[StreamPlan]:
    """The numbered lines of an outline up to its first empty line; other lines are passed over."""
    streams = []
    for line in text.split(OUTLINE_END)[0].splitlines():
        match = OUTLINE_LINE.match(line)
        if match:
            items = tuple(item.strip() for item in match.group(3).split(";") if item.strip())
            streams.append(StreamPlan(match.group(2).strip(), items))
    return streams


def plan_bucket(text: str, stream: int, salt: str, num_buckets: int) -> int:
    """
    Hash bucket of a plan item, qualified by the stream that owns it; 0 is reserved for "no item".

    Args:
        text (`str`), stream (`int`): The item and its owner.
        salt (`str`): `PDTConfig.plan_hash_salt`.
        num_buckets (`int`): `PDTAdapterConfig.plan_vocab_size`.
    """
    digest = hashlib.sha256(f"{salt}::{stream}::{text.strip().lower()}".encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (num_buckets - 1)


def check_plan_entries(entries: list[dict], num_streams: int) -> list[PlanEntry]:
    """
    Plan entries from `{"text": ..., "stream": ...}` mappings.

    Raises:
        ValueError: For an entry without text, an unknown key, or a stream outside the call's streams.
    """
    checked = []
    for entry in entries:
        if not isinstance(entry, dict) or not str(entry.get("text", "")).strip() or set(entry) - {"text", "stream"}:
            raise ValueError(f"a plan_texts entry must be {{'text': str, 'stream': int}}, got {entry!r}.")
        stream = entry.get("stream")
        if stream is not None and (not isinstance(stream, int) or not 0 <= stream < num_streams):
            raise ValueError(f"plan_texts: stream must be in [0, {num_streams - 1}], got {stream!r}.")
        checked.append(PlanEntry(str(entry["text"]).strip(), stream))
    return checked
