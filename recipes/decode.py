"""Decodes a request: `python recipes/decode.py --model build/demo/model --prompt "Describe the town of Velmar."`

Shows the sections side by side as they are committed, withdrawn blocks struck out, and the merged answer last. The
options can also come from a YAML file, `--config FILE`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_pdt import ParallelGenerateOutput, PDTForParallelDecoding
from modeling_pdt.interventions import make_interventions
from trainer_pdt.live_view import LiveView
from trainer_pdt.parser import RecipeParser
from trainer_pdt.render import render_header, render_request
from trainer_pdt.telemetry import command_line, write_json

# Passed on to generate() when set; None there means the value that the model was saved with.
OPTIONS = ("block_size", "bus_lag", "max_retries", "retry_policy", "agreement_threshold", "gate_scale")


@dataclass
class DecodeArguments:
    model: str = field(metadata={"help": "Folder or Hub repository of trained adapters."})
    prompt: str | None = field(default=None, metadata={"help": "The request."})
    prompt_file: str | None = field(default=None, metadata={"help": "File with one request per line."})
    plan: Literal["trunk", "planner", "none"] = field(
        default="trunk", metadata={"help": "Who plans: the trunk writes an outline, the planner head, or nobody."}
    )
    headers: list[str] | None = field(default=None, metadata={"help": "Section headers, one per stream."})
    num_streams: int | None = field(default=None, metadata={"help": "Sections; default: as trained."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens per section."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    seed: int = field(default=0, metadata={"help": "The same seed writes the same answer."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens per block."})
    bus_lag: int | None = field(default=None, metadata={"help": "Rounds between writing and reading."})
    max_retries: int | None = field(default=None, metadata={"help": "Times a block may be written again."})
    retry_policy: str | None = field(default=None, metadata={"help": "refresh or stale."})
    agreement_threshold: float | None = field(default=None, metadata={"help": "Least agreement that stands."})
    gate_scale: float | None = field(default=None, metadata={"help": "Factor of the SNC gate; 0 silences it."})
    interventions: list[str] = field(default_factory=list, metadata={"help": "Names, for instance ablate or stale."})
    manifest: str | None = field(default=None, metadata={"help": "JSON file for the trace and the texts."})
    device: str | None = field(default=None, metadata={"help": "Of the model: cuda, cuda:1, mps; default: the CPU."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})


def requests(arguments: DecodeArguments) -> list[str]:
    """The requests: the one given, or the lines of the file."""
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ValueError("give exactly one of `prompt` and `prompt_file`.")
    if arguments.prompt is not None:
        return [arguments.prompt]
    return [line for line in Path(arguments.prompt_file).read_text(encoding="utf-8").splitlines() if line.strip()]


def decode(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DecodeArguments,
    console: Console | None = None,
) -> ParallelGenerateOutput:
    """Writes the answers and shows them on the console; returns what `generate` returned."""
    console = Console() if console is None else console
    prompts = [render_request(request, tokenizer) for request in requests(arguments)]
    tokenizer.padding_side = "left"
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.trunk.device)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    num_streams = arguments.num_streams or model.generation_config.num_streams or model.config.num_streams
    with LiveView(tokenizer, len(prompts), num_streams, console) as view:
        output = model.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            tokenizer=tokenizer,
            num_streams=num_streams,
            plan=None if arguments.plan == "none" else arguments.plan,
            stream_prefixes=arguments.headers and [render_header(header) for header in arguments.headers],
            max_new_tokens=arguments.max_new_tokens,
            interventions=make_interventions(arguments.interventions),
            seed=arguments.seed,
            streamer=view,
            return_dict_in_generate=True,
            **sampling,
            **options,
        )
    texts = [[tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows] for rows in output.streams]
    headers = [[tokenizer.decode(tokens) for tokens in plan["headers"]] for plan in output.trace.of_kind("plan")]
    answers = ["\n\n".join(map("".join, zip(*parts, strict=True))) for parts in zip(headers, texts, strict=True)]
    for answer in answers:
        console.rule("merged answer")
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    if arguments.manifest is not None:
        manifest = {"command": command_line(), "prompts": prompts, "sections": texts, "merged": answers}
        write_json(arguments.manifest, manifest | {"trace": output.trace.to_manifest()})
    return output


def main(args: list[str] | None = None) -> None:
    """Loads the model, decodes, writes the manifest."""
    (arguments,) = RecipeParser(DecodeArguments).parse(args)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = PDTForParallelDecoding.from_pretrained(arguments.model, device_map=arguments.device)
    model.check_conditioning()
    decode(model, AutoTokenizer.from_pretrained(arguments.model), arguments)


if __name__ == "__main__":
    main()
