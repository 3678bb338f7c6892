"""Keeps batches whose loss is no number, or far above what is usual, from changing the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .arguments import check_whole
from .collator import PDTDataCollator
from .curriculum import check_range

logger = logging.get_logger(__name__)

USUAL_STEPS = 20
"""Steps of a stage after which its mean loss is known well enough to call another loss a spike."""

NEWEST_WEIGHT = 0.05
"""Weight of the newest loss in the running mean."""


class NamedBatches:
    """
    A collator whose batches also say which documents they hold: `document_ids`, and their `documents` where known.

    Args:
        collator ([`PDTDataCollator`]): Makes the batch.
    """

    def __init__(self, collator: PDTDataCollator) -> None:
        self.collator = collator

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch, `document_ids` (`list[str]`) and `documents` (`list[Document]`)."""
        names = [name for name in ("document_id", "document") if name in documents[0]]
        return {**self.collator(documents), **{f"{name}s": [one[name] for one in documents] for name in names}}


class LossGuard(TrainerCallback, ExportableState):
    """
    Judges every optimizer step by its loss and gradients, over all processes, before the weights change.

    A refused step changes neither weights nor moments of the optimizer; the schedule goes on. Counts and means are
    saved with each checkpoint, so a resumed run refuses the same steps. DeepSpeed has stepped before it can be asked,
    so there the first refused step ends the run.

    Args:
        limit (`int`, *optional*, defaults to 10): Steps of a run that may be skipped; one more ends it.
        spike_factor (`float`, *optional*): A loss of more than so many times the running mean of its stage is refused
            too, once the stage has had [`USUAL_STEPS`]; missing = every finite loss passes.

    `on_refusal` (`list[Callable[[int], None]]`) is called with the number of finished steps for every refused one, so
    that whatever else has followed the step can go back.
    """

    def __init__(self, limit: int = 10, spike_factor: float | None = None) -> None:
        check_whole("limit", limit, 0)
        if spike_factor is not None:
            check_range("spike_factor", spike_factor, 1.0, above=True)
        self.limit, self.spike_factor = limit, spike_factor
        self.stage, self.mean, self.usual = -1, 0.0, 0
        self.skipped: list[dict[str, Any]] = []
        self.on_refusal: list[Callable[[int], None]] = []
        self._losses: list[Tensor] = []
        self._documents: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        attributes = {"stage": self.stage, "mean": self.mean, "usual": self.usual, "skipped": list(self.skipped)}
        return {"args": {"limit": self.limit, "spike_factor": self.spike_factor}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up what the checkpoint holds; limits stay those of this run."""
        vars(self).update(state.stateful_callbacks[type(self).__name__]["attributes"])
        self._losses, self._documents = [], []

    def add(self, loss: Tensor, documents: Sequence[str]) -> None:
        """
        One micro-batch of the step.

        Args:
            loss (`Tensor`): Its share of the step's loss, detached, a scalar.
            documents (`Sequence[str]`): Ids of its documents.
        """
        self._losses.append(loss)
        self._documents += documents

    def accepts(self, step: int, stage: int, grad_norm: float | None, accelerator: Accelerator) -> bool:
        """
        Whether the step may change the weights; the same answer in every process.

        Args:
            step (`int`): Finished steps before it.
            stage (`int`): Index of its stage.
            grad_norm (`float`, *optional*): Norm of the reduced gradients.
            accelerator (`Accelerator`): Of the run; where it scales losses (fp16) infinite gradients are its business.

        Raises:
            RuntimeError: When more than `limit` steps were refused, naming the documents of the last one.
        """
        loss = float(accelerator.reduce(torch.stack(self._losses).sum(), "mean"))
        documents, self._losses, self._documents = self._documents, [], []
        if stage != self.stage:
            self.stage, self.mean, self.usual = stage, 0.0, 0
        reason = self._reason(loss, grad_norm if accelerator.scaler is None else None)
        if reason is None:
            self.mean = loss if self.usual == 0 else self.mean + NEWEST_WEIGHT * (loss - self.mean)
            self.usual += 1
            return True
        self.skipped.append({"step": step + 1, "reason": reason, "documents": gather_object(documents)})
        for undo in self.on_refusal:
            undo(step)
        self._report(can_skip=accelerator.distributed_type != DistributedType.DEEPSPEED)
        return False

    def _reason(self, loss: float, grad_norm: float | None) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the loss is {loss:.4g}, the norm of its gradient {grad_norm}"
        if self.spike_factor is not None and self.usual >= USUAL_STEPS and loss > self.spike_factor * self.mean:
            return (
                f"the loss is {loss:.4g}, more than spike_factor={self.spike_factor:g} times its mean {self.mean:.4g}"
            )
        return None

    def _report(self, can_skip: bool) -> None:
        last, count = self.skipped[-1], len(self.skipped)
        said = f"Step {last['step']}: {last['reason']}. Documents of its batch: {', '.join(last['documents'])}."
        if not can_skip:
            raise RuntimeError(f"{said} DeepSpeed cannot skip a step, so the run ends.")
        if count > self.limit:
            earlier = [entry["step"] for entry in self.skipped[:-1]]
            raise RuntimeError(f"{said} Steps {earlier} were skipped before, allowed: limit={self.limit}.")
        logger.warning(f"{said} The step is skipped, {count} of at most {self.limit}.")
