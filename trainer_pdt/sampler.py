"""Batches of documents of one number of streams, from datasets whose documents have 2 to 8."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length


def stream_counts(dataset: Any) -> list[int]:
    """
    Number of streams of every document of a dataset of features.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): One with a method `stream_counts` is asked; of
            another one that is no `datasets.Dataset`, every document is read.
    """
    if hasattr(dataset, "stream_counts"):
        return dataset.stream_counts()
    headers: Iterable[Sequence] = (
        dataset["header_ids"]
        if isinstance(dataset, Dataset)
        else (dataset[index]["header_ids"] for index in range(len(dataset)))
    )
    return [len(group) for group in headers]


class StreamCountSampler(Sampler[int]):
    """
    Documents in an order in which each `batch_size` of them, from the first one on, have one number of streams.

    The last batch of a number is filled up with documents of that number, so that none is left out and every batch is
    full: batches can be dealt out to any number of processes.

    Args:
        counts (`Sequence[int]`): Number of streams of every document, see [`stream_counts`].
        batch_size (`int`): Documents per batch.
        seed (`int`, *optional*): Documents and batches are shuffled, anew in every epoch; missing = in their order,
            fewer streams first.
        drop_last (`bool`, *optional*, defaults to `False`): Leave out what does not fill a batch instead.
    """

    def __init__(
        self, counts: Sequence[int], batch_size: int, seed: int | None = None, drop_last: bool = False
    ) -> None:
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        groups: dict[int, list[int]] = {}
        for index, count in enumerate(counts):
            groups.setdefault(count, []).append(index)
        self.groups = [groups[count] for count in sorted(groups)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order is a function of seed and epoch, so a run that goes on meets the same batches."""
        self.epoch = epoch

    def _size(self, group: Sequence[int]) -> int:
        """Documents that a group adds to an epoch."""
        whole = len(group) // self.batch_size * self.batch_size
        return whole if whole == len(group) or self.drop_last else whole + self.batch_size

    def __len__(self) -> int:
        return sum(map(self._size, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[list[int]] = []
        for group in self.groups:
            order = iter(cycle(_shuffled(group, generator)))
            batches += [list(islice(order, self.batch_size)) for _ in range(self._size(group) // self.batch_size)]
        return chain.from_iterable(_shuffled(batches, generator))

    def new_documents(self) -> list[bool]:
        """Of an order without a seed: whether each place holds a document that no earlier one holds."""
        return [place < len(group) for group in self.groups for place in range(self._size(group))]


def _shuffled(items: Sequence[Any], generator: torch.Generator | None) -> Sequence[Any]:
    if generator is None:
        return items
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def sampler_for(
    dataset: Any, args: TrainingArguments, batch_size: int, shuffle: bool = False
) -> StreamCountSampler | None:
    """
    The sampler that a dataset needs; `None` where all documents have one number of streams, or nobody knows.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): Features of documents.
        args (`TrainingArguments`): Seed, strategy and what becomes of the rest of an epoch.
        batch_size (`int`): Documents per batch.
        shuffle (`bool`, *optional*, defaults to `False`): For training.
    """
    if not has_length(dataset) or len(set(counts := stream_counts(dataset))) < 2:
        return None
    seed = args.seed if args.data_seed is None else args.data_seed
    is_shuffled = shuffle and args.train_sampling_strategy == "random"
    return StreamCountSampler(counts, batch_size, seed if is_shuffled else None, args.dataloader_drop_last)


def sampler_of(dataloader: DataLoader) -> StreamCountSampler | None:
    """The [`StreamCountSampler`] of a prepared dataloader, `None` if it has none."""
    batches = dataloader.batch_sampler
    # In several processes each one's share wraps the batches of all.
    sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
    return sampler if isinstance(sampler, StreamCountSampler) else None


def check_evaluation(dataset: Any, args: TrainingArguments) -> None:
    """
    Raises a `ValueError` for a dataset that leaves some process without a batch to evaluate.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): Features of documents.
        args (`TrainingArguments`): Documents per batch, processes and what becomes of the rest.
    """
    if not has_length(dataset):
        return
    least, is_enough = 1, len(dataset) > 0
    if args.dataloader_drop_last:
        size = args.eval_batch_size
        batches = sum(count // size for count in Counter(stream_counts(dataset)).values())
        least, is_enough = size * args.world_size, batches >= args.world_size
    if not is_enough:
        raise ValueError(
            f"eval_dataset has {len(dataset)} documents, allowed with dataloader_drop_last="
            f"{args.dataloader_drop_last}, per_device_eval_batch_size={args.per_device_eval_batch_size} and "
            f"{args.world_size} process(es): at least {least}, in full batches of one number of streams."
        )


class StreamCountTrainer(Trainer):
    """`Trainer` whose batches hold documents of one number of streams, whatever its datasets hold."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Refuses documents that make no batch, see [`check_evaluation`]."""
        dataloader = super().get_eval_dataloader(eval_dataset)
        check_evaluation(dataloader.dataset, self.args)
        return dataloader

    def get_train_dataloader(self) -> DataLoader:
        """Tells accelerate about the sampler, so that a resumed epoch reaches it on several processes too."""
        dataloader = super().get_train_dataloader()
        sampler = sampler_of(dataloader)
        if sampler is not None:
            dataloader.set_sampler(sampler)
        return dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = sampler_for(dataset, self.args, self._train_batch_size, shuffle=True)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        sampler = sampler_for(eval_dataset, self.args, self.args.eval_batch_size)
        return super()._get_eval_sampler(eval_dataset) if sampler is None else sampler

    def new_documents(self, dataloader: DataLoader, step: int, documents: int) -> list[bool]:
        """
        Which documents of an evaluation batch no other batch, of whatever process, has counted.

        Args:
            dataloader (`DataLoader`): From `get_eval_dataloader`.
            step (`int`): Number of the batch on this process.
            documents (`int`): Documents of the batch.
        """
        sampler = sampler_of(dataloader)
        new = [True] * len(dataloader.dataset) if sampler is None else sampler.new_documents()
        start = (step * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        found = new[start : start + documents]
        return found + [False] * (documents - len(found))
