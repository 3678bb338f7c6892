"""Cost of parallel decoding: step, speed, growth, retry and memory against the same trunk without it."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from modeling_pdt.memory import cache_memory

from .arguments import check_whole
from .decoding_workload import SHAPES, Decode, DecodingWorkload, forced_blocks
from .evaluation.benchmark import in_turn, ratio_summary
from .telemetry import command_line, package_versions

BASELINE = "shared_prefill"
"""Side that steps are compared with: `transformers.generate` on as many rows, their prompts prefilled once."""

STEP_BARS = {"bus_off": 1.03, "full": 1.15}
SPEED_BARS = {256: 1.4, 1024: 1.15}
RETRY_BAR = 2
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
MEMORY_BAR = 0.05


@dataclass
class DecodingBenchmarkArguments:
    """
    What decoding is measured on. Time does not depend on what the weights say.

    Args:
        trunk (`str`): The trunk that the bars are about: a name of `shapes`, `"gpt-oss-20b-random"`, or the folder or
            Hub id of a trained one.
        shapes (`dict[str, dict]`, *optional*): Trunks of random weights: name and fields of the configuration, with
            `model_type`.
        beside (`list[str]`, *optional*): Further trunks that are reported beside it.
        tokenizer (`str`, *optional*, defaults to `"recipes/tiny/trunk"`): Folder or Hub id; splits the plan items.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the trunks; PDT's own parameters are float32.
        device (`str`, *optional*, defaults to `"cpu"`): `"cpu"` or `"cuda"`.
        streams (`int`, *optional*, defaults to 3): Streams of steps, speed and memory.
        block_size (`int`, *optional*, defaults to 12): Tokens per block.
        prefixes (`list[int]`, *optional*, defaults to `[256, 1024]`): Tokens of the prompt; steps are measured at the
            first, speed at every one.
        step_blocks (`int`, *optional*, defaults to 4), speed_blocks (`int`, *optional*, defaults to 7): Blocks per
            stream of the two measures.
        retry_rate (`float`, *optional*, defaults to 0.05): Share of the blocks that are withdrawn when speed is
            measured, at least one.
        growth_streams (`list[int]`), growth_prompts (`list[int]`): Sizes of the growth table.
        rounds (`int`, *optional*, defaults to 20): Measured rounds; in each, every side decodes once.
        growth_rounds (`int`, *optional*, defaults to 3): Measured rounds of the growth table.
        warmup (`int`, *optional*, defaults to 1): Rounds before them.
        threads (`int`, *optional*, defaults to 1): CPU threads.
        benchmark_seed (`int`, *optional*, defaults to 0): Of weights, prompts and withdrawn blocks.
        output (`str`, *optional*, defaults to `"build/benchmarks/decoding.json"`): File that is written.
    """

    trunk: str = field(metadata={"help": "Name of a shape, gpt-oss-20b-random, or a trained trunk."})
    shapes: dict[str, Any] = field(default_factory=dict, metadata={"help": "Random trunks by name."})
    beside: list[str] = field(default_factory=list, metadata={"help": "Further trunks, without bars."})
    tokenizer: str = field(default="recipes/tiny/trunk", metadata={"help": "Folder or Hub id of a tokenizer."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of the trunks."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "cpu or cuda."})
    streams: int = field(default=3, metadata={"help": "Streams of steps, speed and memory."})
    block_size: int = field(default=12, metadata={"help": "Tokens per block."})
    prefixes: list[int] = field(default_factory=lambda: [256, 1024], metadata={"help": "Tokens of the prompt."})
    step_blocks: int = field(default=4, metadata={"help": "Blocks per stream, steps."})
    speed_blocks: int = field(default=7, metadata={"help": "Blocks per stream, speed."})
    retry_rate: float = field(default=0.05, metadata={"help": "Share of blocks withdrawn, speed."})
    growth_streams: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Streams, growth."})
    growth_prompts: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "Prompts, growth."})
    rounds: int = field(default=20, metadata={"help": "Measured rounds."})
    growth_rounds: int = field(default=3, metadata={"help": "Measured rounds of the growth table."})
    warmup: int = field(default=1, metadata={"help": "Rounds before them."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    benchmark_seed: int = field(default=0, metadata={"help": "Of weights, prompts and withdrawn blocks."})
    output: str = field(default="build/benchmarks/decoding.json", metadata={"help": "File that is written."})

    def __post_init__(self) -> None:
        at_least_one = ("streams", "block_size", "step_blocks", "growth_rounds", "threads")
        for name, low in {**dict.fromkeys(at_least_one, 1), "speed_blocks": 2, "rounds": 2, "warmup": 0}.items():
            check_whole(name, getattr(self, name), low)
        for name, low in {"prefixes": 2, "growth_streams": 1, "growth_prompts": 1}.items():
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name}={values}, allowed: at least one number.")
            for value in values:
                check_whole(name, value, low)
        if not 0 <= self.retry_rate <= 1:
            raise ValueError(f"retry_rate={self.retry_rate}, allowed: 0 to 1.")
        for name, shape in self.shapes.items():
            if name in SHAPES or not isinstance(shape, dict) or "model_type" not in shape:
                raise ValueError(f"shapes: {name!r} is {shape}, allowed: new names of mappings with model_type.")


def step_costs(workload: DecodingWorkload) -> dict[str, Any]:
    """Seconds to the first token and from token to token of every side, and their ratios to the baseline's."""
    arguments = workload.arguments
    tokens = 1 + arguments.step_blocks * arguments.block_size

    def decode(run: Callable[..., Decode], index: int) -> Decode:
        prompts = workload.prompts(1, arguments.prefixes[0], arguments.benchmark_seed + index)
        return run(prompts, arguments.streams, tokens)

    calls = {BASELINE: workload.batched, "bus_off": workload.bus_off, "full": workload.full}
    found = in_turn({name: partial(decode, run) for name, run in calls.items()}, arguments.rounds, arguments.warmup)
    return {
        name: {
            "first_s": statistics.median(decode.first_s for decode in decodes),
            "step_s": statistics.median(decode.step_s for decode in decodes),
            "first_ratio": paired(decodes, found[BASELINE], "first_s"),
            "step_ratio": paired(decodes, found[BASELINE], "step_s"),
            "held_bytes": sum(decodes[-1].held_bytes.values()),
        }
        for name, decodes in found.items()
    }


def paired(decodes: Sequence[Decode], others: Sequence[Decode], field_name: str) -> dict[str, float]:
    """[`ratio_summary`] of one time of decodes that were made in the same rounds."""
    pairs = zip(decodes, others, strict=True)
    return ratio_summary([(getattr(mine, field_name), getattr(other, field_name)) for mine, other in pairs])


def speed(workload: DecodingWorkload, prefix: int) -> dict[str, Any]:
    """
    How much faster streams write than one stream that writes as many tokens, prefill included: the streams with plan,
    notes, gate and withdrawn blocks; the one by `transformers.generate` of the bare trunk, and by the loop of the
    streams, which has their attention.
    """
    arguments = workload.arguments
    streams, tokens = arguments.streams, arguments.speed_blocks * arguments.block_size

    def parallel(index: int) -> Decode:
        seed = arguments.benchmark_seed + index
        blocks = forced_blocks(streams, arguments.speed_blocks, arguments.retry_rate, seed)
        return workload.full(workload.prompts(1, prefix, seed), streams, tokens, blocks)

    def one(run: Callable[..., Decode], index: int) -> Decode:
        return run(workload.prompts(1, prefix, arguments.benchmark_seed + index), 1, streams * tokens)

    calls = {"parallel": parallel, "single": partial(one, workload.batched), "loop": partial(one, workload.bus_off)}
    found = in_turn(calls, arguments.rounds, arguments.warmup)
    return {
        "prefix": prefix,
        "tokens": streams * tokens,
        "speedup": paired(found["single"], found["parallel"], "total_s"),
        "loop_speedup": paired(found["loop"], found["parallel"], "total_s"),
        **{f"{side}_s": statistics.median(decode.total_s for decode in decodes) for side, decodes in found.items()},
        "calls": statistics.mean(decode.calls for decode in found["parallel"]),
        "retries": statistics.mean(decode.retries for decode in found["parallel"]),
    }


def growth(workload: DecodingWorkload) -> list[dict[str, Any]]:
    """Seconds per step of every number of prompts and streams, and how they grow beside the number of rows."""
    arguments = workload.arguments
    tokens = 1 + arguments.block_size
    sizes = [(prompts, streams) for prompts in arguments.growth_prompts for streams in arguments.growth_streams]

    def decode(prompts: int, streams: int, index: int) -> Decode:
        ids = workload.prompts(prompts, arguments.prefixes[0], arguments.benchmark_seed + index)
        return workload.full(ids, streams, tokens)

    calls = {size: partial(decode, *size) for size in sizes}
    found = in_turn(calls, arguments.growth_rounds, arguments.warmup)
    seconds = {size: statistics.median(one.step_s for one in decodes) for size, decodes in found.items()}
    smallest = min(sizes)
    return [
        {
            "prompts": prompts,
            "streams": streams,
            "step_s": value,
            "growth": value / seconds[smallest],
            "rows_growth": prompts * streams / (smallest[0] * smallest[1]),
        }
        for (prompts, streams), value in seconds.items()
    ]


def retry_cost(workload: DecodingWorkload) -> dict[str, int]:
    """
    What one withdrawn block adds to a decode: trunk calls, and tokens through the lowest and the highest layer.

    Counted on one stream: siblings that end earlier would be counted too.
    """
    arguments = workload.arguments
    ids = workload.prompts(1, arguments.prefixes[0], arguments.benchmark_seed)
    made: list[Decode] = []

    def fed(retries: Sequence[tuple[int, int]]) -> dict[str, int]:
        def decode() -> None:
            made.append(workload.full(ids, 1, 2 * arguments.block_size, retries))

        return workload.fed_tokens(decode)

    plain, retried = fed([]), fed([(0, 0)])
    return {
        "block": arguments.block_size,
        "retries": made[1].retries,
        "calls": made[1].calls - made[0].calls,
        **{half: retried[half] - plain[half] for half in plain},
    }


def stream_memory(workload: DecodingWorkload) -> dict[str, Any]:
    """Bytes per stream by the formulas of `modeling_pdt.memory`, and as a decode held them at its end."""
    arguments, model = workload.arguments, workload.model
    tokens, prefix = arguments.speed_blocks * arguments.block_size, arguments.prefixes[0]
    decode = workload.full(workload.prompts(1, prefix, arguments.benchmark_seed), arguments.streams, tokens)
    held = {kind: count / arguments.streams for kind, count in decode.held_bytes.items()}
    weight = model.trunk.get_input_embeddings().weight.element_size()
    # Fed after the prefill: the last token of the prompt and the section.
    predicted = {
        "cache": cache_memory(model.trunk.config, prefix, 1 + tokens, arguments.block_size, weight),
        "taps": (tokens + 1) * model.config.trunk_hidden_size * torch.float32.itemsize,
        **decode.output.trace.model["notes_memory"],
    }
    return {
        "predicted": predicted,
        "held": held,
        "ratio": (predicted["cache"] + predicted["bus"] + predicted["window"])
        / (held["cache"] + held["bus"] + held["window"]),
    }


def measure_trunk(arguments: DecodingBenchmarkArguments, trunk: str) -> dict[str, Any]:
    """Every measure on one trunk."""
    workload = DecodingWorkload(arguments, trunk)
    report = {
        "parameters": workload.parameters,
        "config": {name: getattr(workload.config, name) for name in SIZES},
        "instrumented_layers": list(workload.model.config.instrumented_layers),
        "steps": step_costs(workload),
        "speed": [speed(workload, prefix) for prefix in arguments.prefixes],
        "growth": growth(workload),
        "retry": retry_cost(workload),
        "memory": stream_memory(workload),
    }
    if workload.device.type == "cuda":
        report["peak_device_bytes"] = torch.cuda.max_memory_allocated(workload.device)
        torch.cuda.reset_peak_memory_stats(workload.device)
    return report


def bars(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is asked of decoding, and whether the measures of a trunk meet it."""
    retry, steps = measured["retry"], measured["steps"]
    found = [(f"step, {side}", steps[side]["step_ratio"]["mean"], "at most", bar) for side, bar in STEP_BARS.items()]
    for one in measured["speed"]:
        if one["prefix"] in SPEED_BARS:
            bar = SPEED_BARS[one["prefix"]]
            found.append((f"speed, prefix {one['prefix']}", one["speedup"]["mean"], "at least", bar))
    # The first is what the others are compared with.
    grown = [one["growth"] / one["rows_growth"] for one in measured["growth"] if one["rows_growth"] != 1]
    if grown:
        found.append(("growth over rows", max(grown), "at most", 1.0))
    found += [
        ("retry, calls beyond its block", retry["calls"] - retry["block"], "at most", RETRY_BAR),
        ("retry, tokens fed again", max(retry["lower"], retry["upper"]), "at most", retry["block"] + 1),
        ("memory, distance from formula", abs(measured["memory"]["ratio"] - 1), "at most", MEMORY_BAR),
    ]
    return [
        {
            "name": name,
            "value": value,
            "limit": limit,
            "bar": bar,
            "met": value >= bar if limit == "at least" else value <= bar,
        }
        for name, value, limit, bar in found
    ]


def benchmark_decoding(arguments: DecodingBenchmarkArguments) -> dict[str, Any]:
    """Times, memory and bars of decoding; see [`DecodingBenchmarkArguments`]."""
    torch.set_num_threads(arguments.threads)
    trunks = {trunk: measure_trunk(arguments, trunk) for trunk in dict.fromkeys([arguments.trunk, *arguments.beside])}
    return {
        "command": command_line(),
        "settings": {
            **{name: value for name, value in vars(arguments).items() if name not in ("shapes", "output")},
            "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "cpu_count": os.cpu_count(),
        },
        "versions": package_versions(),
        "trunks": trunks,
        "bars": bars(trunks[arguments.trunk]),
    }


def span(summary: Mapping[str, float]) -> str:
    """A median with its quartiles."""
    return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f}, n={summary['n']})"


def trunk_tables(name: str, measured: Mapping[str, Any]) -> list[str]:
    """The measures of one trunk for people."""
    sizes = ", ".join(f"{key} {value}" for key, value in measured["config"].items())
    lines = [f"## {name}", "", f"{measured['parameters'] / 1e6:.1f} million parameters; {sizes}.", ""]
    lines += [
        "| side | to the first token, ms | ratio | per step, ms | ratio | held, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for side, one in measured["steps"].items():
        lines.append(
            f"| {side} | {one['first_s'] * 1e3:.1f} | {span(one['first_ratio'])} | {one['step_s'] * 1e3:.2f} "
            f"| {span(one['step_ratio'])} | {one['held_bytes'] / 2**20:.2f} |"
        )
    lines += [
        "",
        "| prefix | tokens | streams, s | one stream, s | times faster | by their loop, s | times faster | calls "
        "| withdrawn blocks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measured["speed"]:
        lines.append(
            f"| {one['prefix']} | {one['tokens']} | {one['parallel_s']:.2f} | {one['single_s']:.2f} "
            f"| {span(one['speedup'])} | {one['loop_s']:.2f} | {span(one['loop_speedup'])} | {one['calls']:.1f} "
            f"| {one['retries']:.1f} |"
        )
    lines += ["", "| prompts | streams | per step, ms | times the first | times its rows |", "|---|---|---|---|---|"]
    for one in measured["growth"]:
        lines.append(
            f"| {one['prompts']} | {one['streams']} | {one['step_s'] * 1e3:.2f} | {one['growth']:.2f} "
            f"| {one['rows_growth']:.0f} |"
        )
    retry, memory = measured["retry"], measured["memory"]
    lines += [
        "",
        f"One withdrawn block of {retry['block']} tokens: {retry['calls']} trunk calls more, {retry['lower']} tokens "
        f"more through the lowest layer, {retry['upper']} more through the highest.",
        "",
        "| bytes per stream | formula | held |",
        "|---|---|---|",
    ]
    lines += [f"| {kind} | {memory['predicted'][kind]:.0f} | {held:.0f} |" for kind, held in memory["held"].items()]
    return [*lines, ""]


def decoding_table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = ["# Cost of decoding", "", f"`python {report['command']}`", ""]
    lines += [
        "Medians of interleaved rounds, in brackets quartiles; ratios are of decodes of the same round. "
        "`shared_prefill`: `transformers.generate` of the bare trunk on as many rows, their prompt prefilled once. "
        "`bus_off`: the loop of parallel decoding, nothing conditioned. `full`: plan, notes, SNC, stream adapters, "
        "coverage and gate.",
        "",
        "| bar | value | | |",
        "|---|---|---|---|",
    ]
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "missed"
        lines.append(f"| {bar['name']} | {bar['value']:.3f} | {bar['limit']} {bar['bar']:.2f} | {verdict} |")
    lines.append("")
    for name, measured in report["trunks"].items():
        lines += trunk_tables(name, measured)
    lines += ["Settings:", "", *(f"- {name}: {value}" for name, value in report["settings"].items())]
    return "\n".join(lines) + "\n"
