"""The demo's measured evaluation, for tests of what publishes one."""

import json
from pathlib import Path

from modeling_pdt import PDTForParallelDecoding
from trainer_pdt.evaluation.sections import adapters_mark

DEMO = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "demo" / "evaluation.json"


def write_evaluation(path: Path, model_folder: Path | str) -> str:
    """Writes the demo's evaluation as if it had measured the adapters of that folder; returns its path."""
    report = json.loads(DEMO.read_text())
    report["settings"]["adapters"] = adapters_mark(PDTForParallelDecoding.from_pretrained(model_folder))
    path.write_text(json.dumps(report))
    return str(path)
