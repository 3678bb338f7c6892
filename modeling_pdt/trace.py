"""DecodingTrace: what happened in a decoding call, and the plain values that a manifest is made of."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .plan import PlanEntry, plan_bucket

TRACE_SCHEMA_VERSION = "1.2"
# Measurements of a run: they differ when the same decisions are made again.
MEASURED = ("timings", "memory", "readings", "time_s")


@dataclass
class DecodingTrace:
    """
    What happened in a decoding call, in order.

    Args:
        settings (`dict`): Choices of the call, after defaults.
        model (`dict`): What decoded, see [`describe_model`].
        events (`list[dict]`): One dictionary per event. `kind` is `"plan"` (per prompt: items, tokens of the headers),
            `"commit"` (a block stands and its note is published), `"rollback"` (a block and its note are withdrawn)
            or `"stall"` (a block waits, its note is withdrawn); the last three say prompt, stream, round, attempt,
            token range, tokens, agreement, coverage, trunk call and seconds since the start.
        streams (`list[list[dict]]`): Per prompt and stream the fields of [`StreamResult`].
        timings (`dict[str, float]`): Seconds by part of the call.
        memory (`dict[str, int | None]`): Most bytes held at once, where [`MemoryRecorder`] was among the callbacks.
        calls (`int`): Trunk calls after the prefill.
        tokens (`list[dict]`): A record per token, where [`TokenRecorder`] was among the callbacks.
        readings (`list[dict]`): A record per block, where [`ReadingRecorder`] was among the callbacks.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    streams: list[list[dict[str, Any]]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    calls: int = 0
    tokens: list[dict[str, Any]] = field(default_factory=list)
    readings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Appends one event and returns it."""
        self.events.append({"kind": kind, **values})
        return self.events[-1]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order."""
        return [event for event in self.events if event["kind"] == kind]

    def to_manifest(self) -> dict[str, Any]:
        """The trace as plain JSON values, with its schema version; without what only recorders fill, if none did."""
        recorded = ("tokens", "memory", "readings")
        values = {name: value for name, value in asdict(self).items() if value or name not in recorded}
        return {"schema_version": TRACE_SCHEMA_VERSION, **_plain(values)}


def _plain(value: Any) -> Any:
    """Tuples as lists and keys as text, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def plan_items(entries: list[PlanEntry], model_config: Any) -> list[dict[str, Any]]:
    """Plan items of one prompt as the trace holds them: text, owner, and the planner's bucket of an owned item."""
    salt, buckets = model_config.plan_hash_salt, model_config.plan_vocab_size
    return [
        {
            "text": entry.text,
            "stream": entry.stream,
            "bucket": None if entry.stream is None else plan_bucket(entry.text, entry.stream, salt, buckets),
        }
        for entry in entries
    ]


def describe_model(model: Any) -> dict[str, Any]:
    """
    What decodes: the trunk's name, the block protocol's plan vocabulary, and the layers that are really conditioned.

    The layers are those of the adapter modules that the trunk runs, not of a configuration: none for a disabled one.

    Args:
        model (`PDTForParallelDecoding`): The model.
    """
    stack, config = model.stack, model.config
    installed = any(module is stack for module in model.trunk.modules()) and not stack.disable_adapters
    layers = []
    if installed:
        placed, adapters = stack.pdt_configs[stack.active], stack.pdt_stream_adapters[stack.active]
        layers = [layer for layer, _ in zip(placed.instrumented_layers, adapters, strict=True)]
    weight = next(model.trunk.parameters())
    return {
        "trunk": config.trunk_name_or_path,
        "trunk_revision": config.trunk_revision,
        "trunk_class": type(model.trunk).__name__,
        "adapter": stack.active if installed else None,
        "instrumented_layers": layers,
        "snc_placement": config.snc_placement,
        "writer_tap": config.writer_tap,
        "trained_parts": list(config.trained_parts),
        "notes_dim": config.notes_dim,
        "notes_per_block": config.notes_per_block,
        "plan_vocab_size": config.plan_vocab_size,
        "plan_hash_salt": config.plan_hash_salt,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }
