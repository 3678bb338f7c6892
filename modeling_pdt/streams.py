"""StreamBatch: every row of a parallel decoding call, its tokens, positions, cache and commit frontier.

Letters: R rows, A rows in the trunk's batch, S streams, T tokens, L section tokens, D trunk width.
"""

from dataclasses import dataclass, field

import torch

from .cache import RollbackCache


@dataclass
class Section:
    """
    Host-side record of one row.

    Args:
        header (`list[int]`): Tokens before the section.
        tokens (`list[int]`): Section tokens chosen so far; those behind the commit frontier are final.
        blocks (`list[tuple[int, int]]`): Token ranges of committed blocks.
        coverage (`dict[int, float]`): Latest coverage of committed text per plan item.
        retries (`int`): Withdrawn blocks.
        finished (`bool`): Ended with EOS.
    """

    header: list[int]
    tokens: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    coverage: dict[int, float] = field(default_factory=dict)
    retries: int = 0
    finished: bool = False


class StreamBatch:
    """
    Rows in lock step: one token each per trunk call.

    The rows of a call keep their numbers to its end. The trunk's batch, the cache and `mask` hold `batch_rows` only,
    in that order; a row that has ended leaves them.

    `fed_R` counts the section tokens that the trunk has consumed; right after the header it is 0. The block of row r
    that is being written starts at section token `block_start_R[r]`. Rows of `waiting_R` stand still: they consume the
    last token of their block again in every call.

    Args:
        prompts (`list[list[int]]`): Tokens of every prompt.
        headers (`list[list[int]]`): Tokens of every row's header, rows of one prompt adjacent.
        max_new_tokens (`int`), block_size (`int`): Limits; the longest block where blocks differ.
        width (`int`): D.
        device (`torch.device`): Of all tensors.
        writer_tap (`str`, *optional*, defaults to `"mid"`): With `"top"`, last hidden states are kept for the writer
            beside those at the tap.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        headers: list[list[int]],
        max_new_tokens: int,
        block_size: int,
        width: int,
        device: torch.device,
        writer_tap: str = "mid",
    ) -> None:
        rows = len(headers)
        self.num_prompts, self.num_streams = len(prompts), rows // len(prompts)
        self.prompts, self.max_new_tokens, self.block_size, self.device = prompts, max_new_tokens, block_size, device
        self.sections = [Section(list(header)) for header in headers]
        self.rows_R = torch.arange(rows, device=device)
        self.prompt_R = self.rows_R // self.num_streams
        self.stream_R = self.rows_R % self.num_streams
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        self.fed_R, self.round_R, self.block_start_R, self.attempt_R = (zeros.clone() for _ in range(4))
        self.position_R = zeros.clone()
        self.next_R = zeros.clone()
        self.stop_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.live_R = torch.ones(rows, dtype=torch.bool, device=device)
        self.waiting_R = torch.zeros_like(self.stop_R)
        self.any_waiting = False
        self.live_rows = list(range(rows))
        self.batch_rows, self.batch_A = list(range(rows)), self.rows_R
        self.tokens_RL = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        # Place 0 holds the position before the section, place i + 1 section token i.
        self.tap_RLD = torch.zeros(rows, max_new_tokens + 1, width, device=device)
        self.top_RLD = torch.zeros_like(self.tap_RLD) if writer_tap == "top" else None
        self.starts = [
            torch.tensor(prompts[row // self.num_streams] + section.header, device=device)
            for row, section in enumerate(self.sections)
        ]
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.cache: RollbackCache | None = None

    def append_mask(self) -> torch.Tensor:
        """One more real slot for every row of the batch; returns the whole mask `[A, slots]`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self.mask

    def rollback(self, counts_R: torch.Tensor) -> None:
        """Takes `counts_R` consumed tokens per row back: cache, mask and positions in one event."""
        counts_A = counts_R[self.batch_A]
        self.cache.rollback(counts_A)
        slots = torch.arange(self.mask.shape[1], device=self.device)[None, :] - counts_A[:, None]
        shifted = self.mask.gather(1, slots.clamp(min=0))
        self.mask = torch.where(slots >= 0, shifted, 0)
        self.position_R = self.position_R - counts_R

    def consume(self, tap_A1D: torch.Tensor) -> None:
        """Stores the tap state of the token that every row of the batch has just consumed."""
        self.tap_RLD[self.batch_A, self.fed_R[self.batch_A] + 1] = tap_A1D[:, 0].to(self.tap_RLD.dtype)
        self.fed_R = self.fed_R + self.live_R
        self.position_R = self.position_R + self.live_R

    def keep_top(self, hidden_A1D: torch.Tensor) -> None:
        """Stores the last hidden state of the token that each row of the batch consumed last, if a writer reads it."""
        if self.top_RLD is not None:
            self.top_RLD[self.batch_A, self.fed_R[self.batch_A]] = hidden_A1D[:, 0].to(self.top_RLD.dtype)

    @property
    def kept_states(self) -> list[torch.Tensor]:
        """Buffers of the states that are kept of every section."""
        return [self.tap_RLD] if self.top_RLD is None else [self.tap_RLD, self.top_RLD]

    @property
    def written_R(self) -> torch.Tensor:
        """Tokens `[R]` of the block that each row is writing."""
        return self.fed_R - self.block_start_R

    def at_boundary(self, eos_ids: torch.Tensor, complete_R: torch.Tensor | None = None) -> torch.Tensor:
        """
        Rows `[R]` whose block is complete with the token just consumed: full, ended by EOS, out of budget, waiting,
        or `complete_R`.
        """
        written = self.written_R
        ended = self.ending(eos_ids) | self.waiting_R
        full = written >= self.block_size if complete_R is None else complete_R
        return self.live_R & (full | (ended & (written > 0)))

    def drop_finished(self) -> torch.Tensor | None:
        """
        Takes rows that have ended out of the batch. The last rows move to the places that become free, so that the
        cache copies no other row.

        Returns:
            `torch.LongTensor` of shape `[A]`: the former place of every row that stays; `None` if none has left.
        """
        size = len(self.live_rows)
        if size == len(self.batch_rows):
            return None
        live = set(self.live_rows)
        moving = [place for place in range(size, len(self.batch_rows)) if self.batch_rows[place] in live]
        kept = [place if self.batch_rows[place] in live else moving.pop() for place in range(size)]
        places_A = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.batch_rows, self.batch_A = [self.batch_rows[place] for place in kept], self.batch_A[places_A]
        self.mask = self.mask[places_A]
        self.cache.batch_select_indices(places_A)
        return places_A

    def block_states(self, rows_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Tap states of the blocks just completed.

        Returns:
            `(states, previous, mask)`: `[M, block_size, D]` twice (the second one position earlier) and
            `[M, block_size]`.
        """
        offset = torch.arange(self.block_size, device=self.device)
        place = self.block_start_R[rows_M, None] + offset
        mask = place < self.fed_R[rows_M, None]
        place = place.clamp(max=self.max_new_tokens - 1)
        rows = rows_M[:, None]
        return self.tap_RLD[rows, place + 1], self.tap_RLD[rows, place], mask

    def writer_states(self, rows_M: torch.Tensor, states_MLD: torch.Tensor) -> torch.Tensor:
        """What the writer reads of the blocks just completed, given their tap states: these, or last hidden states."""
        if self.top_RLD is None:
            return states_MLD
        place = self.block_start_R[rows_M, None] + torch.arange(self.block_size, device=self.device)
        return self.top_RLD[rows_M[:, None], place.clamp(max=self.max_new_tokens - 1) + 1]

    def own_text(self, rows_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tap states `[M, L, D]` of everything the rows have written, and which places are filled `[M, L]`."""
        longest = int(self.fed_R[rows_M].max())
        places = torch.arange(longest, device=self.device)
        return self.tap_RLD[rows_M, 1 : longest + 1], places[None, :] < self.fed_R[rows_M, None]

    def choose(self, rows_M: torch.Tensor, tokens_M: torch.Tensor) -> None:
        """Appends a chosen token to each of the rows; it is consumed by the next trunk call."""
        self.tokens_RL[rows_M, self.fed_R[rows_M]] = tokens_M
        self.next_R[rows_M] = tokens_M

    def commit(self, rows_M: torch.Tensor) -> list[Section]:
        """Moves the commit frontier behind the block just completed; returns the rows' sections."""
        places = torch.stack([rows_M, self.block_start_R[rows_M], self.fed_R[rows_M]], dim=1).tolist()
        for (row, start, end), tokens in zip(places, self.tokens_RL[rows_M].tolist(), strict=True):
            self.sections[row].tokens.extend(tokens[start:end])
            self.sections[row].blocks.append((start, end))
        self.block_start_R[rows_M] = self.fed_R[rows_M]
        self.round_R[rows_M] += 1
        self.attempt_R[rows_M] = 0
        self.waiting_R[rows_M] = False
        self.any_waiting = self.any_waiting and bool(self.waiting_R.any())
        return [self.sections[row] for row, _, _ in places]

    def withdraw(self, rows_M: torch.Tensor) -> None:
        """Takes the rows back to the token before their block: tokens, cache, mask and positions in one event."""
        counts_R = torch.zeros_like(self.fed_R)
        counts_R[rows_M] = self.fed_R[rows_M] - self.block_start_R[rows_M]
        self.rollback(counts_R)
        self.fed_R = self.fed_R - counts_R
        self.attempt_R[rows_M] += 1
        self.stop_R[rows_M] = False
        for row in rows_M.tolist():
            self.sections[row].retries += 1

    def wait(self, rows_M: torch.Tensor) -> None:
        """Lets rows stand still with the block just completed."""
        self.attempt_R[rows_M] += 1
        self.waiting_R[rows_M] = self.any_waiting = True

    def repeat_waiting(self) -> None:
        """Takes the token just consumed back from the rows that wait: they consume it again in the next call."""
        counts_R = self.waiting_R.long()
        self.rollback(counts_R)
        self.fed_R = self.fed_R - counts_R

    def ending(self, eos_ids: torch.Tensor) -> torch.Tensor:
        """Rows `[R]` whose section ends with the token just consumed."""
        return torch.isin(self.next_R, eos_ids) | (self.fed_R >= self.max_new_tokens) | self.stop_R

    def finish(self, rows_M: torch.Tensor, eos_ids: torch.Tensor) -> None:
        """Ends rows; one whose last token is EOS is finished."""
        if rows_M.numel() == 0:
            return
        self.live_R = self.live_R.clone()
        self.live_R[rows_M] = False
        eos = set(eos_ids.tolist())
        for row in rows_M.tolist():
            self.live_rows.remove(row)
            self.sections[row].finished = self.sections[row].tokens[-1] in eos

    def histories(self, rows_M: torch.Tensor) -> list[torch.Tensor]:
        """Prompt, header and section of every row, without padding."""
        result = []
        for row, fed in zip(rows_M.tolist(), self.fed_R[rows_M].tolist(), strict=True):
            result.append(torch.cat([self.starts[row], self.tokens_RL[row, :fed]]))
        return result
