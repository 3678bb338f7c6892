"""PDTTrainer: trains the adapters of a [`PDTForParallelDecoding`] by stages; the trunk never gets a gradient."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, has_length

from modeling_pdt import PDTForParallelDecoding, PDTOutput
from modeling_pdt.adapter_files import load_adapter_weights
from modeling_pdt.hub_layout import copy_code

from .arguments import PDTTrainingArguments
from .balance import DistillationBalance
from .branches import run_branches
from .callbacks import ReportCallback, StageCallback, learns
from .checkpoints import (
    COMPLETE_FILE,
    check_resumable,
    clear_unfinished,
    completion_record,
    move_into_place,
    staging_folder,
)
from .collator import PDTDataCollator
from .curriculum import PARAMETER_GROUPS, Curriculum, Stage
from .evaluation_pass import TeacherForcedMetrics
from .gradient_norms import GradientNormLog
from .guard import LossGuard
from .losses import IGNORE_INDEX, LossReport, weighted_total
from .noise import NoiseDraw, draw_noise
from .objective import loss_parts
from .optimizer import SpectralNormCallback, group_settings, make_optimizer
from .own_text import OwnText
from .preconditions import check_data, check_given, check_model, check_own_text
from .recovery import RecoverableTrainer, check_layout
from .sharding import keep_gathered, shard_trunk
from .tap_cache import TapCache
from .teacher import EmaTeacher
from .telemetry import write_json


def step_generator(seed: int, step: int, micro_step: int, process: int) -> torch.Generator:
    """Randomness of one micro-batch, a function of its place in training, so that a resumed run draws the same."""
    mixed = ((seed * 1_000_003 + step) * 1009 + micro_step) * 65_537 + process
    return torch.Generator().manual_seed(mixed % (1 << 63))


class PDTTrainer(RecoverableTrainer):
    """
    `Trainer` for PDT adapters. A batch counts documents; all rows of a document stay in one batch.

    Args:
        model (`PDTForParallelDecoding`): Made with `from_trunk`, or loaded with `is_trainable=True`.
        args ([`PDTTrainingArguments`]): With `max_steps`.
        curriculum ([`Curriculum`]): Stages up to `max_steps`.
        data_collator ([`PDTDataCollator`], *optional*): Made from the model's configuration and `processing_class`
            when missing; the views that the stages need are switched on.
        guard ([`LossGuard`], *optional*): Which steps are skipped, and when too many are.
        kwargs: Of `Trainer`.
    """

    def __init__(
        self,
        model: PDTForParallelDecoding,
        args: PDTTrainingArguments,
        curriculum: Curriculum,
        data_collator: PDTDataCollator | None = None,
        guard: LossGuard | None = None,
        **kwargs: Any,
    ) -> None:
        if curriculum.max_steps != args.max_steps:
            raise ValueError(f"max_steps={args.max_steps}, allowed: that of the curriculum = {curriculum.max_steps}.")
        check_model(model, curriculum)
        check_given(kwargs)
        if data_collator is None:
            data_collator = PDTDataCollator.from_config(model.config, kwargs["processing_class"])
        # Planted contradictions are what evaluation measures the agreement head by.
        data_collator.with_corrupted |= any(stage.data != "clean" for stage in curriculum.stages)
        data_collator.with_variants |= any(stage.needs_variants for stage in curriculum.stages)
        data_collator.with_text_teacher |= args.teacher_kind == "text" and any(
            stage.is_active("kd") for stage in curriculum.stages
        )
        super().__init__(curriculum, guard, model=model, args=args, data_collator=data_collator, **kwargs)
        if self.is_fsdp_enabled:
            shard_trunk(model, self.accelerator)
            # Nothing that `Trainer` itself saves, loads or hands to the optimizer is sharded.
            self.is_fsdp_enabled = False
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.add_callback(StageCallback(curriculum, model))
        self.add_callback(ReportCallback(curriculum, model, self.guard))
        if model.peft.active_peft_config.spectral_norm is not None:
            self.add_callback(SpectralNormCallback(model))
        self.ema = EmaTeacher(model, args.teacher_ema_decay) if args.teacher_kind == "ema" else None
        if self.ema is not None:
            self.add_callback(self.ema)
        self.balance = DistillationBalance.of_run(args, curriculum)
        if self.balance is not None:
            self.guard.on_refusal.append(self.balance.undo)
        cache = args.lower_cache_dir
        self.tap_cache = TapCache(cache, model, str(self.accelerator.mixed_precision)) if cache else None
        check_data(args, curriculum, data_collator, self.train_dataset, self.eval_dataset)
        self.own_text = None
        if check_own_text(curriculum, self.train_dataset, self.accelerator):
            folder = Path(args.output_dir, "own_text")
            self.own_text = OwnText(folder, model, self.train_dataset.features, data_collator, args.seed)
        self._kept = [part for part in (self.ema, self.balance) if part is not None]
        every = args.log_gradient_norms
        self.gradient_norms = GradientNormLog(args.output_dir, every) if every else None
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._micro = (-1, 0)
        self._staging: str | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, PDTOutput]:
        """Weighted total of the stage's losses on one batch of documents."""
        stage = self.curriculum.stage_at(self.state.global_step)
        view = self._view(inputs, stage)
        generator = self._generator()
        noise = self._draw(view, generator)
        caches = self.tap_cache is not None and model.training and self.tap_cache.serves(stage)
        known = {**view, "tap": self.tap_cache.read(view)} if caches else view
        branches = run_branches(model, known, stage, noise, self.args, self.model.config, generator, self.ema)
        if caches and known["tap"] is None:
            self.tap_cache.write(view, branches.student.tap)
        parts = loss_parts(branches, view, stage, self.args)
        weights = self._weights(parts, stage)
        measures = self.gradient_norms is not None and model.training and self.is_world_process_zero()
        if measures and self.gradient_norms.is_due(*self._micro):
            self.gradient_norms.write(self._micro[0], stage.name, weights, parts, self.model.pdt_parameters())
        report = weighted_total(parts, weights)
        self._record(report)
        return (report.total, branches.student) if return_outputs else report.total

    def _view(self, inputs: dict[str, Any], stage: Stage) -> dict[str, Any]:
        """What the stage trains on of a batch."""
        if stage.data == "own":
            return self._prepare_inputs(self.own_text.batch(inputs["documents"], stage.name))
        return inputs["corrupted"] if stage.data == "corrupted" else inputs

    def _weights(self, parts: Mapping[str, Tensor], stage: Stage) -> Mapping[str, float]:
        """Weights of the stage's losses, after this micro-batch's measurement where the run balances distillation."""
        if self.balance is None or not self.balance.acts_in(stage):
            return stage.losses
        if self.balance.is_due(*self._micro):
            named = self.model.pdt_parameters().items()
            learning = [parameter for name, parameter in named if learns(name, stage)]
            norms = self.accelerator.reduce(self.balance.measure(parts, stage, learning), "mean")
            self.balance.update(norms, self._micro[0])
        return self.balance.weights(stage)

    def _generator(self) -> torch.Generator:
        step, micro = self._micro
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro = (self.state.global_step, micro)
        return step_generator(self.args.seed, self.state.global_step, micro, self.args.process_index)

    def _draw(self, view: Mapping[str, Tensor], generator: torch.Generator) -> NoiseDraw:
        stage = self.curriculum.stage_at(self.state.global_step)
        (documents, items), (rows, rounds) = view["item_ids"].shape[:2], view["block_exists"].shape
        return draw_noise(stage, documents, rows // documents, rounds, self.model.config.bus_lag, generator, items)

    def _record(self, report: LossReport) -> None:
        for name, part in report.parts.items():
            # What the guard refuses for not being a number has no place in a mean.
            total, count = self._sums.get(name, (torch.zeros_like(part), 0))
            self._sums[name] = (total + part.nan_to_num(0.0, 0.0, 0.0), count + part.isfinite())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss part since the last log, over all processes, as `loss_<name>`."""
        if "loss" in logs and self._sums:
            logs["stage"] = self.curriculum.index_at(max(0, self.state.global_step - 1))
            for name, (total, count) in self._sums.items():
                logs[f"loss_{name}"] = float(self.accelerator.reduce(total / count, "mean"))
            self._sums = {}
            logs |= self.balance.logs() if self.balance is not None else {}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See [`make_optimizer`]: `optim`, or `optimizer_cls_and_kwargs`, on param groups by component."""
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = make_optimizer(*chosen, self.model.pdt_parameters(), self.args)
            self.group_settings = group_settings(self.optimizer, chosen[1])
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Every stage runs the schedule of `lr_scheduler_type`, warm-up included, over its own steps."""
        if self.lr_scheduler is None:
            starts = self.curriculum.starts
            shapes = [
                self._shape(stage.until - start) for start, stage in zip(starts, self.curriculum.stages, strict=True)
            ]

            def factor(step: int) -> float:
                index = self.curriculum.index_at(min(step, self.curriculum.max_steps))
                return shapes[index](step - starts[index])

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _shape(self, steps: int) -> Callable[[int], float]:
        """Factor of the learning rate by step of a stage of `steps` steps."""
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate),
            num_warmup_steps=min(self.args.get_warmup_steps(steps), steps - 1),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type.value}, allowed: one that is a function of the step."
            )
        return scheduler.lr_lambdas[0]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Teacher-forced metrics on held-out documents, see [`TeacherForcedMetrics`]; nothing is generated.

        Batches may be filled up with documents that other batches hold (the last ones of several processes, those of a
        number of streams); these lose their labels and count nowhere.
        """
        if not has_length(dataloader):
            raise ValueError(f"{description}: the dataset has no length, allowed: one with __len__.")
        self.model.eval()
        metrics = TeacherForcedMetrics(self.model, self.args.eval_bus_mixes)
        for step, inputs in enumerate(dataloader):
            inputs = self._prepare_inputs(inputs)
            documents, rows = inputs["item_ids"].shape[0], inputs["labels"].shape[0]
            new_B = torch.tensor(self.new_documents(dataloader, step, documents))
            inputs["labels"][~new_B.repeat_interleave(rows // documents)] = IGNORE_INDEX
            with self.compute_loss_context_manager():
                metrics.add(inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        results = metrics.compute(lambda sums: self.accelerator.reduce(sums, "sum"))
        results = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=results, num_samples=self.num_examples(dataloader)
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the PDT parameters and configurations, and pushes them with `push_to_hub`; the trunk never moves."""
        parameters = self.model.pdt_parameters()
        self._save(output_dir, {f"peft.{name}": p.detach().cpu().clone() for name, p in parameters.items()})
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        adapter_config = self.model.peft.active_peft_config
        trained = {*adapter_config.trained_parts, *self.trained_groups()}
        adapter_config.trained_parts = [group for group in PARAMETER_GROUPS if group in trained]
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place, marks it complete, and moves it there in one step."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = staging_folder(run_dir, name)
        if self.args.should_save:
            clear_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._name_best(run_dir / name, staging / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_json(staging / name / COMPLETE_FILE, completion_record(staging / name, self.state.global_step))
            move_into_place(staging / name, run_dir / name)
            shutil.rmtree(staging)
            # An upload reads the folder later, in a thread.
            self.retention.apply(run_dir, self.state.best_global_step)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run_dir / name))
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        for part in self._kept if self.args.should_save else ():
            part.save(output_dir)
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # `Trainer` leaves the trunk out for a `PeftModel` alone; DeepSpeed keeps the second name of a tied weight.
        hook = self.model.register_state_dict_post_hook(_drop_trunk)
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        hook.remove()
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for part in self._kept if checkpoint is not None else ():
            part.load(checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository; refuses a model whose trunk nobody else could load."""
        trunk = self.model.config.trunk_name_or_path
        if trunk and os.path.isdir(trunk):
            raise ValueError(
                f"trunk_name_or_path={trunk!r} is a local folder, allowed for pushing: a Hub id. "
                "model.push_to_hub(repo_id, include_trunk=True) uploads a small trunk too."
            )
        super().init_hf_repo(token=token, private=private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint that has reached its place, with the adapter's folder and the code beside its files."""
        if self._staging is not None or not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy):
            folder, adapter = Path(self.args.output_dir), self.model.config.adapter_subfolder
            shutil.copytree(Path(checkpoint_folder, adapter), folder / adapter, dirs_exist_ok=True)
            copy_code(folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # `Trainer` would load strictly, and the files lack the trunk.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_deepspeed(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        head = self.model.get_output_embeddings()
        keep_gathered(self.model_wrapped, [*self.model.pdt_parameters().values(), *head.parameters()])
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_resumable(resume_from_checkpoint, self.args.max_steps)
        check_layout(resume_from_checkpoint, 0, self.args.world_size)
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load = self._load_deepspeed if self.is_deepspeed_enabled else self._load_adapter
        load(self.state.best_model_checkpoint)
        self._loaded_step = self.state.best_global_step

    def _load_deepspeed(self, folder: str) -> None:
        """Loads what learns, strictly, through DeepSpeed's own files, which hold nothing else."""
        check_resumable(folder, self.args.max_steps)
        check_layout(folder, self.model_wrapped.zero_optimization_stage(), self.args.world_size)
        file = Path(folder, self.model.config.adapter_subfolder, SAFETENSORS_WEIGHTS_NAME)
        with safe_open(file, framework="pt") as saved:
            differing = set(saved.keys()) ^ set(get_peft_model_state_dict(self.model.peft))
        if differing:
            raise ValueError(f"{file} and the model do not both have {sorted(differing)[0]}, allowed: equal adapters.")
        deepspeed_load_checkpoint(self.model_wrapped, folder, load_module_strict=False)
        self._load_trained_parts(folder)

    def _load_adapter(self, folder: str) -> None:
        config = self.model.config
        load_adapter_weights(self.model.peft, self.model.stack.active, folder, config.adapter_subfolder, {})
        self._load_trained_parts(folder)


def _drop_trunk(model: PDTForParallelDecoding, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in state.keys() - {f"{prefix}peft.{name}" for name in model.pdt_parameters()}:
        del state[name]
