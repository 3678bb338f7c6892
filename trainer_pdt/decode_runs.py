"""Decoding runs as `recipes/analyze.py` measures them, read from our manifests or the original system's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer_pdt.manifest import check_manifest
from trainer_pdt.telemetry import read_json

# What the original system's manifests hold and ours do not.
ORIGINAL_KEYS = frozenset(("timings", "config", "streams", "rollbacks", "steps"))


@dataclass
class DecodeRun:
    """
    What the measures of a run are computed from. A stream's name starts with its prompt: `0/stream_1`.

    Args:
        name (`str`): File it came from.
        plan_vocab_size, plan_hash_buckets (`int`), plan_hash_salt (`str`): What plan items are hashed into, and how.
        sections (`dict[str, str]`): Text of every stream.
        merged (`list[str]`): Answer of every prompt.
        prompts (`list[str]`): The prompts, rendered; the original's manifests hold none.
        committed (`dict[str, int]`): Tokens that stand, by stream.
        seconds (`dict[str, float]`): `total`, and where measured `prefill` and `exchange`.
        rounds_s (`list[float]`): Seconds between one block boundary of a stream and its next.
        judged (`list[tuple[str, float | None, bool]]`): Stream, agreement, withdrawn or not, by judged block.
        rollbacks (`dict[str, list[int]]`): Tokens of every withdrawn block, by stream.
        forced (`int`): Blocks that stand because no retry was left.
        waits (`int`): Judgements after which a block waited.
        gates (`dict[str, list[float]]`): Scale of the SNC gate at every block of a stream, where it moves.
        margins (`list[float]`): Differences of the two best scores, where tokens were recorded.
        coverage (`dict[str, list[tuple[str, float]]]`): Per stream, text and probability of its plan items.
        reference_notes (`dict[str, list[str]]`): Per stream, notes given for evaluation.
        layers (`list[int]`): Conditioned layers as the manifest states them.
        calls (`int`, *optional*): Trunk calls after the prefill.
        original (`bool`): Read from a manifest of the original system, whose layers were not in its model.
    """

    name: str
    plan_vocab_size: int
    plan_hash_buckets: int
    plan_hash_salt: str
    sections: dict[str, str]
    merged: list[str]
    committed: dict[str, int]
    seconds: dict[str, float]
    rounds_s: list[float] = field(default_factory=list)
    judged: list[tuple[str, float | None, bool]] = field(default_factory=list)
    rollbacks: dict[str, list[int]] = field(default_factory=dict)
    forced: int = 0
    waits: int = 0
    gates: dict[str, list[float]] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    coverage: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    reference_notes: dict[str, list[str]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    calls: int | None = None
    original: bool = False
    prompts: list[str] = field(default_factory=list)


def read_run(path: str | Path) -> DecodeRun:
    """
    Reads a manifest of `recipes/decode.py`, or one of the original system's `infer.py`.

    Raises:
        ValueError: For a file that is neither, naming what does not fit.
    """
    content = read_json(path)
    if isinstance(content, dict) and "schema_version" not in content and content.keys() >= ORIGINAL_KEYS:
        return _read_original(str(path), content)
    check_manifest(content)
    return _read_own(str(path), content)


def _read_own(name: str, manifest: Mapping[str, Any]) -> DecodeRun:
    trace, ended = manifest["trace"], {}
    blocks = [event for event in trace["events"] if event["kind"] in ("commit", "rollback", "stall")]
    items = {event["prompt"]: event["items"] for event in trace["events"] if event["kind"] == "plan"}
    streams = {
        (prompt, stream): f"{prompt}/{result['name']}"
        for prompt, results in enumerate(trace["streams"])
        for stream, result in enumerate(results)
    }
    results = {streams[place]: trace["streams"][place[0]][place[1]] for place in streams}
    rounds_s, judged = [], []
    rollbacks: dict[str, list[int]] = {stream: [] for stream in results}
    gates: dict[str, list[float]] = {}
    for event in blocks:
        place = event["prompt"], event["stream"]
        stream, withdrawn = streams[place], event["kind"] == "rollback"
        if event.get("gate_scale") is not None:
            gates.setdefault(stream, []).append(event["gate_scale"])
        if event["kind"] == "stall":
            continue
        rounds_s.append(event["time_s"] - ended.get(place, trace["timings"]["prefill_s"]))
        ended[place] = event["time_s"]
        judged.append((stream, event["agreement"], withdrawn))
        if withdrawn:
            rollbacks[stream].append(len(event["tokens"]))
    return DecodeRun(
        name=name,
        plan_vocab_size=trace["model"]["plan_vocab_size"],
        plan_hash_buckets=trace["model"]["plan_vocab_size"],
        plan_hash_salt=trace["model"]["plan_hash_salt"],
        sections={stream: manifest["sections"][p][s] for (p, s), stream in streams.items()},
        merged=list(manifest["merged"]),
        committed={stream: len(result["token_ids"]) for stream, result in results.items()},
        seconds={key.removesuffix("_s"): value for key, value in trace["timings"].items()},
        rounds_s=rounds_s,
        judged=judged,
        rollbacks=rollbacks,
        forced=sum(event.get("forced", False) for event in blocks),
        waits=sum(event["kind"] == "stall" for event in blocks),
        gates=gates,
        margins=[record["margin"] for record in trace.get("tokens", []) if record["margin"] is not None],
        coverage={
            stream: [
                (items[place[0]][int(item)]["text"], probability)
                for item, probability in results[stream]["coverage"].items()
                if int(item) < len(items[place[0]])
            ]
            for place, stream in streams.items()
        },
        reference_notes=_named_notes(manifest.get("reference_notes") or {}, list(streams.values())),
        layers=trace["model"]["instrumented_layers"],
        calls=trace["calls"],
        prompts=list(manifest["prompts"]),
    )


def _named_notes(notes: Mapping[str, Any], streams: list[str]) -> dict[str, list[str]]:
    """Reference notes by full stream name; `stream_1` alone means prompt 0."""
    named = {name if "/" in name else f"0/{name}": value for name, value in notes.items()}
    unknown = sorted(named.keys() - set(streams))
    if unknown:
        raise ValueError(f"reference_notes name {unknown}, the run has {streams}.")
    return {
        name: [text if isinstance(text, str) else json.dumps(text) for text in texts] for name, texts in named.items()
    }


def _read_original(name: str, manifest: Mapping[str, Any]) -> DecodeRun:
    """The original's fields: `timings`, `streams`, `rollbacks`, `gate_trace`, `events`, all by stream name."""
    timings, streams = manifest["timings"], manifest["streams"]
    rollbacks: dict[str, list[int]] = {f"0/{stream}": [] for stream in streams}
    gates: dict[str, list[float]] = {}
    for event in manifest["rollbacks"]:
        rollbacks[f"0/{event['stream']}"].append(len(event["tokens_removed"]))
    for entry in manifest.get("gate_trace", []):
        gates.setdefault(f"0/{entry['stream']}", []).append(entry["value"])
    judged = [
        (f"0/{step['stream']}", step.get("agreement"), bool(step.get("rollback_performed")))
        for step in manifest.get("events", [])
        if step.get("notes_emitted")
    ]
    margins = [record.get("top2_margin") for record in timings.get("per_token", [])]
    merged = manifest.get("merged_answer") or "\n\n".join(stream["text"] for stream in streams.values())
    return DecodeRun(
        name=name,
        plan_vocab_size=manifest["plan_vocab_size"],
        plan_hash_buckets=manifest["plan_hash_buckets"],
        plan_hash_salt=manifest["plan_hash_salt"],
        sections={f"0/{stream}": content["text"] for stream, content in streams.items()},
        merged=[merged],
        committed={f"0/{stream}": len(content["token_ids"]) for stream, content in streams.items()},
        seconds={
            "total": timings["total"],
            "prefill": timings.get("bootstrap", 0.0),
            "exchange": timings.get("sync_overhead_s", 0.0),
        },
        rounds_s=list(timings.get("stride_durations", [])),
        judged=judged,
        rollbacks=rollbacks,
        gates=gates,
        margins=[margin for margin in margins if margin is not None],
        coverage={
            f"0/{stream}": [
                (str(item.get("text") or item.get("plan_item_id") or item["index"]), item["probability"])
                for item in (content.get("coverage") or {}).get("plan_items", [])
            ]
            for stream, content in streams.items()
        },
        reference_notes=_named_notes(manifest.get("reference_notes") or {}, [f"0/{stream}" for stream in streams]),
        layers=list(manifest["instrumented_layers"]),
        calls=manifest["steps"],
        original=True,
    )


def check_comparable(runs: Sequence[DecodeRun]) -> None:
    """
    Runs may be compared when their plan items fall into the same buckets.

    Raises:
        ValueError: Naming the two runs and the field in which they differ.
    """
    for run in runs[1:]:
        for name in ("plan_vocab_size", "plan_hash_buckets", "plan_hash_salt"):
            first, other = getattr(runs[0], name), getattr(run, name)
            if first != other:
                raise ValueError(
                    f"{run.name} cannot be compared with {runs[0].name}: {name} is {other!r}, not {first!r}."
                )


def paired_answers(run: DecodeRun, baseline: DecodeRun) -> list[tuple[str, str, str]]:
    """
    Prompt, answer of a run and answer of a baseline.

    Raises:
        ValueError: When the prompts are not known, or not the same.
    """
    if not run.prompts or run.prompts != baseline.prompts:
        raise ValueError(f"{run.name} and {baseline.name} must hold the same prompts to have their answers compared.")
    return list(zip(run.prompts, run.merged, baseline.merged, strict=True))
