"""The whole evaluation of one trained model on held-out worlds, section by section of `evaluation.json`."""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.interventions import RandomGate

from ..branches import build_rollout, build_targets
from ..calibration import Judgements, assess, calibrate
from ..collator import PDTDataCollator
from ..data.counting import DocumentCounts, bootstrap_rate, matching_chance, reference_rate
from ..data.schema import Document
from ..evaluation_pass import BUS_MIXES, TeacherForcedMetrics
from ..features import FeatureMaker, collect_values
from ..losses import supervised_positions
from ..nli import load_nli_scorer
from . import blocks as block_scores
from .arguments import EvaluationArguments
from .bars import CHANCE_MODES
from .benchmark import overhead_vs_shared_prefill, parallel_vs_single
from .consistency import NLI_MARGIN, judged_answers, nli_measures
from .documents import held_out_documents
from .examples import describe_answer
from .modes import (
    PARALLEL_MODES,
    Written,
    batches,
    twin_prompts,
    write_full_text,
    write_parallel,
    write_sequential,
    write_swapped,
)
from .scoring import (
    count_written,
    coverage_decisions,
    plan_adherence,
    rate_dict,
    reference_classes,
    rollback_counts,
    select_kind,
    stated_relative,
    swapped_rates,
)
from .writers import Writers

logger = logging.getLogger(__name__)

VALUE_DOCUMENTS = 1000
"""Training documents of each kind from which values for contradictions are collected."""

CHANCE_DOCUMENTS = 2000
"""Training documents of each kind on which chance is measured."""


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
        """Documents of a parallel mode with the commit gate off, written once."""
        if mode not in self.written:
            documents = self.control_documents if mode in CHANCE_MODES else self.documents
            logger.info("writing %d documents: %s", len(documents), mode)
            options = {"agreement_threshold": None, **options}
            self.keep(mode, self.writers(write_parallel, documents, **self.common(), **options), documents)
        return self.written[mode]

    def calibration(self) -> dict[str, Any]:
        """
        Section `calibration`: thresholds from what the model writes for validation documents, and from nothing else.

        `coverage` and `agreement` are reports of [`calibrate`]; `agreement_planted` is the agreement head on planted
        contradictions in the same documents, at the same threshold. A head without the judgements that its rule needs
        has no report and keeps its threshold.
        """
        if self._calibration is None:
            logger.info("calibrating on %d validation documents", self.arguments.calibration_documents)
            documents = held_out_documents("validation", self.arguments.calibration_documents, 0)
            written = self.writers(write_parallel, documents, agreement_threshold=None, **self.common())
            own = self.score(block_scores.documents_from_texts(documents, written.texts))
            covered = Judgements.of(coverage_decisions(documents, written.texts, written.events), finds=True)
            stands = Judgements.of(block_scores.agreement_decisions(own), finds=False)
            self._calibration = {}
            for head, judgements, rule in (("agreement", stands, "false_alarms"), ("coverage", covered, "best_f1")):
                self._set_threshold(head, judgements, rule)
            agrees = block_scores.block_decisions(own, len(documents), lambda score: 1 - score.disagreement)
            judgeable = Judgements.of(agrees, finds=False)
            if bool(judgeable.truth_N.any()):
                self._calibration["agreement_judgeable"] = calibrate(judgeable, "judgeable_false_alarms")
            planted = block_scores.agreement_decisions(self.score(documents, "corrupted"))
            threshold = self.model.generation_config.agreement_threshold
            if planted and threshold is not None:
                self._calibration["agreement_planted"] = assess(Judgements.of(planted, finds=False), threshold)
        return self._calibration

    def adopt_calibration(self, calibration: dict[str, Any]) -> None:
        """Takes over the section `calibration` of an earlier call, thresholds included."""
        self._calibration = calibration
        for head in ("agreement", "coverage"):
            if head in calibration:
                setattr(self.model.generation_config, f"{head}_threshold", calibration[head]["threshold"]["mean"])

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

    def keep(self, mode: str, written: Written, documents: Sequence[Document]) -> None:
        """Keeps what a mode wrote, and its counts."""
        self.written[mode] = written
        self.counts[mode] = count_written(documents, written.texts, self.lag, self.capacity)

    def recall(self) -> dict[str, Any]:
        """Sections `sibling_fact_recall`, `reference_classes`, `references_emitted`, `chance` and `plan`."""
        for mode, make in PARALLEL_MODES.items():
            self.write(mode, interventions=make())
        self.write("independent", trunk_only=True)
        logger.info("writing sequentially, and with full text shared")
        self.keep("sequential", self.writers(write_sequential, self.documents, **self.common()), self.documents)
        block_size = self.model.config.block_size
        shared = self.writers(write_full_text, self.documents, block_size=block_size, **self.common())
        self.keep("full_text", shared, self.documents)
        recall = {mode: rate_dict(reference_rate(counts)) for mode, counts in self.counts.items()}
        for mode in ("pdt", "sequential", "full_text"):
            for kind in ("core", "hard"):
                recall[f"{mode}_{kind}"] = rate_dict(
                    reference_rate(select_kind(self.documents, self.counts[mode], kind))
                )
        recall |= self._swapped()
        chance = matching_chance(held_out_documents("train", CHANCE_DOCUMENTS, CHANCE_DOCUMENTS))
        feasible = [r.cue for count in self.counts["pdt"] for r in count.select("feasible")]
        sequential = max(1e-9, self._references("sequential"))
        return {
            "sibling_fact_recall": recall,
            "reference_classes": {mode: reference_classes(counts) for mode, counts in self.counts.items()},
            "references_emitted": {mode: self._references(mode) / sequential for mode in self.counts},
            "chance": {
                "overall": sum(chance.get(cue, 0.0) for cue in feasible) / max(1, len(feasible)),
                "by_cue": chance,
            },
            "plan": {
                **plan_adherence(self.counts["pdt"]),
                "owned_stated_relative": stated_relative(self.documents, self.counts["pdt"]),
            },
        }

    def _references(self, mode: str) -> float:
        """Repeated facts per document."""
        return sum(len(count.select()) for count in self.counts[mode]) / len(self.counts[mode])

    def _swapped(self) -> dict[str, Any]:
        logger.info("writing with swapped notes")
        documents = self.control_documents
        pairs = list(zip(documents, twin_prompts(documents, self.tokenizer), strict=True))
        own, other = self.writers(write_swapped, pairs, agreement_threshold=None, **self.common())
        return swapped_rates(documents, own.texts, other.texts, self.lag, self.capacity)

    def score(self, documents: Sequence[Document], view: str = "clean") -> list[block_scores.BlockScore]:
        """Blocks of documents, see [`score_blocks`]."""
        return block_scores.score_blocks(self.model, self.features, documents, view)

    def rollback(self) -> dict[str, Any]:
        """Section `rollback`: the calibrated gate, beside no gate, stale notes, and blocks chosen at random."""
        threshold = self.model.generation_config.agreement_threshold
        self.write("pdt")
        self.write("pdt_gate", agreement_threshold=threshold)
        self.write("pdt_gate_stale", agreement_threshold=threshold, retry_policy="stale")
        rolled = rollback_counts(self.counts["pdt_gate"], self.written["pdt_gate"].events)
        chance = RandomGate(rolled["blocks_rolled"] / max(1, rolled["blocks"]), self.arguments.eval_seed)
        self.write("pdt_gate_random", agreement_threshold=0.5, interventions=[chance])
        names = {"none": "pdt", "head": "pdt_gate", "head_stale": "pdt_gate_stale", "random": "pdt_gate_random"}
        return {name: rollback_counts(self.counts[mode], self.written[mode].events) for name, mode in names.items()}

    def nli(self) -> dict[str, Any]:
        """Section `nli_violation`, or nothing without a scorer: [`nli_measures`] of [`judged_answers`]."""
        if self.nli_scorer is None:
            return {}
        texts = {mode: written.texts for mode, written in self.written.items()}
        answers = judged_answers(texts, self.documents, self.features)
        logger.info("judging contradictions between sections: %s", ", ".join(answers))
        measures = {name: nli_measures(self.nli_scorer, sections) for name, sections in answers.items()}
        return {"nli_violation": {"scorer": self.arguments.nli_scorer, "margin": NLI_MARGIN, **measures}}

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

    @torch.no_grad()
    def text(self) -> dict[str, Any]:
        """Section `text_ce`: cross-entropy and divergence from the trunk on tokens that are no sibling facts."""
        collator = PDTDataCollator.from_config(self.model.config, self.tokenizer)
        sums: list[list[float]] = []
        for batch in batches(self.documents, 16):
            inputs = collator([self.features(document) for document in batch])
            rollout = build_rollout(inputs, self.model.config)
            wanted = supervised_positions(inputs["labels"])
            out = self.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                position_ids=inputs["position_ids"],
                stream_ids=inputs["stream_ids"],
                rollout=rollout,
                logits_mask=wanted,
            )
            targets = build_targets(inputs, rollout, 1.0)
            other = ~targets.sibling_M
            log_pdt = out.logits.log_softmax(-1)[other]
            log_trunk = self.model(tap=out.tap, logits_mask=wanted).logits.log_softmax(-1)[other]
            tokens = targets.tokens_M[other, None]
            values = (
                *(-log.gather(1, tokens).squeeze(1) for log in (log_pdt, log_trunk)),
                (log_trunk.exp() * (log_trunk - log_pdt)).sum(-1),
                torch.ones(len(tokens)),
            )
            document_M = wanted.nonzero()[:, 0][other] // rollout.num_streams
            blank = torch.zeros(len(batch), dtype=torch.float64)
            sums += torch.stack([blank.index_add(0, document_M, v.double()) for v in values], dim=1).tolist()
        pdt, trunk, divergence, count = (sum(column) for column in zip(*sums, strict=True))
        return {
            "pdt": pdt / count,
            "trunk": trunk / count,
            "kl": divergence / count,
            "divergence": rate_dict(bootstrap_rate((kl, int(tokens)) for *_, kl, tokens in sums)),
            "excess": rate_dict(bootstrap_rate((mine - its, int(tokens)) for mine, its, _, tokens in sums)),
            "tokens": int(count),
        }

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
