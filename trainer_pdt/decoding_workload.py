"""What the decoding benchmark runs: a trunk, PDT on it, and single decodes that watch the clock.

Letters: B prompts, T tokens, M rows at a block boundary.
"""

import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    set_seed,
)

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.callbacks import ParallelDecodingCallback
from modeling_pdt.interventions import Intervention

SHAPES = {
    "gpt-oss-20b-random": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
    }
}
"""Trunks of random weights by name; the fields that differ from the defaults of their `model_type`."""

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
"""Every decode draws from the whole distribution and never ends early: rows differ, as they do in use."""

BUS_OFF = {"logit_blend": 0.0, "agreement_threshold": None}
THRESHOLD = 0.5
FIRST_TOKEN_ID = 2


@dataclass(frozen=True)
class Decode:
    """
    One decode as it was measured.

    Args:
        first_s (`float`): Seconds to the first token: preparation and prefill.
        step_s (`float`): Mean seconds from token to token after it, boundary work between them included.
        total_s (`float`): Seconds of the whole call.
        held_bytes (`dict[str, int]`): What the rows hold at the end, by kind.
        calls (`int`): Trunk calls after the prefill.
        retries (`int`): Blocks that were withdrawn.
        output (`Any`): What the call returned.
    """

    first_s: float
    step_s: float
    total_s: float
    held_bytes: dict[str, int]
    calls: int
    retries: int
    output: Any


class Clock:
    """Times of the tokens of a decode, after the device has finished them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []
        self.tick()

    def tick(self) -> None:
        """Notes the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def read(self) -> dict[str, float]:
        """The times of a [`Decode`] of two tokens or more; the last tick is the end of the call."""
        start, first, *_, last, end = self.times
        steps = len(self.times) - 3
        return {"first_s": first - start, "step_s": (last - first) / steps, "total_s": end - start}


class TickingCriterion(StoppingCriteria):
    """Ticks at every token of `transformers.generate` and stops nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One token of every row is chosen; no row is to stop."""
        self.clock.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TickingCallback(ParallelDecodingCallback):
    """Ticks at every token of a parallel decode; measures at the end what its rows hold, see [`Decode`]."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.held_bytes = clock, {}

    def on_token(self, decoder: Any, rows_M: torch.Tensor, tokens_M: torch.Tensor, scores_MV: torch.Tensor) -> None:
        """One trunk call is done."""
        self.clock.tick()

    def on_end(self, decoder: Any) -> None:
        """Measures."""
        streams, states = decoder.streams, decoder.note_states
        window = () if states is None else (*states.keys, *states.values, *states.biases)
        self.held_bytes = {
            "cache": storage_bytes(part for layer in streams.cache.layers for part in (layer._keys, layer._values)),
            "taps": storage_bytes(streams.kept_states),
            "bus": storage_bytes([decoder.bus.notes_BSVKN]),
            "window": storage_bytes(window),
        }


class ForcedRetries(Intervention):
    """Exactly the named blocks are withdrawn, once each; the agreement is computed all the same."""

    name = "forced_retries"

    def __init__(self, blocks: Collection[tuple[int, int]]) -> None:
        self.blocks = frozenset(blocks)

    def agreement(
        self, agreement_M: torch.Tensor, rows_M: torch.Tensor, round_M: torch.Tensor, attempt_M: torch.Tensor
    ) -> torch.Tensor:
        """0 for the first attempt at a named (row, round), 1 for all others."""
        places = zip(rows_M.tolist(), round_M.tolist(), attempt_M.tolist(), strict=True)
        stands = [attempt > 0 or (row, round_number) not in self.blocks for row, round_number, attempt in places]
        return torch.tensor(stands, device=agreement_M.device).to(agreement_M)


def storage_bytes(tensors: Any) -> int:
    """Bytes that tensors keep allocated."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def forced_blocks(rows: int, rounds: int, rate: float, seed: int) -> list[tuple[int, int]]:
    """A share of the blocks (row, round) of a decode, at least one, drawn without replacement."""
    blocks = [(row, round_number) for row in range(rows) for round_number in range(rounds)]
    return random.Random(seed).sample(blocks, max(1, round(rate * len(blocks))))


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def random_trunk(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """
    A trunk of random weights, made on the device itself.

    Args:
        shape (`Mapping`): Fields of its configuration, with `model_type`.
        dtype (`torch.dtype`), device (`torch.device`): Of its weights.

    Raises:
        ValueError: When the device has not the memory for its weights.
    """
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config, dtype=dtype).num_parameters()
    needed, free = parameters * dtype.itemsize, available_bytes(device)
    if needed > free:
        raise ValueError(
            f"trunk: {needed / 2**30:.1f} GiB of weights do not fit device {device}, "
            f"allowed: at most the {free / 2**30:.1f} GiB that are free."
        )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class DecodingWorkload:
    """
    A trunk and PDT on it, and the decodes that are compared.

    Args:
        arguments (`DecodingBenchmarkArguments`): The recipe.
        trunk (`str`): A name of `arguments.shapes` or [`SHAPES`], or else the folder or Hub id of a trained trunk.
    """

    def __init__(self, arguments: Any, trunk: str) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        dtype, shapes = getattr(torch, arguments.dtype), {**SHAPES, **arguments.shapes}
        set_seed(arguments.benchmark_seed)
        if trunk in shapes:
            made = random_trunk(shapes[trunk], dtype, self.device)
        else:
            made = AutoModelForCausalLM.from_pretrained(trunk, dtype=dtype).to(self.device)
        # What a GenerationConfig leaves open, `transformers.generate` takes from the trunk's own.
        made.generation_config.eos_token_id = None
        self.parameters, self.config = made.num_parameters(), made.config
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        self.model = PDTForParallelDecoding.from_trunk(
            made.eval(), trained_parts=["agreement"], block_size=arguments.block_size
        ).eval()
        self.vocabulary = min(made.config.vocab_size, len(self.tokenizer))

    def prompts(self, count: int, length: int, seed: int) -> torch.Tensor:
        """Prompts `[count, length]` of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(FIRST_TOKEN_ID, self.vocabulary, (count, length), generator=generator)
        return ids.to(self.device)

    @torch.no_grad()
    def batched(self, ids_BT: torch.Tensor, streams: int, tokens: int) -> Decode:
        """`transformers.generate` of the bare trunk: `streams` rows per prompt, which is prefilled once."""
        trunk, clock = self.model.trunk, Clock(self.device)
        cache, rows = DynamicCache(config=trunk.config), ids_BT.repeat_interleave(streams, dim=0)
        with self.model.disable_adapter():
            trunk(input_ids=ids_BT[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(streams)
            output = trunk.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                past_key_values=cache,
                stopping_criteria=[TickingCriterion(clock)],
                generation_config=GenerationConfig(max_new_tokens=tokens, **SAMPLING),
            )
        clock.tick()
        held = {"cache": storage_bytes(part for layer in cache.layers for part in (layer.keys, layer.values))}
        return Decode(**clock.read(), held_bytes=held, calls=tokens, retries=0, output=output)

    def bus_off(self, ids_BT: torch.Tensor, streams: int, tokens: int) -> Decode:
        """The loop of parallel decoding with nothing conditioned and no gate."""
        return self._parallel(ids_BT, streams, tokens, **BUS_OFF)

    def full(
        self, ids_BT: torch.Tensor, streams: int, tokens: int, retries: Collection[tuple[int, int]] = ()
    ) -> Decode:
        """Parallel decoding with plan, notes, SNC, stream adapters, coverage and gate, and forced retries."""
        items = [{"text": f"item {item} of part {item % streams}", "stream": item % streams} for item in range(6)]
        return self._parallel(
            ids_BT,
            streams,
            tokens,
            tokenizer=self.tokenizer,
            plan_texts=items,
            agreement_threshold=THRESHOLD,
            interventions=[ForcedRetries(retries)],
        )

    def _parallel(self, ids_BT: torch.Tensor, streams: int, tokens: int, **choices: Any) -> Decode:
        clock = Clock(self.device)
        callback = TickingCallback(clock)
        output = self.model.generate(
            ids_BT,
            num_streams=streams,
            max_new_tokens=tokens,
            callbacks=[callback],
            return_dict_in_generate=True,
            **SAMPLING,
            **choices,
        )
        clock.tick()
        return Decode(
            **clock.read(),
            held_bytes=callback.held_bytes,
            calls=output.trace.calls,
            retries=len(output.trace.of_kind("rollback")),
            output=output,
        )

    def fed_tokens(self, decode: Callable[[], Decode]) -> dict[str, int]:
        """Tokens that went through the lowest and the highest layer in a decode, prefill included."""
        counts, layers = {"lower": 0, "upper": 0}, self.model.stack.base_layer.layers

        def count(half: str) -> Any:
            def hook(layer: nn.Module, inputs: tuple, hidden: torch.Tensor) -> None:
                counts[half] += hidden.shape[:2].numel()

            return hook

        handles = [layers[place].register_forward_hook(count(half)) for place, half in ((0, "lower"), (-1, "upper"))]
        try:
            decode()
        finally:
            for handle in handles:
                handle.remove()
        return counts
