"""What a training is refused for before its first step: it could not learn, or what it asks for would do nothing."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers.trainer_utils import has_length

from modeling_pdt import PDTForParallelDecoding
from modeling_pdt.hub_layout import quantizer_of

from .arguments import PDTTrainingArguments
from .collator import PDTDataCollator
from .curriculum import Curriculum
from .sampler import check_evaluation
from .sharding import is_trunk_sharded

DOCUMENTS_MADE_AHEAD = 200
"""Training documents whose rows are measured ahead where each is made when it is asked for, in milliseconds."""

DOCUMENTS_WITH_REPEATS = 200
"""Documents among which one has to repeat a fact, if only repeated facts teach."""

_MEASURES = "evaluation makes no predictions and has measures of its own: override `evaluate` to add others"
NEVER_CALLED = {
    "compute_metrics": _MEASURES,
    "preprocess_logits_for_metrics": _MEASURES,
    "compute_loss_func": "the losses of the stages are what is learnt: override `compute_loss` to add another",
}
"""Functions that `Trainer` takes and a PDT run has no use for, with the way out."""


def check_given(given: Mapping[str, Any]) -> None:
    """
    Refuses functions that would never be called, and optimizers that stages could not freeze groups of.

    Args:
        given (`Mapping[str, Any]`): Arguments of `Trainer` by name.
    """
    for name, reason in NEVER_CALLED.items():
        if given.get(name) is not None:
            raise ValueError(f"{name}={given[name]!r}, allowed: None, {reason}.")
    optimizer, schedule = pair = given.get("optimizers", (None, None))
    groups = [] if optimizer is None else optimizer.param_groups
    has_groups = all({"pdt_group", "pdt_values"} <= group.keys() for group in groups)
    if not has_groups or (schedule is not None and schedule.optimizer is not optimizer):
        found = ", ".join("None" if one is None else type(one).__name__ for one in pair)
        raise ValueError(
            f"optimizers=({found}), allowed: (None, None), where `optim` or `optimizer_cls_and_kwargs` chooses; or an "
            "optimizer on the groups of `trainer_pdt.optimizer.parameter_groups`, alone or with a schedule of that "
            "optimizer."
        )


def check_model(model: PDTForParallelDecoding, curriculum: Curriculum) -> None:
    """
    Refuses a model without gradients, and losses that it reads nothing of.

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model.
        curriculum ([`Curriculum`]): The stages.
    """
    frozen = [name for name, parameter in model.pdt_parameters().items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]} is frozen, allowed: all PDT parameters trainable (is_trainable=True).")
    quantizer = quantizer_of(model.trunk)
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(f"the trunk has no gradient ({type(quantizer).__name__}), allowed: one loaded dequantised.")
    unread = [stage.name for stage in curriculum.stages if stage.is_active("plan_snapshot")]
    if unread and not model.config.plan_on_bus:
        raise ValueError(f"stages[{unread[0]}].losses.plan_snapshot needs a model with plan_on_bus=True, got False.")


def check_data(
    args: PDTTrainingArguments, curriculum: Curriculum, collator: PDTDataCollator, train: Any, evaluation: Any
) -> None:
    """
    Refuses documents that training or the evaluation after it could not use.

    Args:
        args ([`PDTTrainingArguments`]): Of the run.
        curriculum ([`Curriculum`]): The stages.
        collator ([`PDTDataCollator`]): Of the run; tells the longest row.
        train: Dataset of training.
        evaluation: Dataset of evaluation, several by name, or `None`.
    """
    check_repeats(args.other_weight, curriculum, train)
    held_out = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for dataset in held_out.values():
        if dataset is not None:
            check_evaluation(dataset, args)
            check_rows(collator, dataset)
    check_rows(collator, train, None if isinstance(train, Dataset) else DOCUMENTS_MADE_AHEAD)


def check_rows(collator: PDTDataCollator, dataset: Any, most: int | None = None) -> None:
    """
    Refuses a dataset with a row longer than `max_row_tokens`, which a batch would meet in the middle of a run.

    Args:
        collator ([`PDTDataCollator`]): Tells the longest row.
        dataset: Features of documents.
        most (`int`, *optional*): Documents that are looked at; all when missing.
    """
    if collator.max_row_tokens is None or not has_length(dataset):
        return
    if isinstance(dataset, Dataset):
        views = ["clean", "corrupted"] if collator.with_corrupted else ["clean"]
        dataset = dataset.select_columns(["document_id", "request_ids", "outline_ids", "header_ids", *views])
    for index in range(len(dataset) if most is None else min(most, len(dataset))):
        collator.check_rows(dataset[index])


def check_repeats(other_weight: float, curriculum: Curriculum, dataset: Any) -> None:
    """
    Refuses `other_weight=0` where no document repeats a fact: nothing would be learnt.

    Args:
        other_weight (`float`): Weight of tokens that are no repeated facts.
        curriculum ([`Curriculum`]): The stages.
        dataset: Of training; its first documents are read.
    """
    if other_weight > 0 or not any(
        stage.is_active("lm_ce") or stage.is_active("notes") for stage in curriculum.stages
    ):
        return
    looked_at = min(len(dataset), DOCUMENTS_WITH_REPEATS)
    for index in range(looked_at):
        if any(token >= 0 for tokens in dataset[index]["clean"]["source_token"] for token in tokens):
            return
    raise ValueError(
        f"other_weight={other_weight}, allowed where none of the first {looked_at} documents repeats a sibling's "
        "fact: a number above 0."
    )


def check_own_text(curriculum: Curriculum, dataset: Any, accelerator: Accelerator) -> bool:
    """
    Whether a stage trains on own text.

    Args:
        curriculum ([`Curriculum`]): The stages.
        dataset: Of training.
        accelerator (`Accelerator`): Of the run.

    Raises:
        ValueError: Where nobody can tell what a text says, or processes cannot write at their own pace.
    """
    name = next((stage.name for stage in curriculum.stages if stage.data == "own"), None)
    if name is None:
        return False
    if not hasattr(dataset, "document"):
        raise ValueError(
            f"stages[{name}].data='own', allowed: with procedural worlds (dataset_path=None), whose parser knows what "
            "a text says."
        )
    if is_trunk_sharded(accelerator):
        raise ValueError(f"stages[{name}].data='own', allowed with ZeRO-3 or FSDP2: 'clean' or 'corrupted'.")
    return True
