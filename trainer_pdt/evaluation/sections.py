"""Every section of an evaluation by name, and an evaluation as a run of sections that can be stopped and continued."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling_pdt import PDTForParallelDecoding

from ..telemetry import fingerprint, git_state, read_json, write_json
from . import answers, further, given_text, heads, oracle
from .note_usage import note_usage
from .suite import Evaluation

logger = logging.getLogger(__name__)

SECTIONS: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "recall": Evaluation.recall,
    "calibration": Evaluation.calibration,
    "coverage": heads.coverage,
    "agreement": heads.agreement,
    "rollback": Evaluation.rollback,
    "nli": answers.nli,
    "teacher_forced": Evaluation.teacher_forced,
    "text": given_text.text,
    "speed": Evaluation.speed,
    "examples": Evaluation.examples,
    "consistency": answers.consistency,
    "similarity": answers.similarity,
    "dependency": given_text.dependency,
    "note_usage": note_usage,
    "judge": answers.judge,
    "note_text": further.note_text,
    "two_hop": further.two_hop,
    "curves": further.curves,
    "rollback_controls": oracle.rollback_controls,
}
"""What measures each section."""

KEYS = {"text": "text_ce", "dependency": "dependency_ce"}
NAMED = ("recall", "nli", "judge", "rollback_controls")
"""Sections that name their keys themselves."""

NEVER_KEPT = ("judge",)
"""Sections that are measured again in every call; a judge's answers are kept in a store of their own."""

WITHOUT_EFFECT = (
    *("model", "output_folder", "threads", "workers", "training_report", "suite", "sections", "resume"),
    *("judge", "judge_documents"),
)
"""Arguments that change no figure of a section that is kept, where the adapters are the same."""

OF_ONE_SECTION = {"bert_score": "similarity"}
"""Arguments that change a single section."""

SECTIONS_FOLDER, DOCUMENTS_FILE = "sections", "documents.json"
BY_DOCUMENT = ("clusters", "decisions")


def adapters_mark(model: PDTForParallelDecoding) -> str:
    """Fingerprint of all PDT parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.pdt_parameters().items()):
        digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def run_sections(evaluation: Evaluation) -> dict[str, Any]:
    """
    Measures the sections of `arguments.sections`, in order, and keeps each under `output_folder`.

    Args:
        evaluation ([`Evaluation`]): What is measured; with `resume`, what other adapters reached is measured again.

    Returns:
        `dict[str, Any]`: Content of `evaluation.json` without settings and bars. `seconds` is what all sections took
            and `git` the states of the code that measured them, in earlier calls too.
    """
    arguments, report, seconds, states = evaluation.arguments, {}, 0.0, []
    adapters = adapters_mark(evaluation.model) if arguments.resume else ""
    settings = {key: value for key, value in asdict(arguments).items() if key not in WITHOUT_EFFECT}
    for name in arguments.sections:
        choices = {key: value for key, value in settings.items() if OF_ONE_SECTION.get(key, name) == name}
        mark = fingerprint({"adapters": adapters, "section": name, **choices})
        path = Path(arguments.output_folder) / SECTIONS_FOLDER / f"{name}.json"
        may_be_kept = arguments.resume and name not in NEVER_KEPT
        kept: dict[str, Any] = read_json(path) if may_be_kept and path.is_file() else {}
        if kept.get("settings") == mark:
            logger.info("%s: finished before, kept", name)
            if name == "calibration":
                evaluation.adopt_calibration(kept["value"])
        else:
            started = time.perf_counter()
            value = SECTIONS[name](evaluation)
            kept = {"settings": mark, "seconds": time.perf_counter() - started, "git": git_state(), "value": value}
            logger.info("%s: %.0f s", name, kept["seconds"])
            if may_be_kept:
                write_json(path, kept)
        seconds += kept.get("seconds", 0.0)  # sections of earlier versions know neither
        if kept.get("git") not in states:
            states.append(kept.get("git"))
        report |= kept["value"] if name in NAMED else {KEYS.get(name, name): kept["value"]}
    return {**report, "seconds": round(seconds, 1), "git": states}


def take_documents(report: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Separates what was counted document by document from the figures.

    Args:
        report (`Mapping`): Content of an evaluation.
        path (`str`, *optional*): Where it stands, keys joined by slashes.

    Returns:
        `tuple`: The report without it, and by path what was there: `clusters`, (successes, trials) per document, and
        `decisions`, lists of (probability, truth) per document.
    """
    figures, documents = {}, {}
    for key, value in report.items():
        place = f"{path}/{key}" if path else key
        if key in BY_DOCUMENT:
            documents |= {path: value} if key == "clusters" else {f"{place}/{name}": v for name, v in value.items()}
        elif isinstance(value, Mapping):
            figures[key], found = take_documents(value, place)
            documents |= found
        else:
            figures[key] = value
    return figures, documents
