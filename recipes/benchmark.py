"""Benchmarks: `python recipes/benchmark.py step --config recipes/benchmarks/step.yaml`.

`step`: a training step against plain adapters. `decode`: decoding against the bare trunk. `data`: a dataset build.
Writes a JSON file with the command line, the machine and every ratio, and the same as a Markdown table beside it.
"""

import logging
import sys

from trainer_pdt.data_benchmark import DataBenchmarkArguments, benchmark_data, data_table
from trainer_pdt.decoding_benchmark import DecodingBenchmarkArguments, benchmark_decoding, decoding_table
from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import write_json
from trainer_pdt.training_benchmark import StepBenchmarkArguments, benchmark_step, markdown_table

KINDS = {
    "step": (StepBenchmarkArguments, benchmark_step, markdown_table),
    "decode": (DecodingBenchmarkArguments, benchmark_decoding, decoding_table),
    "data": (DataBenchmarkArguments, benchmark_data, data_table),
}


def main(args: list[str] | None = None) -> dict:
    """Runs the benchmark that the first word names and returns what was written."""
    kind, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if kind in ("-h", "--help"):
        sys.stdout.write(f"usage: benchmark.py {{{','.join(KINDS)}}} [--help]\n\n{__doc__}")
        raise SystemExit(0)
    if kind not in KINDS:
        raise ValueError(f"benchmark {kind!r} is unknown, allowed: {sorted(KINDS)}.")
    owner, run, table = KINDS[kind]
    (arguments,) = RecipeParser(owner, script=f"benchmark.py {kind}").parse(rest)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    report = run(arguments)
    path = write_json(arguments.output, report)
    path.with_suffix(".md").write_text(table(report), encoding="utf-8")
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "missed"
        logging.info("%s %.3f, %s %.2f: %s", bar["name"], bar["value"], bar["limit"], bar["bar"], verdict)
    return report


if __name__ == "__main__":
    main()
