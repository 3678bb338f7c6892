"""The part of the trainer that survives bad batches, lucky evaluations and runs that are already at their end."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from modeling_pdt.adapter_files import read_adapter_config

from .callbacks import settle_gradients
from .checkpoints import LastingCheckpointsCallback, Retention, smoothed
from .curriculum import PARAMETER_GROUPS, Curriculum
from .guard import LossGuard, NamedBatches
from .optimizer import restore_settings
from .sampler import StreamCountTrainer
from .sharding import average_gradients, is_trunk_sharded

logger = logging.get_logger(__name__)


def check_layout(checkpoint: str, stage: int, processes: int) -> None:
    """
    Refuses a checkpoint whose optimizer this run could not read.

    Args:
        checkpoint (`str`): Its folder.
        stage (`int`): DeepSpeed's ZeRO stage in this run; 0 = none.
        processes (`int`): Of this run; only ZeRO shards by them.

    Raises:
        ValueError: Naming what wrote it.
    """
    folder, whole = Path(checkpoint), "one process, DDP or FSDP2"
    shares = len(list(folder.glob("global_step*/*_optim_states.pt")))
    # ZeRO-1 writes the files of ZeRO-2.
    written = 3 if any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt")) else 2
    found = f"ZeRO-{written} on {shares} processes" if shares else whole
    run = f"ZeRO-{max(stage, 2)} on {processes} processes" if stage else whole
    if found != run:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} was written with {found}, allowed: one of a run with {run}. "
            "`PDTForParallelDecoding.from_pretrained(folder, is_trainable=True)` begins a new run with its weights."
        )


class RecoverableTrainer(StreamCountTrainer):
    """
    `Trainer` with a guard before each optimizer step, checkpoints that stay and bring no settings along, and a best
    one by a smoothed metric.

    Args:
        curriculum ([`Curriculum`]): The stages.
        guard ([`LossGuard`], *optional*): Which steps are skipped, and when too many are.
        kwargs: Of `Trainer`, `args` and `data_collator` among them.
    """

    def __init__(self, curriculum: Curriculum, guard: LossGuard | None = None, **kwargs: Any) -> None:
        args = kwargs["args"]
        if args.metric_for_best_model is not None and args.save_total_limit == 1:
            # `Trainer` itself would delete all but the best at the end.
            raise ValueError("save_total_limit=1, allowed with metric_for_best_model: None or at least 2.")
        super().__init__(**{**kwargs, "data_collator": NamedBatches(kwargs["data_collator"])})
        if args.log_gradient_norms is not None and is_trunk_sharded(self.accelerator):
            raise ValueError(f"log_gradient_norms={args.log_gradient_norms}, allowed with ZeRO-3 or FSDP2: none.")
        self.curriculum = curriculum
        self.retention = Retention.of_run(curriculum, args.save_total_limit)
        self.guard = LossGuard() if guard is None else guard
        # `None` where the caller brings an optimizer with settings of its own.
        self.group_settings: list[dict[str, Any]] | None = None
        self.add_callback(LastingCheckpointsCallback(self.retention))
        self.add_callback(self.guard)
        self._loaded_step: int | None = None

    def trained_groups(self) -> list[str]:
        """Parameter groups that have learnt in at least one step of those that made the weights."""
        # After `load_best_model_at_end` the weights are older than the run.
        steps = self.state.global_step if self._loaded_step is None else self._loaded_step
        stages = zip(self.curriculum.starts, self.curriculum.stages, strict=True)
        seen = {group for start, stage in stages if start < steps for group in stage.train}
        return [group for group in PARAMETER_GROUPS if group in seen]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.group_settings is not None:
            restore_settings(self.optimizer, self.lr_scheduler, self.group_settings)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, noted for the guard."""
        documents = inputs["document_ids"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        # DeepSpeed keeps gradients elsewhere, flat.
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            parameters = self.model.pdt_parameters()
            settle_gradients(parameters, self.curriculum.stage_at(self.state.global_step))
            if self.accelerator.is_fsdp2:
                average_gradients(parameter for parameter in parameters.values() if parameter.grad is not None)
        self.guard.add(loss, documents)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float | None:
        # The last call before the optimizer's step, and the one that knows the gradients of all processes.
        norm, step = super()._get_grad_norm(model, grad_norm), self.state.global_step
        value = None if norm is None else float(norm)
        if not self.guard.accepts(step, self.curriculum.index_at(step), value, self.accelerator):
            # An optimizer leaves a parameter without gradient, and its moments, as they are.
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the smoothed metric is the best so far; then its checkpoint is written at once."""
        name = self.args.metric_for_best_model
        if name is not None:
            key = name if name.startswith("eval_") else f"eval_{name}"
            values = [entry[key] for entry in self.state.log_history if key in entry]
            metrics = {**metrics, **({key: smoothed(values)} if values else {})}
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.save_strategy != "no"
        return is_best

    def _name_best(self, place: Path, written: Path) -> None:
        """Says of a checkpoint that is the best so far where it will be; `Trainer` has noted where it is written."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _load_trained_parts(self, folder: str) -> None:
        """Takes over what the checkpoint's weights have learnt."""
        saved = read_adapter_config(folder, self.model.config.adapter_subfolder, {})
        self.model.peft.active_peft_config.trained_parts = saved.trained_parts

    def _load_callback_state(self) -> None:
        # The guard takes up its own state; `Trainer` would put a copy in its place, which no step is judged by.
        stored, guard = self.state.stateful_callbacks, type(self.guard).__name__
        self.state.stateful_callbacks = {name: state for name, state in stored.items() if name != guard}
        super()._load_callback_state()
        self.state.stateful_callbacks = stored

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        self._loaded_step = None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks at `max_steps` after a step only, so it would add one to a run that has no step left.
        if self.state.global_step < self.args.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            logger.warning(f"The checkpoint is at max_steps={self.args.max_steps}: no step is left to train.")
            self.control.should_training_stop = True
