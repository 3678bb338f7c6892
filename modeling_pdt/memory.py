"""What notes cost in memory, from the numbers of a call alone."""

from typing import Any

from .bus import NotesBus
from .generation_settings import Settings
from .retention import retained_places

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def notes_memory(
    config: Any, settings: Settings, interval: int, plan_places: int = 0, bytes_per_weight: int = 4
) -> dict[str, int]:
    """
    Bytes that one stream needs for notes when it writes `max_new_tokens` in blocks of `interval`.

    - `"bus"`: its published notes, `rounds * K * N` numbers of `bus_dtype`; rounds are stored 8 at a time.
    - `"window"`: keys and values of what it reads, `sites * 2 * (W + 1) * D` numbers of the adapter's dtype, and one
      bias per site, head and place. `W = plan_places + S * K * (min(recent, rounds - bus_lag) + scored + merged)`,
      see [`retained_places`]; with `"fifo"` only `recent = bus_capacity` is not 0.

    Args:
        config (`PDTConfig`): Of the model.
        settings (`Settings`): Of the call.
        interval (`int`): Tokens per block of the stream that writes the most blocks.
        plan_places (`int`, *optional*, defaults to 0): Places of snapshot 0.
        bytes_per_weight (`int`, *optional*, defaults to 4): Of the adapter's parameters.
    """
    rounds = -(-settings.max_new_tokens // interval)
    stored = -(-rounds // NotesBus.GROWTH) * NotesBus.GROWTH
    # The last round is published, but nobody writes after it.
    recent, scored, merged = retained_places(settings.retention, settings.bus_capacity)
    readable = max(0, min(recent, rounds - settings.bus_lag)) + min(scored, stored) + merged
    places = plan_places + settings.num_streams * readable * config.notes_per_block
    sites = len(config.instrumented_layers) + (config.snc_placement == "between")
    width, heads = config.trunk_hidden_size, config._adapter_config.snc_heads
    return {
        "bus": stored * config.notes_per_block * config.notes_dim * BYTES[settings.bus_dtype],
        "window": sites * (2 * width + heads) * (places + 1) * bytes_per_weight,
    }
