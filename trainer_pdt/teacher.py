"""What the student is compared with: averaged weights, the bus of true notes, and logits kept in small form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_pdt import PDTForParallelDecoding, PDTOutput, Rollout

from .losses import ChunkedLogits, TopKTeacher, join_teachers, token_ce, top_k_teacher

EMA_FILE = "ema.safetensors"
"""File of a checkpoint with the averaged weights, where the run has an averaged teacher."""

LOGIT_ROWS = 128
"""Positions whose logits exist at the same time where only their best tokens are kept."""

LOGIT_PARTS, LEAST_ROWS = 4, 32
"""Parts, and their fewest positions, of logits that learn: the gradients of one part exist at the same time."""


class EmaTeacher(TrainerCallback):
    """
    Moving average of what learns, `average = decay * average + (1 - decay) * weights` after every optimizer step, in
    float32. The trunk is never copied.

    Args:
        model (`PDTForParallelDecoding`): The unwrapped model in training.
        decay (`float`): At least 0, below 1.
    """

    def __init__(self, model: PDTForParallelDecoding, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Begins with the present weights."""
        self.average = {name: p.detach().float().clone() for name, p in self.model.pdt_parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average."""
        for name, parameter in self.model.pdt_parameters().items():
            self.average[name].lerp_(parameter.detach().float(), 1.0 - self.decay)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The model computes with the average inside of it: float32 parameters change places, nothing is copied."""
        parameters = self.model.pdt_parameters()
        live = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = live[name]

    def save(self, folder: str) -> None:
        """Writes the average into a checkpoint."""
        save_file({name: value.cpu() for name, value in self.average.items()}, Path(folder, EMA_FILE))

    def load(self, folder: str) -> None:
        """
        Reads the average of a checkpoint.

        Raises:
            ValueError: For a checkpoint without one, or one of other parameters.
        """
        file = Path(folder, EMA_FILE)
        if not file.is_file():
            raise ValueError(f"{folder} lacks {EMA_FILE}, allowed: a checkpoint of a run with teacher_kind='ema'.")
        saved, parameters = load_file(file), self.model.pdt_parameters()
        differing = sorted(saved.keys() ^ parameters.keys())
        if differing:
            raise ValueError(f"{file} and the model do not both have {differing[0]}, allowed: equal parameters.")
        self.average = {name: saved[name].to(parameter.device) for name, parameter in parameters.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the average of a new run; a continued one has read its own."""
        if state.global_step == 0:
            self.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follows the optimizer."""
        self.update()


def true_rollout(inputs: Mapping[str, Tensor], rollout: Rollout) -> Rollout:
    """The bus of a teacher: all blocks that have true notes publish them, without any of the student's noise."""
    told = inputs["note_mask"].any(dim=2)
    return replace(
        rollout,
        note_ids_RVL=inputs["note_ids"],
        note_mask_RVL=inputs["note_mask"],
        teacher_RV=told,
        keep_RV=told,
        perturbation_RVKN=None,
        donor_R=None,
        wants_coverage=False,
        wants_agreement=False,
    )


@dataclass(frozen=True)
class Prediction:
    """
    What is kept of a pass's next-token logits.

    Args:
        distributions (`tuple`): By temperature asked for: all logits `[M, vocab]`, or the best tokens.
        ce_M (`Tensor`, *optional*): Cross-entropy of given tokens.
    """

    distributions: tuple[Tensor | TopKTeacher, ...]
    ce_M: Tensor | None


def digest(
    chunks: Iterable[Tensor], top_k: int, temperatures: Sequence[float], tokens_M: Tensor | None = None
) -> Prediction:
    """
    Reduces logits that come in parts.

    Args:
        chunks (`Iterable[Tensor]`): Parts `[m, vocab]` in the order of the supervised tokens; one part with `top_k=0`.
        top_k (`int`): Tokens kept per position, the rest as one bucket; 0 = the logits as they are.
        temperatures (`Sequence[float]`): Of the losses that compare with this pass.
        tokens_M (`LongTensor` of shape `[M]`, *optional*): Tokens whose cross-entropy is wanted.
    """
    kept: list[list[Any]] = [[] for _ in temperatures]
    losses, done = [], 0
    for chunk_MV in chunks:
        for parts, temperature in zip(kept, temperatures, strict=True):
            parts.append(top_k_teacher(chunk_MV, top_k, temperature) if top_k else chunk_MV)
        if tokens_M is not None:
            losses.append(token_ce(chunk_MV, tokens_M[done : done + len(chunk_MV)]))
            done += len(chunk_MV)
    distributions = tuple(join_teachers(parts) if top_k else parts[0] for parts in kept)
    return Prediction(distributions, None if tokens_M is None else torch.cat(losses))


@torch.no_grad()
def digest_live(
    logits: ChunkedLogits, top_k: int, temperatures: Sequence[float], tokens_M: Tensor | None = None
) -> Prediction:
    """[`digest`] of the logits of a pass that also learns."""
    return digest(logits.parts() if top_k else [logits.whole()], top_k, temperatures, tokens_M)


def learn(model: nn.Module, positions_RT: Tensor, rows: int, **inputs: Any) -> PDTOutput:
    """
    A pass with gradient; its `logits` are [`ChunkedLogits`].

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        positions_RT (`BoolTensor` of shape `[rows, tokens]`): Positions that predict a supervised token.
        rows (`int`): Positions whose logits exist at the same time, made again for their gradient; 0 = all are kept.
        inputs (`Any`): Of the model's `forward`.
    """
    output = model(**inputs, logits_mask=torch.zeros_like(positions_RT))
    kept_rows = max(LEAST_ROWS, -(-int(positions_RT.sum()) // LOGIT_PARTS))
    output.logits = _logits(model, output, positions_RT, rows or kept_rows, remade=rows > 0)
    return output


def _logits(model: nn.Module, output: PDTOutput, positions_RT: Tensor, rows: int, remade: bool) -> ChunkedLogits:
    """Logits of a pass that made none, from its last states, which are let go."""
    hidden_MD, output.last_hidden_state = output.last_hidden_state[positions_RT], None
    head = extract_model_from_parallel(model).get_output_embeddings()
    # Mixed precision hands states back in float32.
    return ChunkedLogits(hidden_MD.to(head.weight.dtype), head, rows, remade)


@torch.no_grad()
def predict(
    model: nn.Module,
    positions_RT: Tensor,
    top_k: int,
    temperatures: Sequence[float],
    tokens_M: Tensor | None = None,
    **inputs: Any,
) -> tuple[PDTOutput, Prediction]:
    """
    A pass without gradient, and what [`digest`] keeps of its logits. Unless all of them are kept, they are made for
    `LOGIT_ROWS` positions at a time and never exist together.

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        positions_RT (`BoolTensor` of shape `[rows, tokens]`): Positions that predict a supervised token.
        top_k, temperatures, tokens_M: See [`digest`].
        inputs (`Any`): Of the model's `forward`.
    """
    nothing_RT = torch.zeros_like(positions_RT)
    if not temperatures and tokens_M is None:
        return model(**inputs, logits_mask=nothing_RT), Prediction((), None)
    if temperatures and not top_k:
        output = model(**inputs, logits_mask=positions_RT)
        return output, digest([output.logits], 0, temperatures, tokens_M)
    output = model(**inputs, logits_mask=nothing_RT)
    logits = _logits(model, output, positions_RT, LOGIT_ROWS, remade=True)
    return output, digest(logits.parts(), top_k, temperatures, tokens_M)
