"""Writes documents in several processes: one that decodes a small model leaves cores of a CPU idle."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_pdt import PDTForParallelDecoding

from ..loading import load_trained
from .modes import Written, batches

_loaded: dict[str, Any] = {}
"""Model and tokenizer of a worker process."""


class Writers:
    """
    Runs the functions of [`modes`](modes.py) on batches of documents, here or in worker processes.

    What a batch says depends on its documents and on the seed alone, so the number of processes changes nothing.

    Args:
        model (`PDTForParallelDecoding`), tokenizer (`PreTrainedTokenizerBase`): Used here, with one worker.
        source (`str`): Folder or repository that worker processes load the same model from.
        workers (`int`, *optional*, defaults to 1): Processes; 1 = none beside this one.
        threads (`int`, *optional*, defaults to 1): CPU threads of all workers together.
        revision (`str`, *optional*): Of the repository `source`; the trunk's is the model's own.
    """

    def __init__(
        self,
        model: PDTForParallelDecoding,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        workers: int = 1,
        threads: int = 1,
        revision: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pool = None
        if workers > 1:
            place = (source, revision, model.config.trunk_revision)
            self.pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _load, (place, max(1, threads // workers))
            )

    def __call__(self, write: Callable[..., Any], items: Sequence[Any], batch_size: int, **options: Any) -> Any:
        """
        What `write(model, tokenizer, items, batch_size=batch_size, **options)` returns, in the order of the items.

        Args:
            write (`Callable`): A function of `modes` that returns [`Written`] or a tuple of them.
            items (`Sequence`): Its third argument.
        """
        if self.pool is None:
            return write(self.model, self.tokenizer, items, batch_size=batch_size, **options)
        call = partial(_write, write, batch_size=batch_size, **options)
        parts = list(self.pool.map(call, batches(items, batch_size)))
        if isinstance(parts[0], Written):
            return Written.joined(parts)
        return tuple(Written.joined(same) for same in zip(*parts, strict=True))

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _load(place: tuple[str, str | None, str | None], threads: int) -> None:
    torch.set_num_threads(threads)
    _loaded["model"], _loaded["tokenizer"] = load_trained(*place)


def _write(write: Callable[..., Any], items: Sequence[Any], **options: Any) -> Any:
    return write(_loaded["model"], _loaded["tokenizer"], items, **options)
