"""Parallel decoding beside its baselines: `python recipes/baselines.py --model build/demo/model`.

The same trunk, sampler and requests: held-out documents of the worlds, whose facts are counted, or `--prompt`. Writes
`baselines.json`, `baselines.md`, and for every answer a manifest of the schema of `recipes/decode.py`.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import torch

from trainer_pdt.baselines import Request, Run
from trainer_pdt.baselines.arguments import BaselineArguments
from trainer_pdt.baselines.comparison import (
    REFERENCE,
    comparison_table,
    count_answers,
    measure_costs,
    run_methods,
)
from trainer_pdt.evaluation.documents import held_out_documents
from trainer_pdt.evaluation.tables import to_markdown
from trainer_pdt.loading import load_trained
from trainer_pdt.manifest import decode_manifest, write_decode_manifest
from trainer_pdt.parser import RecipeParser
from trainer_pdt.render import render_request
from trainer_pdt.telemetry import command_line, git_state, read_json, write_json


def main(args: list[str] | None = None) -> dict:
    """Answers every request in every way and returns what was written to `baselines.json`."""
    (arguments,) = RecipeParser(BaselineArguments).parse(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_trained(arguments.model, device_map=arguments.device)
    model.check_conditioning()
    folder = Path(arguments.output_folder)
    documents, texts = [], [render_request(text, tokenizer) for text in arguments.requests()]
    requests = [Request.outlined(text, model, tokenizer) for text in texts]
    if not requests:
        documents = held_out_documents("test", arguments.documents, 0)
        requests = [Request.from_document(document, tokenizer) for document in documents]

    def keep(name: str, number: int, run: Run) -> None:
        sections = [[tokenizer.decode(s.token_ids, skip_special_tokens=True) for s in run.output.streams[0]]]
        merged = [tokenizer.decode(tokens) for tokens in run.output.merged]
        manifest = decode_manifest(run.output.trace.to_manifest(), [run.request.prompt], sections, merged)
        write_decode_manifest(folder / "manifests" / name / f"{number:04d}.json", manifest)
        logging.info("request %d, %s: %d tokens in %.2f s", number, name, run.written, run.seconds)

    options = arguments.generate_arguments()
    runs = run_methods(arguments.methods, model, tokenizer, requests, options, arguments.tools(), keep)
    measures = {name: measure_costs(name, every, runs[REFERENCE]) for name, every in runs.items()}
    if documents:
        for name, every in runs.items():
            measures[name] |= count_answers(name, every, documents, tokenizer, model)
    settings = {**asdict(arguments), "requests": len(requests), "threads": torch.get_num_threads()}
    report = {"command": command_line(), "git": git_state(), "settings": settings, "methods": measures}
    (folder / "baselines.md").write_text(to_markdown(comparison_table(measures)), encoding="utf-8")
    return read_json(write_json(folder / "baselines.json", report))


if __name__ == "__main__":
    main()
