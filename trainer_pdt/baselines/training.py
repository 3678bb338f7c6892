"""Training of the heads that draft: the trunk's states over documents of the worlds, read and never changed."""

import random
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..arguments import check_whole
from ..data.worlds import WorldOptions, generate_document
from ..trunk import TrunkArguments
from ..trunk_corpus import RowBuilder, TrunkCollator, TrunkExample
from .eagle import EagleHead
from .medusa import MedusaHeads

KINDS: dict[str, type[MedusaHeads] | type[EagleHead]] = {"medusa": MedusaHeads, "eagle": EagleHead}


@dataclass
class DraftArguments:
    """
    What learns to draft, and from what.

    Args:
        trunk (`str`): Folder or Hub repository of the trunk.
        kind (`str`): `"medusa"` or `"eagle"`.
        documents (`int`): Training documents of the worlds.
        threads (`int`, *optional*): CPU threads.
    """

    trunk: str = field(metadata={"help": "Folder or repository of the trunk."})
    kind: Literal["medusa", "eagle"] = field(metadata={"help": "What learns: medusa or eagle."})
    documents: int = field(default=4000, metadata={"help": "Training documents of the worlds."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})

    def __post_init__(self) -> None:
        check_whole("documents", self.documents, 1)


class SequentialAnswers(Dataset):
    """
    Whole answers in one row, as [`write_sequential`] writes them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the trunk.
        documents (`int`): How many.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: int) -> None:
        self.rows, self.documents = RowBuilder(tokenizer, TrunkArguments(p_permuted=0.0)), documents

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> list[TrunkExample]:
        document = generate_document("train", index, WorldOptions(), with_notes=False)
        return [self.rows.sequential(document, random.Random(index))]


class DraftTrainer(Trainer):
    """
    `Trainer` of heads that read a trunk.

    Args:
        trunk (`PreTrainedModel`): Gives states; gets no gradient.

    Raises:
        ValueError: For several processes or devices, which the loss of these heads is not made for.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, trunk: PreTrainedModel, **options: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"world_size={args.world_size} with {args.n_gpu} devices, allowed: one process, one device."
            )
        args.remove_unused_columns = False
        super().__init__(model, args, data_collator=TrunkCollator(trunk.config.pad_token_id), **options)
        self.trunk = trunk.to(args.device).eval().requires_grad_(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The heads' own loss on the trunk's final states."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            state_RTD = self.trunk.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return model.loss(self.trunk, state_RTD, ids, inputs["labels"])
