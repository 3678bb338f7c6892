"""Teacher-forced metrics of a batch: do notes tell the repeated facts, and do they leave the rest alone?"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from modeling_pdt import PDTForParallelDecoding

from .branches import build_rollout, build_targets, reread, silence
from .losses import supervised_positions, supervised_values, token_ce, token_kl


class TeacherForcedMetrics:
    """
    Sums over batches of held-out documents.

    `sibling_*` count tokens of repeated facts that a visible note can have told, with the bus and, with `_ablated`,
    with nothing but the plan on it; `sibling_value_accuracy` counts whole values. `other_*` count tokens that no
    sibling decides: cross-entropy with the bus and of the trunk alone, and KL(trunk || model).

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model, in evaluation mode.
    """

    def __init__(self, model: PDTForParallelDecoding) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Any]) -> None:
        """Scores one batch from the collator."""
        model, config = self.model, self.model.config
        rollout = build_rollout(inputs, config)
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
        values = self._values(inputs)[feasible]
        for name, logits in (("", student.logits), ("_ablated", ablated_MV)):
            right = (logits.argmax(dim=-1) == targets.tokens_M)[feasible]
            self._add(f"sibling_ce{name}", token_ce(logits, targets.tokens_M)[feasible])
            self._add(f"sibling_accuracy{name}", right)
            self._add(f"sibling_value_accuracy{name}", _all_by_group(right, values))
        self._add("other_ce", token_ce(student.logits, targets.tokens_M)[other])
        self._add("other_ce_trunk", token_ce(trunk_MV, targets.tokens_M)[other])
        self._add("other_kl_trunk", token_kl(student.logits, trunk_MV)[other])

    def compute(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over everything added, after `reduce` has summed over processes; counts as `n_sibling`, `n_other`."""
        totals = {name: reduce(sums) for name, sums in self.sums.items()}
        results = {name: float(total[0] / total[1].clamp(min=1)) for name, total in totals.items()}
        results["loss"] = results["other_ce"] + results["sibling_ce"]
        results["n_sibling"] = int(totals["sibling_ce"][1])
        results["n_other"] = int(totals["other_ce"][1])
        return results

    def _values(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Number of the repeated fact `[M]` that each supervised token belongs to, unique in the batch."""
        reference = inputs["reference"]
        rows = torch.arange(reference.shape[0], device=reference.device)[:, None]
        return supervised_values(rows * (int(reference.max()) + 2) + reference, inputs["labels"])

    def _add(self, name: str, values: Tensor) -> None:
        entry = torch.stack([values.double().sum(), torch.full_like(values.double().sum(), values.numel())])
        self.sums[name] = self.sums.get(name, torch.zeros_like(entry)) + entry


def _all_by_group(right_M: Tensor, group_M: Tensor) -> Tensor:
    """Per group of tokens: are all of them right?"""
    _, index = group_M.unique(return_inverse=True)
    count = int(index.max()) + 1 if index.numel() else 0
    wrong = torch.zeros(count, device=right_M.device).index_add_(0, index, (~right_M).float())
    return wrong == 0
