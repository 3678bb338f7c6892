"""Calibrates the thresholds of trained adapters: `python recipes/calibrate.py --model build/demo/model`.

Writes `agreement_thresholds.json`, `coverage_thresholds.json` and `generation_config.json` into `output_folder`: where
nothing is said the model's folder, or for a model of the Hub `build/calibration/NAME`. Evaluation does the same on its
way; this recipe does nothing else.
"""

import logging
from contextlib import closing
from dataclasses import asdict

import torch

from trainer_pdt.calibration import save_calibration
from trainer_pdt.evaluation.arguments import CalibrationArguments, EvaluationArguments
from trainer_pdt.evaluation.suite import Evaluation
from trainer_pdt.loading import load_trained
from trainer_pdt.parser import RecipeParser


def main(args: list[str] | None = None) -> dict:
    """Calibrates and returns both reports."""
    (arguments,) = RecipeParser(CalibrationArguments).parse(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_trained(arguments.model, arguments.revision, arguments.trunk_revision)
    model.check_conditioning()
    evaluation = Evaluation(model, tokenizer, EvaluationArguments(**asdict(arguments)))
    with closing(evaluation.writers):
        calibration = evaluation.calibration()
    for path in save_calibration(model, calibration, arguments.output_folder):
        logging.info("wrote %s", path)
    for head, report in calibration.items():
        for name in ("threshold", "auroc", "f1", "expected_calibration_error"):
            if name in report:
                value = report[name]
                logging.info("%-18s %-28s %s (%s to %s)", head, name, value["mean"], value["low"], value["high"])
    return calibration


if __name__ == "__main__":
    main()
