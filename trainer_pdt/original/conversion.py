"""Turns a checkpoint of the original system into safetensors, with a report on every part of it."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import resolve_revision

from modeling_pdt import PDTForParallelDecoding

from ..telemetry import write_json
from .checkpoint import read_checkpoint
from .heads import CHOICES_FILE, HEADS_FILE, HeadChoices
from .names import CONDITIONING, HEADS, Contents, recognise

REPORT_FILE, TEXT_FILE, SCHEMA_VERSION = "conversion.json", "conversion.md", "1.0"
_SCHEDULE = "a checkpoint holds what learns, and its losses give it a gradient"
_LATER = "only code after the release has it, and no run of that code is published"
# Whether a part was trained, and how that is known.
TRAINED = {
    **dict.fromkeys(
        ("planner_head", "notes_head", "speculation_head", "coverage_head", "plan_embedding"), ("yes", _SCHEDULE)
    ),
    "agreement_head": ("no", "the release has no labels for it; it is at its random start"),
    "stream_classifier": ("no", "its loss has weight 0; it is at its random start"),
    "plan_notes_proj": ("unknown", _LATER),
    "notes_summary_query": ("unknown", _LATER),
    "stream_adapters": ("no", "beside the model, never part of its forward pass"),
    "cross_attention": ("no", "beside the model, never part of its forward pass"),
    "layers": ("unknown", "no published run had parameters inside the trunk's layers"),
}
# What does the same here, and why it cannot start from the original's tensors.
COUNTERPARTS = {
    "planner_head": (
        "planner",
        "ours pools the prompt once per slot and shares a low-rank embedding of other buckets; a full matrix on the "
        "last state, per token or on one mean, is no case of it",
    ),
    "notes_head": (
        "encoder",
        "ours pools states of the border layer into several normed notes, not one per last state",
    ),
    "speculation_head": ("writer", "ours pools a block's states of the border layer, not each last state by itself"),
    "agreement_head": ("agreement", "ours compares a block with what it reads from the siblings, not one state alone"),
    "coverage_head": (
        "coverage",
        "ours reads normed states of the border layer, in heads, against items made of text",
    ),
    "stream_classifier": ("stream", "ours is linear on normed states of the border layer"),
    "plan_embedding": ("planner.embedding", "another hash: a row there and a row here stand for different plan items"),
    "plan_notes_proj": ("planner.up", "it maps that embedding, and its notes have another norm"),
    "notes_summary_query": ("writer.query", "it pools notes, ours pools states; the file does not hold its scale"),
    "stream_adapters": ("stream_adapters", "ours have a norm before them and start at zero; these were never used"),
    "cross_attention": ("snc", "ours has a norm before it, a sink and no biases; this was never used"),
    "layers": (
        "snc, stream_adapters",
        "norm, sink, biases and gates differ, so the same weights compute something else",
    ),
}


@dataclass
class ConvertArguments:
    """
    What to convert.

    Args:
        checkpoint (`str`): File of the original system, `.pt`, `.pth`, `.bin` or `.safetensors`.
        output_folder (`str`): Takes the heads and the report.
        trunk (`str`, *optional*): Also write an untrained PDT model of the checkpoint's sizes for this trunk, a folder
            or a Hub id, of which only the configuration is read.
        trunk_revision (`str`, *optional*): Of the trunk on the Hub; missing = the newest commit.
    """

    checkpoint: str = field(metadata={"help": "File of the original system."})
    output_folder: str = field(metadata={"help": "Takes the heads and the report."})
    trunk: str | None = field(
        default=None, metadata={"help": "Also write an untrained PDT model of the same sizes for this trunk."}
    )
    trunk_revision: str | None = field(default=None, metadata={"help": "Of the trunk on the Hub."})

    def __post_init__(self) -> None:
        folder = Path(self.output_folder)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ValueError(f"output_folder={self.output_folder!r}, allowed: a new or an empty folder.")
        if self.trunk_revision is not None and self.trunk is None:
            raise ValueError(f"trunk_revision={self.trunk_revision!r}, allowed: with trunk alone.")


def convert(arguments: ConvertArguments, choices: HeadChoices) -> dict[str, Any]:
    """
    Writes `original_heads.safetensors`, `original_heads.json`, `conversion.json` and `conversion.md`.

    No tensor of the original becomes part of a PDT model: none of them computes the same there. With
    `arguments.trunk`, a model of the checkpoint's sizes is written, whose adapters are all at their start.

    Args:
        arguments ([`ConvertArguments`]): What to convert.
        choices ([`HeadChoices`]): What the checkpoint's shapes do not tell.

    Returns:
        `dict`: The report, as it is in `conversion.json`.

    Raises:
        ValueError: For a file that is none of the original's, or a trunk of another width; nothing is written then.
    """
    checkpoint = read_checkpoint(arguments.checkpoint)
    contents = recognise(checkpoint.state)
    choices = choices.settled(contents.sizes, contents.forms)
    sizes = adapter_sizes(contents, choices)
    folder = Path(arguments.output_folder)
    if arguments.trunk is not None:
        new_model(arguments.trunk, arguments.trunk_revision, sizes, contents.sizes.get("H")).save_pretrained(folder)
    report = {
        "schema_version": SCHEMA_VERSION,
        "source": checkpoint.source,
        "training": checkpoint.training,
        "left_out": checkpoint.left_out,
        "renamed": checkpoint.renamed,
        "generation": generation(contents, choices),
        "sizes": contents.sizes,
        "streams": contents.streams,
        "layers": contents.layers,
        "choices": asdict(choices),
        "parts": [describe(part, contents, checkpoint.state) for part in (*HEADS, *CONDITIONING)],
        "adapter_sizes": sizes,
        "model": None if arguments.trunk is None else {"trunk": arguments.trunk, "trained": []},
    }
    kept = {name: checkpoint.state[name].clone() for part in HEADS for name in contents.names.get(part, ())}
    folder.mkdir(parents=True, exist_ok=True)
    if kept:
        save_file(
            kept, folder / HEADS_FILE, metadata={"format": "pt", "sha256_of_source": checkpoint.source["sha256"]}
        )
        write_json(folder / CHOICES_FILE, choices)
    write_json(folder / REPORT_FILE, report)
    (folder / TEXT_FILE).write_text(as_text(report), encoding="utf-8")
    return report


def generation(contents: Contents, choices: HeadChoices) -> list[str]:
    """Traits of the code that wrote the checkpoint, `["release"]` for the code of December 2025."""
    slots = ["planner with slots"] if choices.planner_slots and "planner_head" in contents.forms else []
    return [*contents.generation, *slots] or ["release"]


def describe(part: str, contents: Contents, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """One part of the original: is it there, was it trained, what becomes of it, what does its work here."""
    names = contents.names.get(part, [])
    trained, why = (
        TRAINED[part] if names else ("no", "not in the file: frozen at that stage, or of another generation")
    )
    if part == "agreement_head" and contents.generation and names:
        trained, why = "unknown", "code after the release has labels for it; whether this run had is not in the file"
    use = "left out" if part in CONDITIONING else "kept" if part != "notes_summary_query" else "kept, not computed"
    counterpart, difference = COUNTERPARTS[part]
    return {
        "part": part,
        "form": contents.forms.get(part),
        "tensors": len(names),
        "parameters": sum(state[name].numel() for name in names),
        "use": use if names else "missing",
        "trained": trained,
        "why": why,
        "counterpart": counterpart,
        "difference": difference,
    }


def adapter_sizes(contents: Contents, choices: HeadChoices) -> dict[str, Any]:
    """Fields of `PDTAdapterConfig` that mean the same as sizes of the checkpoint."""
    sizes, conditioning = contents.sizes, [name for part in CONDITIONING for name in contents.names.get(part, ())]
    gates = sizes.get("G")
    found = {
        "num_streams": sizes.get("S") or len(contents.streams) or None,
        "notes_dim": sizes.get("D"),
        "adapter_bottleneck": sizes.get("A"),
        "adapter_activation": "gelu" if "A" in sizes else None,
        "instrumented_layers": contents.layers or None,
        "snc_heads": gates if gates and gates > 1 else None,
        "plan_vocab_size": sizes.get("B"),
        "num_plan_slots": choices.planner_slots or None,
    }
    if gates is not None:
        dynamic = any("gate_dyn_proj" in name for name in conditioning)
        found["gate_mode"] = "dynamic" if dynamic else "per_head" if gates > 1 else "scalar"
    return {key: value for key, value in found.items() if value is not None}


def new_model(trunk: str, revision: str | None, sizes: Mapping[str, Any], width: int | None) -> PDTForParallelDecoding:
    """An untrained model of these sizes on the configuration of a trunk; the trunk's weights are not loaded."""
    resolved = resolve_revision(trunk, revision=revision)
    config = AutoConfig.from_pretrained(trunk, revision=resolved)
    hidden_size = config.get_text_config(decoder=True).hidden_size
    if width is not None and hidden_size != width:
        raise ValueError(f"trunk={trunk!r} has width {hidden_size}, allowed: the checkpoint's, {width}.")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    # A trunk need not have one; then its configuration says what there is to say.
    with suppress(OSError):
        empty.generation_config = GenerationConfig.from_pretrained(trunk, revision=resolved)
    return PDTForParallelDecoding.from_trunk(empty, trunk_revision=getattr(resolved, "resolved", None), **sizes)


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a reader, as Markdown."""
    source, training = report["source"], report["training"]
    lines = [
        f"# Conversion of {source['file']}",
        "",
        f"- SHA-256 `{source['sha256']}`, {source['bytes']:,} bytes, {source['form']}, {', '.join(source['dtypes'])}",
        f"- written by: {'; '.join(report['generation'])}",
        *(f"- {key}: {training[key]}" for key in ("global_step", "stage_index") if key in training),
        *_listed("not taken from `training_state`", report["left_out"]),
        *_listed("tensors under older names", report["renamed"]),
        *(f"- {name} = {value}" for name, value in report["choices"].items()),
        "",
        "| part | parameters | trained | becomes | here |",
        "|---|---:|---|---|---|",
        *(
            f"| {part['part']} | {part['parameters']:,} | {part['trained']}: {part['why']} | {part['use']} | "
            f"{part['counterpart']}: {part['difference']} |"
            for part in report["parts"]
        ),
        "",
        "Kept tensors are in `original_heads.safetensors`; `trainer_pdt.original.heads.OriginalHeads` computes what "
        "the original did with them. None of them goes into a PDT model.",
    ]
    if report["model"] is not None:
        lines += [
            "",
            f"The PDT model in this folder, for {report['model']['trunk']}, has the checkpoint's sizes. All its "
            "parameters are at their start: nothing in it is trained.",
        ]
    return "\n".join(lines) + "\n"


def _listed(title: str, names: Iterable[str]) -> list[str]:
    return [f"- {title}: {', '.join(names)}"] if names else []
