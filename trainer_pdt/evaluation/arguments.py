"""Arguments of an evaluation."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import check_whole
from ..curriculum import check_choice, check_range
from ..nli import WORLDS
from .bert_score import check_bert_score
from .judge import Judge, make_judge

STANDARD_SECTIONS = (
    *("recall", "calibration", "coverage", "agreement", "rollback", "nli", "teacher_forced", "text", "speed"),
    "examples",
)
"""What an evaluation measures unless it is told otherwise, in order."""

ANSWER_SECTIONS = ("consistency", "similarity", "dependency", "note_usage", "judge")
"""What the full suite adds."""

SUITES = {"standard": STANDARD_SECTIONS, "full": (*STANDARD_SECTIONS, *ANSWER_SECTIONS)}
"""Sections by the name of a suite."""

FURTHER_SECTIONS = ("note_text", "two_hop", "curves", "rollback_controls")
"""Measurements that need documents of their own; `section_documents` says how many."""

CURVE_FACTORS = ("bus_lag", "num_streams", "block_size", "bus_capacity", "agreement_threshold")
"""Options of decoding that a curve may vary."""


@dataclass
class CalibrationArguments:
    """
    Whose thresholds to set, and on how much.

    Args:
        model (`str`): Folder or Hub repository of the adapters.
        revision (`str`, *optional*): Branch, tag or commit of that repository.
        trunk_revision (`str`, *optional*): Of the trunk on the Hub; missing = the commit that the model names.
        output_folder (`str`, *optional*): Receives thresholds and `generation_config.json`; missing = the model's
            folder, or for a model of the Hub `build/calibration/NAME`.
        calibration_documents (`int`): Validation documents on which thresholds are set, hard ones in the share that
            the evaluation has of them (its default share where nothing is evaluated).
        decode_batch (`int`): Documents per decoding call.
        eval_seed (`int`): Seed of sampling.
        threads (`int`): CPU threads.
        workers (`int`): Processes that write documents and share the threads; 1 = this one.
    """

    model: str = field(default="build/demo/model", metadata={"help": "Folder or repository of the adapters."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's repository."})
    trunk_revision: str | None = field(
        default=None, metadata={"help": "Of the trunk on the Hub; missing = the commit that the model names."}
    )
    output_folder: str | None = field(
        default=None, metadata={"help": "Receives thresholds; missing = the model's folder, or build/calibration."}
    )
    calibration_documents: int = field(default=96, metadata={"help": "Validation documents for calibration."})
    decode_batch: int = field(default=32, metadata={"help": "Documents per decoding call."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    workers: int = field(default=1, metadata={"help": "Processes that write documents and share the threads."})

    def __post_init__(self) -> None:
        self._check_least({"calibration_documents": 2, "decode_batch": 2, "threads": 1, "workers": 1})
        if self.output_folder is None:
            self.output_folder = str(self._default_folder())

    def _default_folder(self) -> Path:
        return Path(self.model) if Path(self.model).is_dir() else self._folder_of_hub_model("calibration")

    def _folder_of_hub_model(self, purpose: str) -> Path:
        name = self.model if self.revision is None else f"{self.model}@{self.revision}"
        return Path("build") / purpose / name.replace("/", "--")

    def _check_least(self, least: dict[str, int]) -> None:
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}.")


@dataclass
class EvaluationArguments(CalibrationArguments):
    """
    What to evaluate, and on how much.

    Args:
        output_folder (`str`, *optional*): Receives `evaluation.json`, the report and, for statistics over several
            runs, `documents.json`; missing = `MODEL_evaluation` beside the model's folder, or for a model of the Hub
            `build/evaluation/NAME`.
        core_documents, hard_documents (`int`): Held-out documents per kind.
        speed_documents (`int`): Documents of the wall-clock comparisons.
        control_factor (`int`): How many times as many documents the controls get (no bus, notes zeroed, gate 0, notes
            swapped): their bars are on the upper end of an interval, which narrows with the number of documents.
        training_report (`str`, *optional*): `training_report.json` of the run, quoted in the settings.
        nli_scorer (`str`, *optional*): Judges whether sections contradict each other: `"worlds"`, or folder or Hub id
            of a classifier, see `trainer_pdt.nli`; missing = not judged, and `"worlds"` in the full suite.
        judge (`dict[str, Any]`, *optional*): Fields of a [`~trainer_pdt.evaluation.judge.Judge`], at least its
            `model`; missing = answers are not judged. What it says is kept in `output_folder`, or in the file `store`.
        judge_documents (`int`, *optional*, defaults to 32): Most documents whose answers are judged.
        bert_score (`dict[str, Any]`, *optional*): Arguments of `bert_score.BERTScorer` for the section `similarity`;
            missing = without BERTScore.
        suite (`str`, *optional*, defaults to `"standard"`): What to measure: `"standard"`, or `"full"` for every
            section that needs no documents of its own.
        sections (`list[str]`, *optional*): What to measure in place of a suite: sections of the full one and of
            `FURTHER_SECTIONS`.
        section_documents (`dict[str, int]`, *optional*): Documents of each further section that is measured.
        curves (`dict[str, list]`, *optional*): Values of each of `CURVE_FACTORS` that the section `curves` varies.
        resume (`bool`, *optional*, defaults to `False`): Keep the sections that an earlier call with the same
            arguments and the same adapters has finished in `output_folder`.
    """

    output_folder: str | None = field(
        default=None, metadata={"help": "Receives evaluation.json; missing = MODEL_evaluation, or build/evaluation."}
    )
    core_documents: int = field(default=128, metadata={"help": "Held-out core documents."})
    hard_documents: int = field(default=48, metadata={"help": "Held-out hard documents."})
    speed_documents: int = field(default=25, metadata={"help": "Documents of the wall-clock comparisons."})
    control_factor: int = field(default=2, metadata={"help": "Documents of the controls, times as many."})
    training_report: str | None = field(default=None, metadata={"help": "training_report.json of the run."})
    nli_scorer: str | None = field(default=None, metadata={"help": "Scorer of contradictions: worlds, or a model."})
    judge: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of a judge of answers."})
    judge_documents: int = field(default=32, metadata={"help": "Most documents whose answers are judged."})
    bert_score: dict[str, Any] = field(default_factory=dict, metadata={"help": "Arguments of BERTScorer."})
    suite: str = field(default="standard", metadata={"help": "What to measure: standard or full."})
    sections: list[str] | None = field(
        default=None, metadata={"help": "What to measure in place of a suite, in order."}
    )
    section_documents: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Documents of each further section."}
    )
    curves: dict[str, list[int | float]] = field(
        default_factory=dict, metadata={"help": "Values by factor of decoding, for the section curves."}
    )
    resume: bool = field(default=False, metadata={"help": "Keep the sections that are finished."})

    def __post_init__(self) -> None:
        super().__post_init__()
        ones = dict.fromkeys(("control_factor", "judge_documents"), 1)
        self._check_least({"core_documents": 2, "hard_documents": 0, "speed_documents": 2, **ones})
        if self.bert_score:
            check_bert_score(self.bert_score)
        self.make_judge()
        self._choose_sections()
        self._check_sections()
        self._check_curves()

    def calibration_kinds(self) -> tuple[int, int]:
        """Core and hard documents among `calibration_documents`."""
        share = self.hard_documents / (self.core_documents + self.hard_documents)
        hard = round(self.calibration_documents * share)
        return self.calibration_documents - hard, hard

    def make_judge(self) -> Judge | None:
        """Who judges answers, if anybody does."""
        return make_judge(self.judge, Path(self.output_folder) / "judge.sqlite") if self.judge else None

    def _default_folder(self) -> Path:
        if not Path(self.model).is_dir():
            return self._folder_of_hub_model("evaluation")
        return Path(f"{os.path.abspath(self.model)}_evaluation")

    def _choose_sections(self) -> None:
        check_choice("suite", self.suite, tuple(SUITES))
        if self.sections is None:
            self.sections = list(SUITES[self.suite])
        elif self.suite != "standard":
            raise ValueError(f"sections={self.sections}, allowed: none with suite={self.suite!r}, which chooses them.")
        if self.suite == "full" and self.nli_scorer is None:
            self.nli_scorer = WORLDS

    def _check_sections(self) -> None:
        for name in self.sections:
            check_choice("sections", name, (*SUITES["full"], *FURTHER_SECTIONS))
        if not self.sections or len(set(self.sections)) != len(self.sections):
            raise ValueError(f"sections={self.sections}, allowed: one or more different ones.")
        wanted = {name for name in self.sections if name in FURTHER_SECTIONS}
        if wanted != self.section_documents.keys():
            raise ValueError(
                f"section_documents={self.section_documents}, allowed: a number of documents for each of "
                f"{sorted(wanted) or 'no section, none of the further ones is measured'}."
            )
        for name, count in self.section_documents.items():
            check_whole(f"section_documents.{name}", count, 2)

    def _check_curves(self) -> None:
        if bool(self.curves) != ("curves" in self.sections):
            raise ValueError(f"curves={self.curves}, allowed: values with the section 'curves', none without it.")
        for factor, values in self.curves.items():
            check_choice("curves", factor, CURVE_FACTORS)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"curves.{factor}={values}, allowed: one or more different values.")
            for value in values:
                if factor == "agreement_threshold":
                    check_range(f"curves.{factor}", value, 0.0, 1.0)
                else:
                    low, high = (2, 6) if factor == "num_streams" else (1, None)
                    check_whole(f"curves.{factor}", value, low, high)
