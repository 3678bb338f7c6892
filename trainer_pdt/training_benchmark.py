"""Cost of a training step: two branches with notes against plain adapters on the same rows and layers."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel, patch_environment, send_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from modeling_pdt import PDTAdapterConfig, PDTConfig, PDTForParallelDecoding
from modeling_pdt.snc import StreamAdapter

from .arguments import DataArguments, PDTTrainingArguments, check_whole
from .callbacks import settle_gradients
from .collator import PDTDataCollator
from .curriculum import Curriculum
from .evaluation.benchmark import in_turn, ratio_summary, timed
from .features import FeatureMaker, load_features
from .losses import supervised_positions, supervised_values
from .telemetry import command_line, package_versions
from .trainer import PDTTrainer

BASELINE = "adapters"
"""Side that all others are compared with: bottleneck adapters, the cheapest of the usual kinds."""

PLAIN_SIDES = (BASELINE, "lora")
LEARNING = ["snc", "stream_adapters", "writer", "encoder"]
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
LORA_RANK = 16

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of glibc under which the peak of a process is that of its tensors; else pieces of freed memory that fit
nothing come on top, by other tens of MiB in every run."""


@dataclass
class StepBenchmarkArguments:
    """
    What a step is measured on. The trunk has random weights: time does not depend on them.

    Args:
        trunk_config (`dict`): Fields of the trunk's configuration, with `model_type`.
        sides (`dict[str, dict]`): Fields of [`PDTTrainingArguments`] and `losses` of every kind of PDT step, by name;
            the first is the one that the bars are about, each further one is reported as an increment over it.
        tokenizer (`str`, *optional*, defaults to `"recipes/tiny/trunk"`): Folder or Hub id.
        trunk_dtype (`str`, *optional*, defaults to `"float32"`): Of the trunk; what learns is float32.
        device (`str`, *optional*, defaults to `"cpu"`): `"cpu"` or `"cuda"`.
        documents (`int`, *optional*, defaults to 2): Documents per step, of three rows each.
        batches (`int`, *optional*, defaults to 4): Different batches that the rounds go through in turn.
        rounds (`int`, *optional*, defaults to 15): Measured rounds; in each, every side makes one step.
        warmup (`int`, *optional*, defaults to 2): Rounds before them.
        threads (`int`, *optional*, defaults to 1): CPU threads.
        benchmark_seed (`int`, *optional*, defaults to 0): Of weights and documents.
        output (`str`, *optional*, defaults to `"build/benchmarks/step.json"`): File that is written.
        step_bar (`float`, *optional*, defaults to 1.4): Allowed ratio of times.
        memory_bar (`float`, *optional*, defaults to 1.2): Allowed ratio of peaks of memory.
    """

    trunk_config: dict[str, Any] = field(metadata={"help": "Configuration of the random trunk, with model_type."})
    sides: dict[str, Any] = field(metadata={"help": "Training arguments and losses of every kind of PDT step."})
    tokenizer: str = field(default="recipes/tiny/trunk", metadata={"help": "Folder or Hub id of a tokenizer."})
    trunk_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of the trunk."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "cpu or cuda."})
    documents: int = field(default=2, metadata={"help": "Documents per step, three rows each."})
    batches: int = field(default=4, metadata={"help": "Different batches."})
    rounds: int = field(default=15, metadata={"help": "Measured rounds of one step per side."})
    warmup: int = field(default=2, metadata={"help": "Rounds before them."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    benchmark_seed: int = field(default=0, metadata={"help": "Seed of weights and documents."})
    output: str = field(default="build/benchmarks/step.json", metadata={"help": "File that is written."})
    step_bar: float = field(default=1.4, metadata={"help": "Allowed ratio of times."})
    memory_bar: float = field(default=1.2, metadata={"help": "Allowed ratio of peaks of memory."})

    def __post_init__(self) -> None:
        for name, low in dict.fromkeys(("documents", "batches", "threads"), 1).items() | {
            ("rounds", 2),
            ("warmup", 0),
        }:
            check_whole(name, getattr(self, name), low)
        if "model_type" not in self.trunk_config:
            raise ValueError(f"trunk_config={self.trunk_config} lacks model_type, allowed: one of transformers.")
        if not self.sides or set(self.sides) & set(PLAIN_SIDES):
            raise ValueError(f"sides={sorted(self.sides)}, allowed: at least one, none named {list(PLAIN_SIDES)}.")


@dataclass(frozen=True)
class Side:
    """
    One kind of training step.

    Args:
        step (`Callable`): Makes a step on the batch of a number, and returns its loss.
        batches (`list[dict]`): What it goes through in turn.
        trunk (`nn.Module`): Its trunk, with what learns.
    """

    step: Callable[[int], Tensor]
    batches: list[dict[str, Tensor]]
    trunk: nn.Module


class Workload:
    """
    Trunk, documents and layers that all sides share.

    Args:
        arguments ([`StepBenchmarkArguments`]): The recipe.
    """

    def __init__(self, arguments: StepBenchmarkArguments) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(arguments.tokenizer)
        self.config = AutoConfig.for_model(**arguments.trunk_config)
        self.adapter = PDTAdapterConfig()
        shape = self.config.hidden_size, self.config.num_hidden_layers, self.config.num_attention_heads
        self.adapter.resolve(*shape)

    def trunk(self) -> nn.Module:
        """The same random trunk for every side, frozen."""
        set_seed(self.arguments.benchmark_seed)
        dtype = getattr(torch, self.arguments.trunk_dtype)
        trunk = AutoModelForCausalLM.from_config(self.config, dtype=dtype).requires_grad_(False)
        return trunk.to(self.device)

    def batches(self, collator: PDTDataCollator) -> list[dict[str, Tensor]]:
        """The same documents for every side, in the form of its collator."""
        arguments = self.arguments
        config = PDTAdapterConfig()
        maker = FeatureMaker(self.tokenizer, config.num_plan_slots, config.plan_vocab_size, "benchmark")
        count = arguments.batches * arguments.documents
        data = DataArguments(train_documents=count, eval_documents=1).for_streams(config.num_streams)
        features, _ = load_features(data, maker, arguments.benchmark_seed)
        documents = [features[index] for index in range(count)]
        size = arguments.documents
        batches = [collator(documents[start : start + size]) for start in range(0, count, size)]
        return [send_to_device(batch, self.device) for batch in batches]


def add_lora(trunk: nn.Module, workload: Workload) -> list[nn.Parameter]:
    """LoRA on every linear map of the instrumented layers; what learns."""
    named = trunk.base_model.layers[0].named_modules()
    linear = sorted({path.rpartition(".")[2] for path, part in named if isinstance(part, nn.Linear)})
    layers = workload.adapter.instrumented_layers
    get_peft_model(trunk, LoraConfig(r=LORA_RANK, target_modules=linear, layers_to_transform=layers))
    return [parameter for parameter in trunk.parameters() if parameter.requires_grad]


def add_adapters(stack: nn.Module, workload: Workload, streams: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """A stream adapter on the output of every instrumented layer, chosen by `streams["ids"]`; what learns."""
    config, learning = workload.adapter, []
    for index in config.instrumented_layers:
        adapter = StreamAdapter(
            config.num_streams,
            config.trunk_hidden_size,
            config.adapter_bottleneck,
            config.adapter_activation,
            config.adapter_dropout,
        ).to(workload.device)
        stack.layers[index].register_forward_hook(partial(_adapt, adapter, streams))
        learning += adapter.parameters()
    return learning


def _adapt(
    adapter: StreamAdapter, streams: Mapping[str, Tensor], layer: nn.Module, inputs: tuple, hidden: Tensor
) -> Tensor:
    return adapter(hidden, streams["ids"])


def plain_side(workload: Workload, name: str) -> Side:
    """
    Step of plain fine-tuning: cross-entropy of the supervised tokens, backward down to the lowest adapted layer.

    `"adapters"` are the stream adapters alone, `"lora"` is LoRA on every linear map of the same layers. Logits are
    made for supervised positions only, as in the sides that are compared with them.
    """
    trunk, streams = workload.trunk(), {}
    stack, head = trunk.base_model, trunk.get_output_embeddings()
    parameters = add_lora(trunk, workload) if name == "lora" else add_adapters(stack, workload, streams)
    trunk.train()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    config = PDTConfig()
    collator = PDTDataCollator(
        workload.tokenizer.pad_token_id,
        config.block_size,
        config.bus_capacity,
        workload.adapter.num_streams,
        padding_side="left",
    )
    batches = workload.batches(collator)

    def step(index: int) -> Tensor:
        batch = batches[index % len(batches)]
        streams["ids"] = batch["stream_ids"]
        optimizer.zero_grad()
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        hidden = stack(**inputs, use_cache=False).last_hidden_state
        targets = supervised_values(batch["labels"], batch["labels"])
        loss = nn.functional.cross_entropy(head(hidden[supervised_positions(batch["labels"])]), targets)
        loss.backward()
        return finish(loss, parameters, optimizer)

    return Side(step, batches, trunk)


def pdt_side(workload: Workload, name: str) -> Side:
    """Step of [`PDTTrainer`] with the losses and arguments of a side."""
    arguments, choices = workload.arguments, dict(workload.arguments.sides[name])
    stage = {"name": name, "until": 1.0, "train": LEARNING, "losses": choices.pop("losses")}
    model = PDTForParallelDecoding.from_trunk(workload.trunk(), PDTAdapterConfig())
    training = PDTTrainingArguments(
        output_dir=str(Path(arguments.output).parent),
        max_steps=1,
        learning_rate=LEARNING_RATE,
        report_to="none",
        use_cpu=arguments.device == "cpu",
        **choices,
    )
    curriculum = Curriculum.from_list([stage], 1)
    trainer = PDTTrainer(model, training, curriculum, processing_class=workload.tokenizer, train_dataset=[None])
    optimizer, parameters = trainer.create_optimizer(), list(model.pdt_parameters().values())
    batches = workload.batches(trainer.data_collator)
    model.train()

    def step(index: int) -> Tensor:
        optimizer.zero_grad()
        loss = trainer.compute_loss(model, batches[index % len(batches)])
        loss.backward()
        settle_gradients(model.pdt_parameters(), curriculum.stages[0])
        return finish(loss, parameters, optimizer)

    return Side(step, batches, model.trunk)


def finish(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
    """The rest of a step after its backward pass, the same on every side."""
    nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    return loss.detach()


def make_side(workload: Workload, name: str) -> Side:
    """The side of a name."""
    return plain_side(workload, name) if name in PLAIN_SIDES else pdt_side(workload, name)


def process_memory(entry: str) -> int:
    """Bytes that `/proc/self/status` says this process holds (`"VmRSS"`) or has held at most (`"VmHWM"`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024


def peak_memory(arguments: StepBenchmarkArguments, name: str) -> int:
    """Largest memory of one side, in bytes beyond the imports: weights, optimizer and one step after another."""
    torch.set_num_threads(arguments.threads)
    # accelerate imports DeepSpeed, where it is installed, as soon as it looks at a model.
    extract_model_from_parallel(nn.Identity())
    imported = process_memory("VmRSS")
    side = make_side(Workload(arguments), name)
    for index in range(len(side.batches) + 1):
        side.step(index)
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_memory("VmHWM") - imported


def peaks(arguments: StepBenchmarkArguments, names: Sequence[str]) -> dict[str, int]:
    """[`peak_memory`] of every side, each in a process of its own that gives freed tensors back at once."""
    found = {}
    with patch_environment(**EXACT_MALLOC):
        for name in names:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                found[name] = executor.submit(peak_memory, arguments, name).result()
    return found


def interleaved(
    steps: Mapping[str, Callable[[int], Tensor]], rounds: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every side's steps, `[rounds]` each; see [`in_turn`]."""

    def run(step: Callable[[int], Tensor], index: int) -> None:
        step(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(step: Callable[[int], Tensor], index: int) -> float:
        return timed(partial(run, step, index))[0]

    return in_turn({name: partial(seconds, step) for name, step in steps.items()}, rounds, warmup)


def summarise(
    arguments: StepBenchmarkArguments, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times and memory of every side against the baseline's, and the bars of the first PDT side."""
    main, sides = next(iter(arguments.sides)), {}
    for name, values in seconds.items():
        sides[name] = {
            "seconds": statistics.median(values),
            "ratio": ratio_summary(list(zip(values, seconds[BASELINE], strict=True))),
            "peak_bytes": memory[name],
            "memory_ratio": memory[name] / memory[BASELINE],
        }
        if name not in (*PLAIN_SIDES, main):
            extra = [mine - other for mine, other in zip(values, seconds[main], strict=True)]
            sides[name]["increment"] = ratio_summary(list(zip(extra, seconds[BASELINE], strict=True)))
    bars = [
        {"name": "step time", "value": sides[main]["ratio"]["mean"], "bar": arguments.step_bar},
        {"name": "peak memory", "value": sides[main]["memory_ratio"], "bar": arguments.memory_bar},
    ]
    return sides, [{**bar, "limit": "at most", "met": bar["value"] <= bar["bar"]} for bar in bars]


def benchmark_step(arguments: StepBenchmarkArguments) -> dict[str, Any]:
    """Times, memory and bars of a training step; see [`StepBenchmarkArguments`]."""
    torch.set_num_threads(arguments.threads)
    workload, names = Workload(arguments), [*PLAIN_SIDES, *arguments.sides]
    made = {name: make_side(workload, name) for name in names}
    steps = {name: side.step for name, side in made.items()}
    seconds = interleaved(steps, arguments.rounds, arguments.warmup, workload.device)
    description = settings(workload, made[BASELINE].batches)
    del made, steps
    sides, bars = summarise(arguments, seconds, peaks(arguments, names))
    report = {"command": command_line(), "settings": description, "versions": package_versions()}
    return {**report, "sides": sides, "bars": bars}


def markdown_table(report: Mapping[str, Any]) -> str:
    """The report for people."""

    def span(summary: Mapping[str, float]) -> str:
        return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f}, n={summary['n']})"

    lines = ["# Cost of a training step", "", f"`python {report['command']}`", ""]
    lines += [
        "Ratios to plain bottleneck adapters on the same rows and layers: median of interleaved pairs, quartiles."
    ]
    lines += [
        "",
        "| side | seconds | time | over the first | peak memory, MiB | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in report["sides"].items():
        extra = f"+{span(side['increment'])}" if "increment" in side else ""
        lines.append(
            f"| {name} | {side['seconds']:.3f} | {span(side['ratio'])} | {extra} "
            f"| {side['peak_bytes'] / 2**20:.0f} | {side['memory_ratio']:.3f} |"
        )
    lines += ["", "| bar | value | allowed | |", "|---|---|---|---|"]
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "missed"
        lines.append(f"| {bar['name']} | {bar['value']:.3f} | {bar['bar']:.2f} | {verdict} |")
    lines += ["", "Settings:", "", *(f"- {name}: {value}" for name, value in report["settings"].items())]
    return "\n".join(lines) + "\n"


def settings(workload: Workload, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """What was measured: machine, trunk and batches."""
    arguments = workload.arguments
    total = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    supervised = sum(int(supervised_positions(batch["labels"]).sum()) for batch in batches)
    cuda = arguments.device == "cuda"
    return {
        "seed": arguments.benchmark_seed,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": arguments.threads,
        "cpu_count": os.cpu_count(),
        "trunk_dtype": arguments.trunk_dtype,
        "trunk": arguments.trunk_config,
        "instrumented_layers": workload.adapter.instrumented_layers,
        "rounds": arguments.rounds,
        "rows": int(batches[0]["input_ids"].shape[0]),
        "tokens_per_step": total / len(batches),
        "padding": 1 - real / total,
        "supervised_per_step": supervised / len(batches),
        "sides": arguments.sides,
    }
