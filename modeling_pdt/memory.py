"""What a stream costs in memory, from the numbers of a call alone."""

from typing import Any

from .bus import NotesBus
from .cache import GROWTH
from .generation_settings import Settings
from .retention import retained_places
from .trunk_split import layer_types

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


def cache_memory(
    trunk_config: Any, prompt_tokens: int, new_tokens: int, commit_horizon: int, bytes_per_number: int = 4
) -> int:
    """
    Bytes of keys and values that one stream holds at the end, spare places of the buffers included: per layer
    `2 * key_value_heads * head_dim` numbers for each of its slots.

    A buffer starts with the prefill, `prompt_tokens - 1`, and 64 spare slots. Every 65 further tokens it is made anew,
    g times in all: by then a full layer has `prompt_tokens - 1 + 64 + 65 * g` slots. A sliding layer takes over at
    most the `window - 1 + commit_horizon + 1` tokens that it still needs, and has 65 slots more than these.

    Args:
        trunk_config (`PreTrainedConfig`): Of the trunk.
        prompt_tokens (`int`): Tokens of the prompt.
        new_tokens (`int`): Tokens fed after the prefill: the last one of the prompt, header and section.
        commit_horizon (`int`): Longest block.
        bytes_per_number (`int`, *optional*, defaults to 4): Of the trunk's dtype.
    """
    config = trunk_config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    start, turn = prompt_tokens - 1 + GROWTH, GROWTH + 1
    growths = -(-max(0, new_tokens - GROWTH) // turn)
    slots = dict.fromkeys(set(layer_types(config)), start + turn * growths)
    if growths and "sliding_attention" in slots:
        kept = config.sliding_window - 1 + commit_horizon + 1
        slots["sliding_attention"] = min(start + turn * (growths - 1), kept) + turn
    return sum(2 * heads * width * slots[kind] * bytes_per_number for kind in layer_types(config))
