"""Evaluates trained adapters on held-out worlds: `python recipes/evaluate.py --model build/demo/model`.

Writes `evaluation.json` and a report in HTML and Markdown with plots into `output_folder` (`MODEL_evaluation` where
nothing is said), and the calibrated thresholds into the model's folder (`agreement_thresholds.json`,
`coverage_thresholds.json`, `generation_config.json`).
"""

import logging
from contextlib import closing
from pathlib import Path

import torch

from trainer_pdt.calibration import save_calibration
from trainer_pdt.evaluation.arguments import EvaluationArguments
from trainer_pdt.evaluation.bars import check_bars
from trainer_pdt.evaluation.report import read_training, write_report
from trainer_pdt.evaluation.sections import DOCUMENTS_FILE, adapters_mark, run_sections, take_documents
from trainer_pdt.evaluation.suite import Evaluation
from trainer_pdt.loading import load_trained
from trainer_pdt.parser import RecipeParser
from trainer_pdt.telemetry import command_line, write_json


def main(args: list[str] | None = None) -> dict:
    """Runs every section and returns what was written to `evaluation.json`."""
    (arguments,) = RecipeParser(EvaluationArguments).parse(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # A line per request to a judge would hide the others.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output_folder)
    model, tokenizer = load_trained(arguments.model, arguments.revision, arguments.trunk_revision)
    model.check_conditioning()
    evaluation = Evaluation(model, tokenizer, arguments)
    report: dict = {
        "settings": {
            "command": command_line(),
            "adapters": adapters_mark(model),
            "seed": arguments.eval_seed,
            "documents": {"core": arguments.core_documents, "hard": arguments.hard_documents},
            "control_factor": arguments.control_factor,
            "block_size": model.config.block_size,
            "bus_lag": model.config.bus_lag,
            "temperature": 1.0,
            "threads": arguments.threads,
            "workers": arguments.workers,
        }
    }
    if model.config.trunk_revision is not None:
        report["settings"]["trunk_revision"] = model.config.trunk_revision
    if arguments.section_documents:
        report["settings"]["section_documents"] = arguments.section_documents
    training = read_training(arguments.training_report) if arguments.training_report else None
    if training is not None:
        report["settings"]["training"] = training.get("training", {})
    with closing(evaluation.writers):
        measured = run_sections(evaluation)
    figures, documents = take_documents(measured)
    report |= figures
    report["bars"] = check_bars(report)
    write_json(folder / DOCUMENTS_FILE, documents, indent=None)
    write_json(folder / "evaluation.json", report)
    if Path(arguments.model).is_dir() and "calibration" in report:
        save_calibration(model, report["calibration"], arguments.model)
    logging.info("wrote %s", write_report(report, training, folder))
    for bar in report["bars"]:
        logging.info("%-45s %8.3f  %-9s %s", bar["name"], bar["value"], bar["bar"], "met" if bar["met"] else "missed")
    return report


if __name__ == "__main__":
    main()
