"""The whole evaluation of one trained model on held-out worlds, section by section of `evaluation.json`."""

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding

from ..calibration import Judgements, assess, calibrate, fit_scaling, scaled
from ..collator import PDTDataCollator
from ..data.counting import DocumentCounts, reference_rate
from ..data.schema import Document
from ..data.worlds import chance_by_cue
from ..evaluation_pass import BUS_MIXES, TeacherForcedMetrics
from ..features import FeatureMaker, collect_values
from ..nli import load_nli_scorer
from . import blocks as block_scores
from .arguments import EvaluationArguments
from .bars import CHANCE_MODES
from .benchmark import overhead_vs_shared_prefill, parallel_vs_single
from .consistency import ANSWER_MODES, check_control, standard_control
from .documents import held_out_documents
from .examples import describe_answer
from .modes import (
    PARALLEL_MODES,
    Written,
    batches,
    calibrated_gate,
    twin_prompts,
    write_full_text,
    write_parallel,
    write_random_gate,
    write_sequential,
    write_swapped,
)
from .scoring import (
    by_value,
    count_written,
    coverage_decisions,
    mean_chance,
    plan_adherence,
    rate_dict,
    reference_classes,
    references_relative,
    rollback_counts,
    select_kind,
    stated_relative,
    swapped_rates,
)
from .writers import Writers

logger = logging.getLogger(__name__)

VALUE_DOCUMENTS = 1000
"""Training documents of each kind from which values for contradictions are collected."""

RECALL_MODES = (*PARALLEL_MODES, "independent", "sequential", "full_text")
"""Modes of decoding whose references are counted."""

OTHER_DRAWS = 1000
"""What is added to the seed where other draws are wanted; a section of a document takes the next one."""


class Evaluation:
    """
    Everything that the sections of one evaluation share.

    Args:
        model (`PDTForParallelDecoding`), tokenizer (`PreTrainedTokenizerBase`): What is evaluated.
        arguments (`EvaluationArguments`): On how much.
    """

    def __init__(
        self, model: PDTForParallelDecoding, tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments
    ) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.nli_scorer = None if arguments.nli_scorer is None else load_nli_scorer(arguments.nli_scorer)
        if self.nli_scorer is not None:
            check_control(self.nli_scorer, standard_control())
        self.judge = arguments.make_judge()
        if self.judge is not None:
            self.judge.client()
        self.lag, self.capacity = model.config.bus_lag, model.config.bus_capacity
        core, hard, factor = arguments.core_documents, arguments.hard_documents, arguments.control_factor
        self.documents = held_out_documents("test", core, hard)
        self.control_documents = held_out_documents("test", factor * core, factor * hard)
        self.writers = Writers(
            model, tokenizer, arguments.model, arguments.workers, arguments.threads, arguments.revision
        )
        self.features = FeatureMaker(
            tokenizer,
            model.config.num_plan_slots,
            model.config.plan_vocab_size,
            model.config.plan_hash_salt,
            collect_values(held_out_documents("train", VALUE_DOCUMENTS, VALUE_DOCUMENTS)),
        )
        self.written: dict[str, Written] = {}
        self.counts: dict[str, list[DocumentCounts]] = {}
        self._calibration: dict[str, Any] | None = None

    def write(self, mode: str, **options: Any) -> Written:
        """
        What a mode writes for its documents, written once.

        Args:
            mode (`str`): One of [`PARALLEL_MODES`], `"pdt_gate"`, `"independent"`, `"sequential"`,
                `"sequential_again"` or `"full_text"`; another name is parallel decoding with `options`. The commit
                gate is on in `"pdt_gate"` only.
            options: Further arguments of what writes it.
        """
        if mode not in self.written:
            documents = self.documents_of(mode)
            logger.info("writing %d documents: %s", len(documents), mode)
            write, own = self._way(mode)
            self.written[mode] = self.writers(write, documents, **{**self.common(), **own, **options})
            self.counts[mode] = count_written(documents, self.written[mode].texts, self.lag, self.capacity)
        return self.written[mode]

    def documents_of(self, mode: str) -> list[Document]:
        """What a mode writes; controls write more documents, and hard ones of their own."""
        return self.control_documents if mode in CHANCE_MODES else self.documents

    def _way(self, mode: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What writes a mode, and the options that make it one."""
        parallel: dict[str, Any] = calibrated_gate(self.model) if mode == "pdt_gate" else {"agreement_threshold": None}
        if mode in PARALLEL_MODES:
            parallel["interventions"] = PARALLEL_MODES[mode]()
        ways: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "independent": (write_parallel, {**parallel, "trunk_only": True}),
            "sequential": (write_sequential, {}),
            "sequential_again": (write_sequential, {"seed": self.arguments.eval_seed + OTHER_DRAWS}),
            "full_text": (write_full_text, {"block_size": self.model.config.block_size}),
            "pdt_gate_random": (write_random_gate, {}),
        }
        return ways.get(mode, (write_parallel, parallel))

    def comparable_modes(self) -> list[str]:
        """Those of [`ANSWER_MODES`] that can be written: without a threshold there is no commit gate."""
        gated = self.model.generation_config.agreement_threshold is not None
        return [mode for mode in ANSWER_MODES if gated or mode != "pdt_gate"]

    def calibration(self) -> dict[str, Any]:
        """
        Section `calibration`: thresholds from what the model writes for validation documents, and from nothing else.
        Hard ones have the same share there as among the documents that are judged by these thresholds.

        `coverage` and `agreement` are reports of [`calibrate`]; `agreement_planted` is the agreement head on planted
        contradictions in the same documents, at the same threshold. A head without the judgements that its rule needs
        has no report and keeps its threshold. Agreements are scaled first, by the blocks that repeat a fact that can
        be judged; `agreement` has the `agreement_scaling`.
        """
        if self._calibration is None:
            core, hard = self.arguments.calibration_kinds()
            logger.info("calibrating on %d core and %d hard validation documents", core, hard)
            documents = held_out_documents("validation", core, hard)
            written = self.writers(write_parallel, documents, agreement_threshold=None, **self.common())
            config = self.model.generation_config
            config.agreement_scaling = None
            own = self.score(block_scores.documents_from_texts(documents, written.texts))
            covered = Judgements.of(coverage_decisions(documents, written.texts, written.events), finds=True)
            stands = Judgements.of(block_scores.agreement_decisions(own), finds=False)
            agrees = block_scores.block_decisions(own, len(documents), lambda score: 1 - score.disagreement)
            judgeable = Judgements.of(agrees, finds=False)
            config.agreement_scaling = fit_scaling(judgeable)
            stands, judgeable = (scaled(some, config.agreement_scaling) for some in (stands, judgeable))
            self._calibration = {}
            for head, judgements, rule in (("agreement", stands, "false_alarms"), ("coverage", covered, "best_f1")):
                self._set_threshold(head, judgements, rule)
            if "agreement" in self._calibration:
                self._calibration["agreement"]["agreement_scaling"] = config.agreement_scaling
            if bool(judgeable.truth_N.any()):
                self._calibration["agreement_judgeable"] = calibrate(judgeable, "judgeable_false_alarms")
            planted = block_scores.agreement_decisions(self.score(documents, "corrupted"))
            threshold = config.agreement_threshold
            if planted and threshold is not None:
                self._calibration["agreement_planted"] = assess(Judgements.of(planted, finds=False), threshold)
        return self._calibration

    def adopt_calibration(self, calibration: dict[str, Any]) -> None:
        """Takes over the section `calibration` of an earlier call, thresholds included."""
        self._calibration = calibration
        for head in ("agreement", "coverage"):
            if head in calibration:
                setattr(self.model.generation_config, f"{head}_threshold", calibration[head]["threshold"]["mean"])
        self.model.generation_config.agreement_scaling = calibration.get("agreement", {}).get("agreement_scaling")

    def _set_threshold(self, head: str, judgements: Judgements, rule: str) -> None:
        config, name = self.model.generation_config, f"{head}_threshold"
        if not bool(judgements.truth_N.any()):
            # Both rules count true events: sound blocks, covered items.
            logger.warning("validation text has nothing to set %s by: it stays %s", name, getattr(config, name))
            return
        self._calibration[head] = calibrate(judgements, rule)
        setattr(config, name, self._calibration[head]["threshold"]["mean"])

    def common(self) -> dict[str, int]:
        """Options of every way of writing."""
        return {"batch_size": self.arguments.decode_batch, "seed": self.arguments.eval_seed}

    def recall(self) -> dict[str, Any]:
        """Sections `sibling_fact_recall`, `reference_classes`, `references_emitted`, `chance` and `plan`."""
        # Before anything is written: too few documents are told at once.
        pairs = list(zip(self.control_documents, twin_prompts(self.control_documents, self.tokenizer), strict=True))
        for mode in RECALL_MODES:
            self.write(mode)
        counts = {mode: self.counts[mode] for mode in RECALL_MODES}
        recall = {mode: rate_dict(reference_rate(found)) for mode, found in counts.items()}
        for mode in ("pdt", "sequential", "full_text"):
            for kind in ("core", "hard"):
                recall[f"{mode}_{kind}"] = rate_dict(
                    reference_rate(select_kind(self.documents, self.counts[mode], kind))
                )
            recall |= {f"{mode}_{kind}": rate for kind, rate in by_value(self.counts[mode]).items()}
        recall |= self._swapped(pairs)
        return {
            "sibling_fact_recall": recall,
            "reference_classes": {mode: reference_classes(found) for mode, found in counts.items()},
            "references_emitted": {
                mode: references_relative(found, counts["sequential"]) for mode, found in counts.items()
            },
            "chance": {"overall": mean_chance(self.counts["pdt"]), "by_cue": chance_by_cue(heldout_values=None)},
            "plan": self._adherence("pdt") | {mode: self._adherence(mode) for mode in ("independent", "sequential")},
        }

    def _adherence(self, mode: str) -> dict[str, Any]:
        """How far what a mode wrote follows the plan."""
        documents, counts = self.documents_of(mode), self.counts[mode]
        return {**plan_adherence(counts), "owned_stated_relative": stated_relative(documents, counts)}

    def _swapped(self, pairs: Sequence[tuple[Document, str]]) -> dict[str, Any]:
        logger.info("writing with swapped notes")
        own, other = self.writers(write_swapped, pairs, agreement_threshold=None, **self.common())
        return swapped_rates(self.control_documents, own.texts, other.texts, self.lag, self.capacity)

    def score(self, documents: Sequence[Document], view: str = "clean") -> list[block_scores.BlockScore]:
        """Blocks of documents, see [`score_blocks`]."""
        return block_scores.score_blocks(self.model, self.features, documents, view)

    def rollback(self) -> dict[str, Any]:
        """Section `rollback`: the calibrated gate, beside no gate, stale notes, and blocks chosen at random."""
        self.write("pdt")
        self.write("pdt_gate")
        self.write("pdt_gate_stale", **calibrated_gate(self.model), retry_policy="stale")
        rolled = rollback_counts(self.counts["pdt_gate"], self.written["pdt_gate"].events)
        self.write("pdt_gate_random", rate=rolled["blocks_rolled"] / max(1, rolled["blocks"]))
        names = {"none": "pdt", "head": "pdt_gate", "head_stale": "pdt_gate_stale", "random": "pdt_gate_random"}
        return {name: rollback_counts(self.counts[mode], self.written[mode].events) for name, mode in names.items()}

    def teacher_forced(self) -> dict[str, float]:
        """Section `teacher_forced`: the measures of `docs/metrics.md` with 0, 35 and 100 % true notes on the bus."""
        logger.info("measuring with the sections given")
        documents = held_out_documents(
            "test", self.arguments.core_documents, self.arguments.hard_documents, with_notes=True
        )
        collator = PDTDataCollator.from_config(self.model.config, self.tokenizer, with_corrupted=True)
        metrics = TeacherForcedMetrics(self.model, BUS_MIXES)
        for batch in batches(documents, 16):
            metrics.add(collator([self.features(document) for document in batch]))
        return metrics.compute(lambda sums: sums)

    def speed(self) -> dict[str, Any]:
        """
        Section `speed`: wall clock against one stream, and against plain batched decoding.

        Timed on one thread: with one prompt in the batch the work per call is too small to be shared, and waking a
        second thread for it costs more than it does.
        """
        logger.info("timing on one thread")
        documents, threads = self.documents[: self.arguments.speed_documents], torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return {
                "parallel_vs_single": parallel_vs_single(self.model, self.tokenizer, documents),
                "overhead_vs_shared_prefill": overhead_vs_shared_prefill(self.model, self.tokenizer, documents),
                "threads": torch.get_num_threads(),
            }
        finally:
            torch.set_num_threads(threads)

    def examples(self, count: int = 3) -> list[dict[str, Any]]:
        """Section `examples`: whole answers written with the gate on, token by token, with their events."""
        mode = "pdt_gate" if "pdt_gate" in self.written else "pdt"
        written = self.write(mode)
        answers = zip(
            *(self.documents, written.texts, written.results, written.events, self.counts[mode]), strict=True
        )
        return [describe_answer(*answer, self.tokenizer) for answer in islice(answers, count)]
