"""Plans: the outline that the trunk writes, plan items, and the buckets that the planner predicts."""

import hashlib
import re
from dataclasses import dataclass

OUTLINE_LINE = re.compile(r"^\s*(\d+)\.\s*([^:\n]+):?\s*(.*?)\s*$")
OUTLINE_END = "\n\n"
# A trunk may say with this word that its outline ends.
PLAN_SENTINEL = "</plan>"


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


def cut_outline(text: str) -> str:
    """An outline without what follows it: up to the first empty line or `</plan>`."""
    return text.split(OUTLINE_END)[0].split(PLAN_SENTINEL)[0]


def parse_outline(text: str) -> list[StreamPlan]:
    """The numbered lines of an outline up to its first empty line or `</plan>`; other lines are passed over."""
    streams = []
    for line in cut_outline(text).splitlines():
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


def read_contract(contract: dict, num_streams: int) -> tuple[list[PlanEntry], list[str]]:
    """
    Plan items and section titles from a plan contract.

    Args:
        contract (`dict`): A document of the dataset, or its part `{"items": [{"text", "stream"}, ...],
            "streams": [{"header"}, ...]}`; other keys are not read. Without `streams` there are no titles.
        num_streams (`int`): S of the call.

    Raises:
        ValueError: For another form, or another number of streams.
    """
    items = contract.get("items") if isinstance(contract, dict) else None
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"plan_contract must hold items {{'text': str, 'stream': int}}, got {contract!r}.")
    entries = check_plan_entries([{key: item.get(key) for key in ("text", "stream")} for item in items], num_streams)
    streams = contract.get("streams") or []
    titles = [stream.get("header") if isinstance(stream, dict) else None for stream in streams]
    if titles and (len(titles) != num_streams or not all(isinstance(title, str) for title in titles)):
        raise ValueError(f"plan_contract: streams must hold num_streams={num_streams} headers, got {titles!r}.")
    return entries, titles
