"""Teacher-forced metrics of a batch: do notes tell the repeated facts, and do they leave the rest alone?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeling_pdt import PDTForParallelDecoding, PDTOutput, Rollout
from modeling_pdt.gate import agreement_probability

from .branches import Targets, build_rollout, build_targets, reread, silence
from .collator import SOURCE_NEVER
from .losses import IGNORE_INDEX, redundancy, supervised_positions, supervised_values, token_ce, token_kl
from .notes_gap import notes_gap, sequential_notes

BUS_MIXES = (0.0, 0.35, 1.0)
"""Shares of true notes on the bus at which notes are measured; 0 is the bus of decoding."""

UNCALIBRATED = 0.5
"""Agreement threshold where none is set."""


class TeacherForcedMetrics:
    """
    Sums over batches of held-out documents.

    `sibling_*` count tokens of repeated facts that a visible note can have told, with the bus and, with `_ablated`,
    with nothing but the plan on it; `sibling_value_accuracy` counts whole values. `other_*` count tokens that no
    sibling decides: cross-entropy with the bus and of the trunk alone, and KL(trunk || model).

    With `bus_mixes` the measures of `docs/metrics.md` are added: those of the notes once per mix (suffix `_mix_` and
    the share, none for 0), those of the heads once. A measure that nothing was counted for is left out.

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model, in evaluation mode.
        bus_mixes (`Sequence[float]`, *optional*): Shares of true notes, 0 to 1, for example [`BUS_MIXES`].
        seed (`int`, *optional*, defaults to 0): Of the draws which notes are true ones.
    """

    def __init__(self, model: PDTForParallelDecoding, bus_mixes: Sequence[float] = (), seed: int = 0) -> None:
        wrong = [mix for mix in bus_mixes if not 0 <= mix <= 1]
        if wrong:
            raise ValueError(f"bus_mixes holds {wrong[0]}, allowed: shares in [0, 1].")
        self.model, self.bus_mixes = model, tuple(bus_mixes)
        self.generator = torch.Generator().manual_seed(seed)
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Any]) -> None:
        """Scores one batch from the collator."""
        model, config = self.model, self.model.config
        rollout = replace(build_rollout(inputs, config), wants_coverage=bool(self.bus_mixes))
        targets = build_targets(inputs, rollout, 1.0)
        positions = supervised_positions(inputs["labels"])
        student = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            stream_ids=inputs["stream_ids"],
            rollout=rollout,
            logits_mask=positions,
        )
        ablated_MV = reread(model, inputs, student.tap, silence(rollout))
        trunk_MV = model(tap=student.tap, logits_mask=positions).logits
        feasible, other = targets.feasible_M, ~targets.sibling_M
        values = _facts(inputs)[feasible]
        for name, logits in (("", student.logits), ("_ablated", ablated_MV)):
            right = (logits.argmax(dim=-1) == targets.tokens_M)[feasible]
            self._add(f"sibling_ce{name}", token_ce(logits, targets.tokens_M)[feasible])
            self._add(f"sibling_accuracy{name}", right)
            self._add(f"sibling_value_accuracy{name}", _all_by_group(right, values))
        self._add("other_ce", token_ce(student.logits, targets.tokens_M)[other])
        self._add("other_ce_trunk", token_ce(trunk_MV, targets.tokens_M)[other])
        self._add("other_kl_trunk", token_kl(student.logits, trunk_MV)[other])
        if self.bus_mixes:
            self._add_mixes(inputs, rollout, targets, student, ablated_MV)
            self._add_heads(inputs, student.coverage_logits)
            self._add_redundancy(inputs, rollout, student.speculation)
            if model.config.writer_tap == "top":
                self._add_notes_gap(inputs, rollout, student)

    def _add_mixes(
        self, inputs: Mapping[str, Any], rollout: Rollout, targets: Targets, student: PDTOutput, ablated_MV: Tensor
    ) -> None:
        """What notes do, with a growing share of true ones among them; the same draws for every share."""
        told_RV = inputs["note_mask"].any(dim=2)
        uniform_RV = torch.rand(told_RV.shape, generator=self.generator).to(told_RV.device)
        truth = replace(
            rollout, note_ids_RVL=inputs["note_ids"], note_mask_RVL=inputs["note_mask"], teacher_RV=told_RV
        )

        def read(changed: Rollout) -> Tensor:
            return reread(self.model, inputs, student.tap, changed)

        teacher_MV = read(truth)
        rewritten_MV = read(replace(truth, lag_R1=torch.zeros_like(truth.lag_R1)))
        round_RT = inputs["write_round"].clamp(min=0)
        commit_RT = inputs["judgeable"].gather(1, round_RT)
        taught_RT = told_RV.any(dim=1, keepdim=True).expand_as(round_RT)
        commit, taught = (supervised_values(mask, inputs["labels"]) for mask in (commit_RT, taught_RT))
        known = taught & (targets.feasible_M | ~targets.sibling_M)
        values = _facts(inputs)[targets.feasible_M]
        for mix in self.bus_mixes:
            mixed = replace(truth, teacher_RV=told_RV & (uniform_RV < mix))
            logits_MV = student.logits if mix == 0 else teacher_MV if mix == 1 else read(mixed)
            stale_MV = read(replace(mixed, lag_R1=rollout.lag_R1 + 1))
            at, ce = mix_suffix(mix), token_ce(logits_MV, targets.tokens_M)
            if mix > 0:
                right = (logits_MV.argmax(dim=-1) == targets.tokens_M)[targets.feasible_M]
                self._add(f"sibling_ce{at}", ce[targets.feasible_M])
                self._add(f"sibling_value_accuracy{at}", _all_by_group(right, values))
            self._add(f"mask_ablation{at}", (token_ce(ablated_MV, targets.tokens_M) - ce)[targets.feasible_M])
            self._add(f"kd{at}", token_kl(logits_MV, teacher_MV)[known])
            self._add(f"kd_ce{at}", ce[known])
            self._add(f"rollback_kl{at}", token_kl(logits_MV, rewritten_MV)[commit & taught])
            self._add(f"repair_error_rate{at}", _differs(logits_MV, rewritten_MV)[commit & taught])
            symmetric = (token_kl(logits_MV, stale_MV) + token_kl(stale_MV, logits_MV)) / 2
            self._add(f"stability_kl{at}", symmetric[~commit])
            self._add(f"stability_error_rate{at}", _differs(logits_MV, stale_MV)[~commit])

    def _add_heads(self, inputs: Mapping[str, Any], coverage_RVP: Tensor | None) -> None:
        """Both heads at their thresholds: coverage of own items, agreement where contradictions are planted."""
        config = self.model.generation_config
        counted_R = (inputs["labels"] != IGNORE_INDEX).any(dim=1)
        if coverage_RVP is not None:
            found = coverage_RVP.sigmoid() >= config.coverage_threshold
            self._add_found(
                "coverage", found, inputs["coverage_targets"], inputs["coverage_mask"] & counted_R[:, None, None]
            )
        if "corrupted" in inputs:
            view = inputs["corrupted"]
            rollout = replace(build_rollout(view, self.model.config), wants_agreement=True)
            out = self.model(
                input_ids=view["input_ids"],
                attention_mask=view["attention_mask"],
                position_ids=view["position_ids"],
                stream_ids=view["stream_ids"],
                rollout=rollout,
                heads_only=True,
            )
            threshold = UNCALIBRATED if config.agreement_threshold is None else config.agreement_threshold
            found = agreement_probability(out.agreement_logits, config.agreement_scaling) < threshold
            judged = view["judgeable"] & counted_R[:, None]
            self._add_found("agreement", found, view["contradicts"], judged)
            self._add("agreement_accuracy", (found == view["contradicts"])[judged])

    def _add_redundancy(self, inputs: Mapping[str, Tensor], rollout: Rollout, notes_RVKN: Tensor) -> None:
        """How alike siblings' notes of one round are, weighted by the number of pairs."""
        counted_R = (inputs["labels"] != IGNORE_INDEX).any(dim=1)
        mask_RV = inputs["block_exists"] & counted_R[:, None]
        shape = (-1, rollout.num_streams, mask_RV.shape[1])
        notes_BVSN = notes_RVKN.mean(dim=2).unflatten(0, shape[:2]).transpose(1, 2)
        mask_BVS = mask_RV.view(shape).transpose(1, 2)
        written_BV = mask_BVS.sum(dim=2)
        pairs = (written_BV * (written_BV - 1) // 2).sum().double()
        entry = torch.stack([redundancy(notes_BVSN, mask_BVS).double() * pairs, pairs])
        self.sums["redundancy"] = self.sums.get("redundancy", torch.zeros_like(entry)) + entry

    def _add_notes_gap(self, inputs: Mapping[str, Tensor], rollout: Rollout, student: PDTOutput) -> None:
        """How far notes of blocks that read others' notes are from those that decoding writes of the same text."""
        sequential = sequential_notes(self.model.stack, student.tap, rollout, inputs["stream_ids"])
        exists_RV = inputs["block_exists"] & (inputs["labels"] != IGNORE_INDEX).any(dim=1, keepdim=True)
        reads_V = torch.arange(exists_RV.shape[1], device=exists_RV.device) >= self.model.config.bus_lag
        self._add("notes_gap", notes_gap(student.speculation, sequential)[exists_RV & reads_V])

    def _add_found(self, name: str, found: Tensor, wanted: Tensor, counted: Tensor) -> None:
        found, wanted = found & counted, wanted.bool() & counted
        self._add(f"{name}_precision", wanted[found])
        self._add(f"{name}_recall", found[wanted])

    def compute(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """
        Means over everything added, after `reduce` has summed over processes; counts as `n_sibling`, `n_other`.
        What nothing was counted for is left out.
        """
        totals = {name: reduce(sums) for name, sums in self.sums.items()}
        results = {name: float(total[0] / total[1]) for name, total in totals.items() if total[1]}
        results["loss"] = results.get("other_ce", 0.0) + results.get("sibling_ce", 0.0)
        if self.bus_mixes:
            results = _derived(results)
        results["n_sibling"] = int(totals["sibling_ce"][1])
        results["n_other"] = int(totals["other_ce"][1])
        return results

    def _add(self, name: str, values: Tensor) -> None:
        entry = torch.stack([values.double().sum(), torch.full_like(values.double().sum(), values.numel())])
        self.sums[name] = self.sums.get(name, torch.zeros_like(entry)) + entry


def _facts(inputs: Mapping[str, Tensor]) -> Tensor:
    """
    Number of the repeated fact `[M]` that each supervised token belongs to, unique in the batch. What an owner
    repeats is told apart by the round that it was told in.
    """
    reference = inputs["reference"]
    rows = torch.arange(reference.shape[0], device=reference.device)[:, None]
    fact_RT = rows * (int(reference.max()) + 2) + reference
    return supervised_values(fact_RT * (SOURCE_NEVER + 2) + inputs["source_round"], inputs["labels"])


def _all_by_group(right_M: Tensor, group_M: Tensor) -> Tensor:
    """Per group of tokens: are all of them right?"""
    _, index = group_M.unique(return_inverse=True)
    count = int(index.max()) + 1 if index.numel() else 0
    wrong = torch.zeros(count, device=right_M.device).index_add_(0, index, (~right_M).float())
    return wrong == 0


def mix_suffix(mix: float) -> str:
    """What is added to the name of a measure that was taken with a share of true notes."""
    return f"_mix_{mix:g}" if mix else ""


def _differs(logits_MV: Tensor, others_MV: Tensor) -> Tensor:
    return logits_MV.argmax(dim=-1) != others_MV.argmax(dim=-1)


def _derived(results: dict[str, float]) -> dict[str, float]:
    """`kd_ce_ratio` in the place of its two parts, and F1 beside precision and recall."""
    kept = {name: value for name, value in results.items() if not name.startswith("kd")}
    for name, value in results.items():
        if name.startswith("kd_ce"):
            kept[name.replace("kd_ce", "kd_ce_ratio")] = results[name.replace("kd_ce", "kd")] / max(value, 1e-12)
    for head in ("coverage", "agreement"):
        precision, recall = results.get(f"{head}_precision"), results.get(f"{head}_recall")
        if precision is not None and recall is not None:
            kept[f"{head}_f1"] = 2 * precision * recall / max(precision + recall, 1e-12)
    return kept
