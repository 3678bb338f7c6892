"""Decodes a request: `python recipes/decode.py --model build/demo/model --prompt "Describe the town of Velmar."`

Shows the sections side by side as they are committed, withdrawn blocks struck out, and the merged answer last. The
options can also come from a YAML file, `--config FILE`; `docs/decoding.md` describes the files that a run leaves.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from modeling_pdt import ParallelGenerateOutput, PDTForParallelDecoding
from modeling_pdt.callbacks import JsonLinesWriter, MemoryRecorder, ParallelDecodingCallback, TokenRecorder
from modeling_pdt.readings import ReadingRecorder
from trainer_pdt.decode_arguments import DecodeArguments
from trainer_pdt.live_view import LiveView
from trainer_pdt.loading import load_trained
from trainer_pdt.manifest import decode_manifest, write_decode_manifest
from trainer_pdt.parser import RecipeParser, load_yaml
from trainer_pdt.render import render_request
from trainer_pdt.replay import ReplayRecorder


def open_callbacks(
    arguments: DecodeArguments, tokenizer: PreTrainedTokenizerBase, stack: ExitStack
) -> list[ParallelDecodingCallback]:
    """The recorders that the options ask for; `stack` closes what they write."""
    callbacks: list[ParallelDecodingCallback] = []
    if arguments.token_records:
        callbacks.append(TokenRecorder())
    if arguments.memory_report:
        callbacks.append(MemoryRecorder())
    if arguments.reading_records:
        callbacks.append(ReadingRecorder())
    if arguments.stream_jsonl is not None:
        path = Path(arguments.stream_jsonl)
        path.parent.mkdir(parents=True, exist_ok=True)
        callbacks.append(JsonLinesWriter(stack.enter_context(path.open("w", encoding="utf-8")), tokenizer.decode))
    if arguments.replay_folder is not None:
        recorder = ReplayRecorder(arguments.replay_folder, arguments.replay_chunk_calls)
        callbacks.append(stack.enter_context(recorder))
    return callbacks


def write_manifest(
    arguments: DecodeArguments,
    tokenizer: PreTrainedTokenizerBase,
    output: ParallelGenerateOutput,
    prompts: list[str],
    sections: list[list[str]],
    merged: list[str],
) -> None:
    """Writes what the run was given, what it wrote and what happened."""
    described = {"class": type(tokenizer).__name__, "vocab_size": len(tokenizer), "from": arguments.model}
    notes = arguments.reference_notes and load_yaml(arguments.reference_notes)
    manifest = decode_manifest(
        output.trace.to_manifest(),
        prompts,
        sections,
        merged,
        tokenizer=described,
        reference_notes=notes,
        replay_folder=arguments.replay_folder,
    )
    write_decode_manifest(arguments.manifest, manifest)


def decode(
    model: PDTForParallelDecoding,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DecodeArguments,
    console: Console | None = None,
) -> ParallelGenerateOutput:
    """Writes the answers and shows them on the console; returns what `generate` returned."""
    console = Console() if console is None else console
    prompts = [render_request(request, tokenizer) for request in arguments.requests()]
    tokenizer.padding_side = "left"
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.trunk.device)
    options = arguments.generate_arguments(model.generation_config.num_streams or model.config.num_streams)
    with ExitStack() as stack:
        callbacks = open_callbacks(arguments, tokenizer, stack)
        view = stack.enter_context(LiveView(tokenizer, len(prompts), options["num_streams"], console))
        output = model.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            tokenizer=tokenizer,
            streamer=view,
            callbacks=callbacks,
            return_dict_in_generate=True,
            **options,
        )
    texts = [[tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows] for rows in output.streams]
    headers = [[tokenizer.decode(tokens) for tokens in plan["headers"]] for plan in output.trace.of_kind("plan")]
    answers = ["\n\n".join(map("".join, zip(*parts, strict=True))) for parts in zip(headers, texts, strict=True)]
    for answer in answers:
        console.rule("merged answer")
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
    if arguments.manifest is not None:
        write_manifest(arguments, tokenizer, output, prompts, texts, answers)
    return output


def main(args: list[str] | None = None) -> None:
    """Loads the model, decodes, writes the files asked for."""
    (arguments,) = RecipeParser(DecodeArguments).parse(args)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_trained(
        arguments.model, arguments.revision, arguments.trunk_revision, device_map=arguments.device
    )
    model.check_conditioning()
    decode(model, tokenizer, arguments)


if __name__ == "__main__":
    main()
