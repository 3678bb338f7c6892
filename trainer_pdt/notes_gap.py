"""How far the notes that `writer_tap="top"` writes of whole rows are from those that decoding writes.

Letters: R rows, T tokens, V rounds, K notes per block, N note width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from modeling_pdt import Rollout
from modeling_pdt.adapter_layer import PDTStack
from modeling_pdt.rollout import publish_notes, write_notes
from modeling_pdt.trunk_split import TapState


@torch.no_grad()
def sequential_notes(stack: PDTStack, tap: TapState, rollout: Rollout, stream_ids: Tensor | None) -> Tensor:
    """
    Notes `[R, V, K, N]` of whole rows as decoding writes them: round after round, each from states that have read the
    notes of the rounds before. One upper half per round.

    Args:
        stack (`PDTStack`): Trunk and adapter, with any writer tap.
        tap (`TapState`): The rows.
        rollout (`Rollout`): What they write and read.
        stream_ids (`torch.LongTensor` of shape `[R, T]`, *optional*): Stream of each token, -1 for none.

    Raises:
        ValueError: For a lag below 1: siblings would read each other's notes of the same round.
    """
    if bool((rollout.lag_R1 < 1).any()):
        raise ValueError(f"lag_R1 must be >= 1 for notes in sequence, got {int(rollout.lag_R1.min())}.")
    notes, exists = write_notes(stack, tap.hidden, rollout)
    if stack.writer_tap == "mid":
        return notes
    number_V11 = torch.arange(rollout.rounds, device=notes.device)[:, None, None]
    for current in range(rollout.rounds):
        # The last token of a block predicts for the next one; the notes of its own block are written before it does.
        read = torch.where(rollout.write_round_RT == current, current, rollout.read_round_RT)
        states = publish_notes(stack, replace(rollout, read_round_RT=read), notes, exists, stream_ids).note_states
        written, _ = write_notes(stack, stack.upper(tap, states, stream_ids), rollout)
        notes = torch.where(number_V11 == current, written, notes)
    return notes


def notes_gap(written_RVKN: Tensor, sequential_RVKN: Tensor) -> Tensor:
    """Distance `[R, V, K]` of notes from those written in sequence, as a share of their norm."""
    distance = (written_RVKN - sequential_RVKN).norm(dim=-1)
    return distance / sequential_RVKN.norm(dim=-1).clamp(min=torch.finfo(distance.dtype).tiny)
