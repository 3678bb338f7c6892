"""The notes bus: what each stream has published, and which of it a reader may see.

Letters: B prompts, S streams, R = B * S rows, T tokens, W notes of a window, V rounds, K notes per block, N note
width.
"""

from typing import Any

import torch

from .retention import merge_rounds, novelty, retained_places, select_older


def visible_notes(
    reader_stream: torch.Tensor,
    read_round: torch.Tensor,
    lag: torch.Tensor,
    producer: torch.Tensor,
    version: torch.Tensor,
    capacity: int,
    own_notes: bool | torch.Tensor = False,
    reads_SS: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The one visibility rule, used by training and decoding.

    A reader that writes round v sees its siblings' notes of rounds in (v - lag - capacity, v - lag]; every producer
    has the same number of rounds in the window. The plan is not subject to it.

    Args:
        reader_stream (`torch.Tensor` of shape `[...]`): Stream of the reader.
        read_round (`torch.Tensor` of shape `[...]`): Round that the reader writes.
        lag (`torch.Tensor` of shape `[...]`): 1 or more for a first writing; 0 when judging or rewriting; below 0 when
            judging a block that has waited.
        producer, version (`torch.Tensor` of shape `[..., W]`): Stream and round of each note; a version below 0 marks
            an empty place.
        capacity (`int`): Rounds kept readable.
        own_notes (`bool` or `torch.BoolTensor` of shape `[...]`, *optional*, defaults to `False`): The reader's own
            notes of earlier rounds in place of what it reads otherwise.
        reads_SS (`torch.BoolTensor` of shape `[S, S]`, *optional*): Whether a reader (first axis) sees a writer; see
            [`topology_matrix`]. `None`: all siblings.

    Returns:
        `torch.BoolTensor` of shape `[..., W]`.
    """
    newest = (read_round - lag).unsqueeze(-1)
    seen = (version >= 0) & (version <= newest) & (version > newest - capacity)
    reader = reader_stream.unsqueeze(-1)
    own = producer == reader
    allowed = ~own if reads_SS is None else reads_SS[reader, producer]
    if torch.is_tensor(own_notes):
        allowed = torch.where(own_notes.unsqueeze(-1), own, allowed)
    elif own_notes:
        allowed = own
    return seen & allowed & (~own | (version < read_round.unsqueeze(-1)))


def topology_matrix(
    topology: list[tuple[int, int]] | None, num_streams: int, self_notes: bool = False
) -> torch.Tensor | None:
    """
    Who reads whom.

    Args:
        topology (`list[tuple[int, int]]`, *optional*): Edges (writer, reader). `None`: every sibling.
        num_streams (`int`): S.
        self_notes (`bool`, *optional*, defaults to `False`): Every stream reads its own notes of earlier rounds too.

    Returns:
        `torch.BoolTensor` of shape `[S, S]`, readers first; `None` for siblings and nothing else.

    Raises:
        ValueError: For an edge that names a stream which the call does not have.
    """
    if topology is None and not self_notes:
        return None
    own = torch.eye(num_streams, dtype=torch.bool)
    reads_SS = ~own if topology is None else torch.zeros_like(own)
    for writer, reader in topology or ():
        if not (0 <= writer < num_streams and 0 <= reader < num_streams):
            raise ValueError(
                f"topology: streams must be in [0, {num_streams - 1}], got the edge {(writer, reader)!r}."
            )
        reads_SS[reader, writer] = True
    return reads_SS | own if self_notes else reads_SS


class NotesBus:
    """
    Batched storage of published notes, one place per prompt, stream and round.

    Args:
        num_prompts (`int`), num_streams (`int`): B and S.
        notes_per_block (`int`), notes_dim (`int`): K and N.
        capacity (`int`): Rounds kept readable.
        plan_BPN (`torch.Tensor` of shape `[B, P, N]`, *optional*): Snapshot 0, pinned.
        plan_mask_BP (`torch.BoolTensor` of shape `[B, P]`, *optional*): Which plan places are filled.
        device, dtype: Of the stored notes.
        reads_SS (`torch.BoolTensor` of shape `[S, S]`, *optional*): From [`topology_matrix`].
        retention (`str`, *optional*, defaults to `"fifo"`): Which rounds stay readable; see [`retained_places`].
        retention_score (`str`, *optional*, defaults to `"novelty"`): What `score_BSV` holds of every round:
            [`novelty`], or `"attention"`, see [`~readings.ReceivedAttention`].
    """

    # Rounds added whenever the places are taken.
    GROWTH = 8

    def __init__(
        self,
        num_prompts: int,
        num_streams: int,
        notes_per_block: int,
        notes_dim: int,
        capacity: int,
        plan_BPN: torch.Tensor | None = None,
        plan_mask_BP: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        reads_SS: torch.Tensor | None = None,
        retention: str = "fifo",
        retention_score: str = "novelty",
    ) -> None:
        self.retention_score = retention_score
        self.num_streams, self.capacity = num_streams, capacity
        self.reads_SS = None if reads_SS is None else reads_SS.to(device)
        self.recent, self.scored, self.merged = retained_places(retention, capacity)
        if plan_BPN is None:
            plan_BPN = torch.zeros(num_prompts, 0, notes_dim)
            plan_mask_BP = torch.zeros(num_prompts, 0, dtype=torch.bool)
        if plan_BPN.shape[0] != num_prompts or plan_BPN.shape[2] != notes_dim:
            raise ValueError(
                f"plan must have shape [{num_prompts}, P, {notes_dim}], got {list(plan_BPN.shape)} (notes_dim is "
                f"{notes_dim})."
            )
        self.plan_BPN = plan_BPN.to(device=device, dtype=dtype)
        self.plan_mask_BP = plan_mask_BP.to(device)
        self.notes_BSVKN = torch.zeros(
            num_prompts, num_streams, 0, notes_per_block, notes_dim, device=device, dtype=dtype
        )
        self.published_BSV = torch.zeros(num_prompts, num_streams, 0, dtype=torch.bool, device=device)
        self.score_BSV = torch.zeros(num_prompts, num_streams, 0, device=device)

    def _grow(self, rounds: int) -> None:
        missing = rounds - self.published_BSV.shape[2]
        if missing > 0:
            missing = max(missing, self.GROWTH)
            self.notes_BSVKN = torch.nn.functional.pad(self.notes_BSVKN, (0, 0, 0, 0, 0, missing))
            self.published_BSV = torch.nn.functional.pad(self.published_BSV, (0, missing))
            self.score_BSV = torch.nn.functional.pad(self.score_BSV, (0, missing))

    def publish(self, rows: torch.Tensor, rounds: torch.Tensor, notes_MKN: torch.Tensor) -> None:
        """
        Publishes the notes of M rows.

        Args:
            rows (`torch.LongTensor` of shape `[M]`): Row index, prompt * num_streams + stream.
            rounds (`torch.LongTensor` of shape `[M]`): Round that each note was written for, from 0.
            notes_MKN (`torch.Tensor` of shape `[M, K, N]`): The notes.

        Raises:
            ValueError: When a row publishes a round twice, a round is negative, or the notes have another shape.
        """
        if rows.numel() == 0:
            return
        if notes_MKN.shape[1:] != self.notes_BSVKN.shape[3:]:
            raise ValueError(
                f"notes must have shape [M, {', '.join(map(str, self.notes_BSVKN.shape[3:]))}], "
                f"got {list(notes_MKN.shape)}."
            )
        places = list(zip(*torch.stack([rounds, rows]).tolist(), strict=True))
        if min(places)[0] < 0:
            raise ValueError(f"rounds must be >= 0, got {min(places)[0]}.")
        self._grow(max(places)[0] + 1)
        prompt, stream = rows // self.num_streams, rows % self.num_streams
        if len(set(places)) < len(places) or bool(self.published_BSV[prompt, stream, rounds].any()):
            raise ValueError("a round is published once; withdraw it first.")
        if self.scored and self.retention_score == "novelty":
            earlier = self.notes_BSVKN[prompt, stream], self.published_BSV[prompt, stream]
            self.score_BSV[prompt, stream, rounds] = novelty(notes_MKN, *earlier, rounds)
        else:
            self.score_BSV[prompt, stream, rounds] = 0.0
        self.notes_BSVKN[prompt, stream, rounds] = notes_MKN.to(self.notes_BSVKN)
        self.published_BSV[prompt, stream, rounds] = True

    def withdraw(self, rows: torch.Tensor, rounds: torch.Tensor) -> None:
        """Removes the notes of rows `[M]` for rounds `[M]`; readers stop seeing them at once."""
        self.published_BSV[rows // self.num_streams, rows % self.num_streams, rounds] = False

    def window(
        self,
        rows: torch.Tensor,
        read_round: torch.Tensor,
        lag: torch.Tensor,
        sources: torch.Tensor | None = None,
        own_notes: bool | torch.Tensor = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The notes that each row may read while it writes `read_round`: the plan, then every producer's rounds.

        Args:
            rows, read_round, lag (`torch.LongTensor` of shape `[M]`): Readers, the round each writes, and its lag.
            sources (`torch.LongTensor` of shape `[M]`, *optional*): Rows in whose place the notes are read; the plan
                is the reader's own all the same.
            own_notes (`bool` or `torch.BoolTensor` of shape `[M]`, *optional*, defaults to `False`): A row's own notes
                in place of what it reads otherwise.

        Returns:
            `(notes, mask)` of shapes `[M, W, N]` and `[M, W]`.
        """
        streams, stored, per_block, _ = self.notes_BSVKN.shape[1:]
        sources = rows if sources is None else sources
        notes, version = self._places(sources // streams, read_round - lag)
        producer = torch.arange(streams, device=rows.device)[None, :, None].expand_as(version)
        mask = visible_notes(
            sources % streams,
            read_round,
            lag,
            producer.flatten(1),
            version.flatten(1),
            max(self.capacity, stored) if self.scored or self.merged else self.capacity,
            own_notes,
            self.reads_SS,
        )
        mask = mask.repeat_interleave(per_block, dim=1)
        notes = notes.flatten(1, 3)
        return (
            torch.cat([self.plan_BPN[rows // streams], notes], dim=1),
            torch.cat([self.plan_mask_BP[rows // streams], mask], dim=1),
        )

    def window_rounds(self, sources: torch.Tensor, read_round: torch.Tensor, lag: torch.Tensor) -> torch.Tensor:
        """
        The round behind every place of a window `[M, S, X]`, whether visible or not, -1 for an empty place; X places
        of `notes_per_block` notes for every producer, after the plan. Arguments as in [`window`].
        """
        return self._places(sources // self.num_streams, read_round - lag)[1]

    def _places(self, prompt: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes `[M, S, X, K, N]` and rounds `[M, S, X]` of windows up to the rounds `newest` `[M]`."""
        streams, stored = self.published_BSV.shape[1:]
        span = max(0, min(self.recent, int(newest.max()) + 1)) if newest.numel() and stored else 0
        version_MV = newest[:, None] - torch.arange(span - 1, -1, -1, device=newest.device)
        notes, version = self._rounds(prompt, version_MV[:, None, :].expand(-1, streams, -1))
        if stored and (self.scored or self.merged):
            older_notes, older = self._older(prompt, newest - self.recent)
            notes, version = torch.cat([older_notes, notes], dim=2), torch.cat([older, version], dim=2)
        return notes, version

    def _rounds(self, prompt: torch.Tensor, version_MSV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Notes `[M, S, V, K, N]` of rounds `[M, S, V]`, and the rounds with -1 for those that are not published."""
        stored = self.notes_BSVKN.shape[2]
        index = version_MSV.clamp(0, max(stored - 1, 0))
        prompt = prompt[:, None, None]
        stream = torch.arange(self.num_streams, device=index.device)[None, :, None]
        filled = self.published_BSV[prompt, stream, index] & (version_MSV == index)
        return self.notes_BSVKN[prompt, stream, index], torch.where(filled, index, -1)

    def _older(self, prompt: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What retention keeps of the rounds up to `newest` `[M]`, as [`_rounds`] returns it."""
        stored = self.published_BSV.shape[2]
        old_MSV = self.published_BSV[prompt] & (torch.arange(stored, device=newest.device) <= newest[:, None, None])
        chosen, rest = select_older(old_MSV, self.score_BSV[prompt], min(self.scored, stored))
        notes, version = self._rounds(prompt, chosen)
        if not self.merged:
            return notes, version
        merged, merged_version = merge_rounds(self.notes_BSVKN[prompt], rest)
        return torch.cat([merged, notes], dim=2), torch.cat([merged_version, version], dim=2)


def open_bus(config: Any, settings: Any, inputs: Any, device: torch.device) -> NotesBus:
    """
    The bus of a decoding call, with its snapshot 0.

    Args:
        config (`PDTConfig`): Of the model.
        settings (`Settings`), inputs (`Inputs`): Of the call.
        device (`torch.device`): Of the stored notes.
    """
    return NotesBus(
        len(inputs.prompts),
        settings.num_streams,
        config.notes_per_block,
        config.notes_dim,
        settings.bus_capacity,
        *inputs.snapshot_zero(config.plan_on_bus),
        device,
        getattr(torch, settings.bus_dtype),
        topology_matrix(settings.topology, settings.num_streams, settings.self_notes),
        settings.retention,
        settings.retention_score,
    )


def training_window(
    notes_RVKN: torch.Tensor,
    written_RV: torch.Tensor,
    read_round_RT: torch.Tensor,
    lag_RT: torch.Tensor,
    num_streams: int,
    capacity: int,
    plan_BPN: torch.Tensor | None = None,
    plan_mask_BP: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The windows of whole rows at once: all notes of a document, and who sees which at every token.

    Args:
        notes_RVKN (`torch.Tensor` of shape `[R, V, K, N]`): Notes of every row and round.
        written_RV (`torch.BoolTensor` of shape `[R, V]`): Rounds that exist (and are not dropped).
        read_round_RT (`torch.LongTensor` of shape `[R, T]`): Round each token predicts for; below 0 sees nothing.
        lag_RT (`torch.LongTensor`, broadcastable to `[R, T]`): Lag of the reader.
        num_streams (`int`): S; rows of one document are adjacent.
        capacity (`int`): Rounds kept readable.
        plan_BPN, plan_mask_BP (*optional*): Snapshot 0 of each document.

    Returns:
        `(notes, mask)`: `[B, W, N]`, shared by the rows of a document, and `[R, T, W]`.
    """
    rows, rounds, per_block, width = notes_RVKN.shape
    documents = rows // num_streams
    device = notes_RVKN.device
    stream_R = torch.arange(num_streams, device=device).repeat(documents)
    version_RV = torch.where(written_RV, torch.arange(rounds, device=device), -1)
    version_BW = version_RV.view(documents, num_streams * rounds)
    producer_W = torch.arange(num_streams, device=device).repeat_interleave(rounds)
    mask = visible_notes(
        stream_R[:, None].expand_as(read_round_RT),
        read_round_RT,
        lag_RT.expand_as(read_round_RT),
        producer_W,
        version_BW.repeat_interleave(num_streams, dim=0)[:, None, :],
        capacity,
    )
    mask = mask.repeat_interleave(per_block, dim=2)
    notes = notes_RVKN.reshape(documents, -1, width)
    if plan_BPN is not None:
        conditioned = (read_round_RT >= 0)[:, :, None]
        plan_mask = plan_mask_BP.repeat_interleave(num_streams, dim=0)[:, None, :] & conditioned
        notes = torch.cat([plan_BPN.to(notes.dtype), notes], dim=1)
        mask = torch.cat([plan_mask, mask], dim=2)
    return notes, mask
