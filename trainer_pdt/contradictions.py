"""What a step's draws make of the student's texts: notes in other words, notes and plan items that are not true.

Letters: B documents, R rows, T tokens, V rounds, P plan items, L tokens of a text.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from modeling_pdt import Rollout

from .curriculum import Stage
from .noise import NoiseDraw


def student_notes(inputs: Mapping[str, Tensor], stage: Stage, noise: NoiseDraw) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[R, V, L]` of the teacher's notes that the student gets to read."""
    notes = inputs["noisy_note_ids"], inputs["noisy_note_mask"]
    if stage.note_paraphrase > 0:
        others = inputs["paraphrased_note_ids"], inputs["paraphrased_note_mask"]
        notes = exchange_texts(notes, others, noise.paraphrase_RK.to(notes[0].device))
    if stage.note_contradict > 0:
        others = inputs["contrary_note_ids"], inputs["contrary_note_mask"]
        notes = exchange_texts(notes, others, _contradicted(inputs, noise))
    return notes


def disputed_tokens(inputs: Mapping[str, Tensor], noise: NoiseDraw, rollout: Rollout) -> Tensor:
    """
    Tokens `[R, T]` that repeat a fact of which a note of a visible or of the same round tells another value.

    Args:
        inputs (`Mapping[str, Tensor]`): A view of the batch, with `with_variants` of the collator.
        noise (`NoiseDraw`): The step's draws.
        rollout (`Rollout`): The student's, which says what reaches the bus.
    """
    told_RV = _contradicted(inputs, noise) & rollout.teacher_RV
    if rollout.keep_RV is not None:
        told_RV = told_RV & rollout.keep_RV
    if rollout.donor_R is not None:
        own_R = torch.arange(len(told_RV), device=told_RV.device)
        told_RV = told_RV & (rollout.donor_R == own_R)[:, None]
    row, source, now = inputs["disputed_row"], inputs["source_round"], inputs["write_round"]
    told_RT = told_RV[row.clamp(min=0), source.clamp(0, told_RV.shape[1] - 1)]
    return told_RT & (row >= 0) & (source <= now) & (source > now - rollout.capacity)


def contrary_items(inputs: Mapping[str, Tensor], noise: NoiseDraw) -> Tensor:
    """
    Plan items `[B, P]` in whose place the step puts another document's.

    Raises:
        ValueError: When the batch has plan items and none of another document.
    """
    there_BP, others_BP = inputs["item_mask"].any(dim=2), inputs["contrary_item_mask"].any(dim=2)
    if bool(there_BP.any()) and not bool(others_BP.any()):
        raise ValueError("item_contradict is above 0, allowed: features of a FeatureMaker with `items`; it has none.")
    return there_BP & others_BP & noise.contradict_BP.to(there_BP.device)


def exchange_texts(
    texts: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], chosen_MN: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Texts with others in some places.

    Args:
        texts (`tuple`): Tokens and mask `[M, N, L]`.
        others (`tuple`): The same of the others, of any length.
        chosen_MN (`BoolTensor` of shape `[M, N]`): Where the others stand.

    Returns:
        `tuple[Tensor, Tensor]`: Tokens and mask, as long as the longer of both.
    """
    length = max(texts[0].shape[2], others[0].shape[2])
    pairs = zip(others, texts, strict=True)
    ids, mask = (
        torch.where(chosen_MN[..., None], *(pad(values, (0, length - values.shape[2])) for values in pair))
        for pair in pairs
    )
    return ids, mask


def _contradicted(inputs: Mapping[str, Tensor], noise: NoiseDraw) -> Tensor:
    """Blocks `[R, V]` whose teacher's note tells other values."""
    told_RV = inputs["contrary_note_mask"].any(dim=2)
    return told_RV & noise.contradict_RK.to(told_RV.device)
