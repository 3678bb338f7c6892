"""Arguments of a training recipe. Names are flat and unique across all argument and config classes.

What changes from stage to stage (losses, noise, bus mix, lag jitter) belongs to the stages; what the network is
belongs to `PDTAdapterConfig` and `PDTConfig`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import TrainingArguments

from .curriculum import Curriculum, check_choice, check_range

TEACHER_KINDS = ("notes", "ema", "text", "trunk")
NOT_HERE = {
    "remove_unused_columns": ((False,), "the collator needs every column"),
    "label_smoothing_factor": ((0.0,), "losses are the stages' own"),
    "torch_compile": ((False,), "layers are called one by one and change between calls"),
    "train_sampling_strategy": (("random", "sequential"), "a batch counts documents, whose rows differ in length"),
    "enable_jit_checkpoint": (
        (False,),
        "it writes within a step, and a kill may leave parts: save_steps says how many steps a kill costs",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        ((False,), "evaluation runs as training does: bf16, or trunk_dtype of the recipe, says in which precision"),
    ),
}
"""Fields of `TrainingArguments` that cannot do here what they say, by the values that ask for nothing of it."""


@dataclass
class PDTTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with what a PDT run adds. Steps are optimizer steps; `max_steps` is required by the curriculum.

    Args:
        gate_lr_scale (`float`, *optional*, defaults to 10.0): Learning rate of the SNC gates relative to the rest.
        sibling_weight (`float`, *optional*, defaults to 5.0): Weight of sibling-fact tokens in `lm_ce`, `kd`, `notes`.
        other_weight (`float`, *optional*, defaults to 1.0): Weight of all other tokens in `lm_ce` and `notes`. 0:
            adapters learn from repeated facts alone, `keep_close` holds the rest; else they also learn which words
            their training documents choose, and state others less.
        teacher_kind (`str`, *optional*, defaults to `"notes"`): Target of `kd`: the branch with true notes and live
            weights (`"notes"`) or their moving average (`"ema"`; aim of `kd_plan`, `spec` and `spec_kl` too), the
            trunk that reads the siblings' text (`"text"`), or the trunk alone (`"trunk"`, not on repeated facts).
        teacher_ema_decay (`float`, *optional*, defaults to 0.99): Share of the average that an optimizer step leaves,
            with `teacher_kind="ema"`.
        kd_temperature (`float`, *optional*, defaults to 1.0): Temperature of `kd` and `stab`.
        kd_plan_temperature (`float`, *optional*, defaults to 1.0): Temperature of `kd_plan`.
        kd_top_k (`int`, *optional*, defaults to 0): Tokens kept per position of what `kd`, `keep_close` and `stab`
            compare with, the rest as one bucket; 0 = all.
        logits_chunk (`int`, *optional*, defaults to 0): Supervised tokens whose logits exist at the same time in the
            passes that learn; they are made again for the gradient. 0 = all. `plan_snapshot`, and `kd`, `keep_close`
            and `stab` with `kd_top_k=0`, keep those that they compare with.
        kd_balance_target (`float`, *optional*): Ratio of the gradient norms of `kd` and `lm_ce` to which the weight
            of `kd` is steered; missing = the weight stays as it is. Not with DeepSpeed.
        kd_balance_rate (`float`, *optional*, defaults to 0.05): How fast, per measurement.
        kd_balance_every (`int`, *optional*, defaults to 10): Optimizer steps from one measurement to the next.
        spec_kl_temperature (`float`, *optional*, defaults to 1.0): Temperature of `spec_kl`.
        usage_margin (`float`, *optional*, defaults to 0.5): Nats by which notes have to help in `use`.
        usage_sensitivity (`float`, *optional*): Nats by which true notes have to help the teacher with a token for
            `use` to count it; missing = repeated facts that a visible note can have told.
        redundancy_threshold (`float`, *optional*, defaults to 0.7): Cosine of siblings' notes that `red` allows.
        block_start_tokens (`int`, *optional*, defaults to 2): Tokens per block that `block_start` counts.
        coverage_pos_weight (`float`, *optional*, defaults to 1.0): Weight of stated items in `cov`.
        agreement_margin (`float`, *optional*, defaults to 1.0): Nats by which fresher notes have to help with a block
            for `agreement_labels: auto` to refuse it.
        corruption_rate (`float`, *optional*, defaults to 0.5): Share of sibling references that the corrupted view of
            the data replaces by another value of the same type.
        eval_bus_mixes (`list[float]`, *optional*): Shares of true notes on the bus at which evaluation takes the
            measures of `docs/metrics.md`, for example 0, 0.35 and 1; missing = only the first table's.
        log_gradient_norms (`int`, *optional*): Optimizer steps from one line of gradient norms per loss to the next,
            see `trainer_pdt.gradient_norms`; missing = none.
        skip_limit (`int`, *optional*, defaults to 10): Steps of a run that the loss guard may skip; one more ends it.
        spike_factor (`float`, *optional*): A loss of more than so many times the mean of its stage is skipped too,
            above 1; missing = every finite loss passes.
        lower_cache_dir (`str`, *optional*): Folder in which stages that train heads alone keep the states of the lower
            trunk, so that a document seen again need not run through it; missing = none. Not with ZeRO-3 or FSDP2.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): Start anew in a folder that holds a run; its
            checkpoints are deleted.
    """

    gate_lr_scale: float = field(default=10.0, metadata={"help": "Learning rate of the gates over the rest's."})
    sibling_weight: float = field(default=5.0, metadata={"help": "Weight of sibling-fact tokens in token losses."})
    other_weight: float = field(default=1.0, metadata={"help": "Weight of all other tokens in lm_ce and notes."})
    teacher_kind: str = field(
        default="notes",
        metadata={"help": "Target of kd: true notes, averaged weights, text, or trunk.", "choices": TEACHER_KINDS},
    )
    teacher_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the averaged weights per step."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Temperature of kd and stab."})
    kd_plan_temperature: float = field(default=1.0, metadata={"help": "Temperature of kd_plan."})
    kd_top_k: int = field(default=0, metadata={"help": "Teacher tokens kept per position; 0 keeps all."})
    logits_chunk: int = field(default=0, metadata={"help": "Tokens whose logits exist at the same time; 0 = all."})
    kd_balance_target: float | None = field(
        default=None, metadata={"help": "Ratio of the gradient norms of kd and lm_ce to steer the weight of kd to."}
    )
    kd_balance_rate: float = field(default=0.05, metadata={"help": "Speed of the balance per measurement."})
    kd_balance_every: int = field(default=10, metadata={"help": "Optimizer steps between measurements."})
    spec_kl_temperature: float = field(default=1.0, metadata={"help": "Temperature of spec_kl."})
    usage_margin: float = field(default=0.5, metadata={"help": "Nats by which notes have to help in use."})
    usage_sensitivity: float | None = field(
        default=None, metadata={"help": "Nats by which true notes have to help the teacher for use to count a token."}
    )
    redundancy_threshold: float = field(default=0.7, metadata={"help": "Cosine of siblings' notes that red allows."})
    block_start_tokens: int = field(default=2, metadata={"help": "Tokens per block that block_start counts."})
    coverage_pos_weight: float = field(default=1.0, metadata={"help": "Weight of stated items in cov."})
    agreement_margin: float = field(default=1.0, metadata={"help": "Nats of help from fresh notes to refuse a block."})
    corruption_rate: float = field(default=0.5, metadata={"help": "Share of references replaced in corrupted rows."})
    eval_bus_mixes: list[float] = field(
        default_factory=list, metadata={"help": "Shares of true notes at which evaluation measures notes and heads."}
    )
    log_gradient_norms: int | None = field(
        default=None, metadata={"help": "Optimizer steps between lines of gradient norms per loss."}
    )
    skip_limit: int = field(default=10, metadata={"help": "Steps that the loss guard may skip."})
    spike_factor: float | None = field(
        default=None, metadata={"help": "Loss over the mean of its stage from which a step is skipped."}
    )
    lower_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for states of the lower trunk in stages that train heads alone."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew; deletes earlier checkpoints."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has to stay False: the collator reads columns that forward does not name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "gate_lr_scale",
            "sibling_weight",
            "kd_temperature",
            "kd_plan_temperature",
            "kd_balance_rate",
            "spec_kl_temperature",
            "coverage_pos_weight",
        ):
            check_range(name, getattr(self, name), 0.0, above=True)
        check_range("other_weight", self.other_weight, 0.0)
        check_range("usage_margin", self.usage_margin, 0.0)
        check_range("agreement_margin", self.agreement_margin, 0.0)
        check_range("redundancy_threshold", self.redundancy_threshold, -1.0, 1.0)
        if self.kd_balance_target is not None:
            check_range("kd_balance_target", self.kd_balance_target, 0.0, above=True)
        check_whole("kd_balance_every", self.kd_balance_every, 1)
        if self.usage_sensitivity is not None:
            check_range("usage_sensitivity", self.usage_sensitivity, 0.0)
        check_range("teacher_ema_decay", self.teacher_ema_decay, 0.0, math.nextafter(1.0, 0.0))
        check_range("corruption_rate", self.corruption_rate, 0.0, 1.0)
        for share in self.eval_bus_mixes:
            check_range("eval_bus_mixes", share, 0.0, 1.0)
        if self.log_gradient_norms is not None:
            check_whole("log_gradient_norms", self.log_gradient_norms, 1)
        check_whole("skip_limit", self.skip_limit, 0)
        if self.spike_factor is not None:
            check_range("spike_factor", self.spike_factor, 1.0, above=True)
        check_whole("kd_top_k", self.kd_top_k, 0)
        check_whole("logits_chunk", self.logits_chunk, 0)
        check_whole("block_start_tokens", self.block_start_tokens, 1)
        check_choice("teacher_kind", self.teacher_kind, TEACHER_KINDS)
        for name, (allowed, reason) in NOT_HERE.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: {choices}, {reason}.")
        if self.accelerator_config.split_batches:
            raise ValueError(
                "accelerator_config.split_batches=True, allowed: False, per_device_train_batch_size and "
                "per_device_eval_batch_size count documents per process."
            )


@dataclass
class ModelArguments:
    """
    The trunk, the block protocol and the machine; what shapes parameters belongs to `PDTAdapterConfig`.

    Args:
        trunk (`str`): Folder or Hub id of the trunk; a folder may be relative to the repository.
        trunk_revision (`str`, *optional*): Branch, tag or commit of a trunk on the Hub; missing = its main branch. The
            commit that was loaded is saved with the model.
        trunk_dtype (`str`, *optional*, defaults to `"float32"`): Of the frozen trunk, an MXFP4 one dequantised; PDT
            parameters are float32.
        experts_implementation (`str`, *optional*): How the trunk's experts are computed.
        block_size (`int`, *optional*, defaults to 12), bus_lag (`int`, *optional*, defaults to 1), bus_capacity
            (`int`, *optional*, defaults to 16), plan_on_bus (`bool`, *optional*, defaults to `True`): Of the model's
            `PDTConfig`, which checks them.
        threads (`int`, *optional*): CPU threads of a process; missing = torch's choice.
    """

    trunk: str = field(metadata={"help": "Folder or Hub id of the trunk; may be relative to the repository."})
    trunk_revision: str | None = field(default=None, metadata={"help": "Of a trunk on the Hub; missing = its newest."})
    trunk_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of the frozen trunk."})
    experts_implementation: str | None = field(default=None, metadata={"help": "Of the trunk's experts."})
    block_size: int = field(default=12, metadata={"help": "Tokens of a block."})
    bus_lag: int = field(default=1, metadata={"help": "Rounds until siblings see a note."})
    bus_capacity: int = field(default=16, metadata={"help": "Rounds that stay readable."})
    plan_on_bus: bool = field(default=True, metadata={"help": "Plan items are readable as snapshot 0."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: torch's choice."})

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_whole("threads", self.threads, 1)

    @property
    def protocol(self) -> dict[str, Any]:
        """The block protocol, as `PDTForParallelDecoding.from_trunk` takes it."""
        return {name: getattr(self, name) for name in ("block_size", "bus_lag", "bus_capacity", "plan_on_bus")}


@dataclass
class DataArguments:
    """
    Documents to train on: a published dataset, or procedural worlds made while training.

    Args:
        dataset_path (`str`, *optional*): Folder or Hub id of a published dataset; missing = procedural worlds.
        train_documents (`int`, *optional*, defaults to 4000): Documents of the training split.
        eval_documents (`int`, *optional*, defaults to 200): Documents of the validation split.
        document_streams (`int`, *optional*): Sections per procedural document, 2 to 6; missing = as many as the model
            has streams, and never fewer.
        hard_fraction (`float`, *optional*): Share of procedural training documents with several facts of one type;
            0 when missing.
        foreign_fraction (`float`, *optional*): Share of procedural training documents whose facts have values of any
            type, so that only the cue tells which is meant; 0 when missing. Best with `other_weight: 0`, which keeps
            sections from stating such values themselves.
        max_row_tokens (`int`, *optional*, defaults to 512): Longest row; a longer one is an error, never cut.
        feature_workers (`int`, *optional*, defaults to 1): Processes that make the features of a published dataset,
            which `datasets` keeps by fingerprint for the next run.
    """

    dataset_path: str | None = field(default=None, metadata={"help": "Published dataset; missing = worlds."})
    train_documents: int = field(default=4000, metadata={"help": "Documents of the training split."})
    eval_documents: int = field(default=200, metadata={"help": "Documents of the validation split."})
    document_streams: int | None = field(
        default=None, metadata={"help": "Sections per procedural document, 2 to 6; missing = num_streams."}
    )
    hard_fraction: float | None = field(
        default=None, metadata={"help": "Share of procedural documents with several facts of one type."}
    )
    foreign_fraction: float | None = field(
        default=None, metadata={"help": "Share of procedural training documents with values of any type."}
    )
    max_row_tokens: int = field(default=512, metadata={"help": "Longest row; a longer one is an error."})
    feature_workers: int = field(default=1, metadata={"help": "Processes that make features of a published dataset."})

    def __post_init__(self) -> None:
        check_whole("feature_workers", self.feature_workers, 1)
        check_whole("train_documents", self.train_documents, 1)
        check_whole("eval_documents", self.eval_documents, 1)
        check_whole("max_row_tokens", self.max_row_tokens, 2)
        for name, default in (("document_streams", None), ("hard_fraction", 0.0), ("foreign_fraction", 0.0)):
            value = getattr(self, name)
            if self.dataset_path is None:
                setattr(self, name, default if value is None else value)
            elif value is not None:
                raise ValueError(
                    f"{name}={value!r}, allowed with dataset_path={self.dataset_path!r}: none (null in YAML), it "
                    "belongs to procedural worlds."
                )
        if self.dataset_path is None:
            if self.document_streams is not None:
                check_whole("document_streams", self.document_streams, 2, 6)
            check_range("hard_fraction", self.hard_fraction, 0.0, 1.0)
            check_range("foreign_fraction", self.foreign_fraction, 0.0, 1.0)

    def for_streams(self, num_streams: int) -> "DataArguments":
        """
        The same for a model of `num_streams` streams: procedural documents have as many sections where nothing is
        said, and never fewer, because the adapters of the others would not learn.

        Args:
            num_streams (`int`): Streams of the model.
        """
        if self.dataset_path is not None:
            return self
        sections = num_streams if self.document_streams is None else self.document_streams
        if not max(2, num_streams) <= sections <= 6:
            raise ValueError(
                f"num_streams={num_streams} with document_streams={self.document_streams!r}, allowed: 2 to 6 sections "
                "per procedural document (missing = num_streams), and not more streams than sections, because "
                "adapters of streams that no document has would not learn."
            )
        return replace(self, document_streams=sections)


@dataclass
class CurriculumArguments:
    """
    Stages of training.

    Args:
        stages (`list[dict]`): Mappings with the fields of `trainer_pdt.curriculum.Stage`, in order.
    """

    stages: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "List of stages: name, until, train, losses, noise."}
    )

    def build(self, max_steps: int) -> Curriculum:
        """
        The checked curriculum of a run.

        Args:
            max_steps (`int`): Optimizer steps of the run.
        """
        return Curriculum.from_list(self.stages, max_steps)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """
    Raise a `ValueError` that names field, value and range unless `value` is a whole number in `low..high`.

    Args:
        name (`str`): Field.
        value (`Any`): What was given.
        low (`int`): Smallest allowed value.
        high (`int`, *optional*): Largest allowed value.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high):
        return
    bound = "" if high is None else f" and at most {high}"
    raise ValueError(f"{name}={value!r}, allowed: an int of at least {low}{bound}.")
