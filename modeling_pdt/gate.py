"""The commit gate: what a completed block is judged by, and which rows write theirs again.

Letters: M rows at a block boundary, L block tokens, W notes, P plan items, N note width, D trunk width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .bus import NotesBus
from .heads import PDTHeads, soft_minimum
from .plan import PlanEntry


def coverage_of(
    heads: PDTHeads, text_MLD: torch.Tensor, mask_ML: torch.Tensor, items_MPN: torch.Tensor
) -> torch.Tensor:
    """Probability `[M, P]` that the rows' text so far covers each plan item."""
    return heads.coverage(text_MLD, mask_ML[:, None, :], items_MPN)[:, 0].sigmoid()


def best_items(coverage_MP: torch.Tensor | None, present_MP: torch.Tensor | None) -> torch.Tensor | None:
    """The plan item `[M]`, of those present, that each row covers best; the first of equals."""
    return None if coverage_MP is None else coverage_MP.masked_fill(~present_MP, -1).argmax(dim=1)


def own_coverage(
    rows_M: torch.Tensor, coverage_MP: torch.Tensor | None, entries: list[list[PlanEntry]], num_streams: int
) -> list[dict[int, float]]:
    """Per row, the coverage of the items (`entries` of every prompt) that its stream owns, or that nobody owns."""
    if coverage_MP is None:
        return [{} for _ in rows_M]
    result = []
    for row, values in zip(rows_M.tolist(), coverage_MP.tolist(), strict=True):
        prompt, stream = divmod(row, num_streams)
        owned = enumerate(entries[prompt])
        result.append({index: values[index] for index, entry in owned if entry.stream in (None, stream)})
    return result


def agreement_of(
    heads: PDTHeads,
    states_MLD: torch.Tensor,
    previous_MLD: torch.Tensor,
    mask_ML: torch.Tensor,
    notes_MWN: torch.Tensor,
    notes_mask_MW: torch.Tensor,
    own_notes_MKN: torch.Tensor,
    coverage_MP: torch.Tensor | None,
    items_mask_MP: torch.Tensor | None,
    scaling: Sequence[float] | None = None,
) -> torch.Tensor:
    """Probability `[M]` that each block may stand beside the notes given; see [`AgreementHead.token_logits`]."""
    tokens = states_MLD.shape[1]
    coverage = torch.zeros(states_MLD.shape[0], device=states_MLD.device)
    if coverage_MP is not None:
        items = items_mask_MP.float()
        coverage = (coverage_MP * items).sum(-1) / items.sum(-1).clamp(min=1)
    own = own_notes_MKN.mean(dim=1)
    logits = heads.agreement.token_logits(
        states_MLD,
        previous_MLD,
        notes_MWN,
        notes_mask_MW[:, None, :].expand(-1, tokens, -1),
        own[:, None, :].expand(-1, tokens, -1),
        coverage[:, None].expand(-1, tokens),
    )
    return agreement_probability(soft_minimum(logits, mask_ML[:, None, :])[:, 0], scaling)


def agreement_probability(logits: torch.Tensor, scaling: Sequence[float] | None) -> torch.Tensor:
    """Agreements from block logits; `scaling` is `agreement_scaling` of [`PDTGenerationConfig`]."""
    slope, intercept = scaling or (1.0, 0.0)
    return (slope * logits + intercept).sigmoid()


def lowest_failing(agreement_M: torch.Tensor, failing_M: torch.Tensor, prompt_M: torch.Tensor) -> torch.Tensor:
    """Of the failing rows of each prompt, the one with the lowest agreement: indices into M."""
    chosen = {}
    for index in failing_M.nonzero().squeeze(1).tolist():
        prompt = int(prompt_M[index])
        if prompt not in chosen or agreement_M[index] < agreement_M[chosen[prompt]]:
            chosen[prompt] = index
    return torch.tensor(sorted(chosen.values()), dtype=torch.long, device=agreement_M.device)


def judge(
    bus: NotesBus,
    rows_M: torch.Tensor,
    round_M: torch.Tensor,
    may_retry_M: torch.Tensor,
    threshold: float,
    score: Callable[[], torch.Tensor],
    commit_policy: str = "stream",
    may_wait: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Withdraws, one per prompt and pass, the notes of blocks that disagree; the others are judged again without them.
    With `commit_policy="round"` all of a prompt's blocks go in one pass when the lowest agreement fails.

    Args:
        bus (`NotesBus`): Holds the provisional notes of the rows' current round.
        rows_M, round_M (`torch.LongTensor` of shape `[M]`): Rows and the round they completed.
        may_retry_M (`torch.BoolTensor` of shape `[M]`): Rows with a retry left.
        threshold (`float`): Least agreement that stands.
        score (`callable`): `score() -> agreement [M]` against the bus as it is.
        commit_policy (`str`, *optional*, defaults to `"stream"`): `"stream"`, `"round"` or `"stall"`.
        may_wait (`callable`, *optional*): `may_wait(withdrawn [M]) -> [M]`: who of the others may still be withdrawn.

    Returns:
        `(agreement, withdrawn)` of shape `[M]`: the agreement that decided about each row, and who was withdrawn.
    """
    agreement = score()
    withdrawn = torch.zeros_like(may_retry_M)
    prompt_M = rows_M // bus.num_streams
    if commit_policy == "round":
        fails = torch.zeros(int(prompt_M.max()) + 1, dtype=torch.bool, device=rows_M.device)
        fails[prompt_M[(agreement < threshold) & may_retry_M]] = True
        withdrawn = fails[prompt_M] & may_retry_M
        bus.withdraw(rows_M[withdrawn], round_M[withdrawn])
        return agreement, withdrawn
    while True:
        failing = (agreement < threshold) & may_retry_M & ~withdrawn
        if may_wait is not None:
            failing &= may_wait(withdrawn)
        chosen = lowest_failing(agreement, failing, prompt_M)
        if chosen.numel() == 0:
            return agreement, withdrawn
        withdrawn[chosen] = True
        bus.withdraw(rows_M[chosen], round_M[chosen])
        if bool(withdrawn.all()):
            return agreement, withdrawn
        agreement = torch.where(withdrawn, agreement, score())


@dataclass(frozen=True)
class RetryPolicy:
    """
    How a withdrawn block is written again.

    Args:
        max_retries (`int`): Withdrawals of one block.
        retry_policy (`str`): `"refresh"` or `"stale"`, see [`PDTGenerationConfig`].
        retry_temperature (`float`): Factor of the temperature per attempt from the second retry on.
    """

    max_retries: int
    retry_policy: str
    retry_temperature: float

    def may_retry(self, attempt_M: torch.Tensor) -> torch.Tensor:
        """Rows `[M]` whose block may be withdrawn at this attempt."""
        return attempt_M < self.max_retries

    def lag(self, lag_R: torch.Tensor, attempt_R: torch.Tensor) -> torch.Tensor:
        """The lag `[R]` of the notes that rows read at their attempt."""
        return torch.where(attempt_R > 0, 0, lag_R) if self.retry_policy == "refresh" else lag_R

    def temper(self, logits_MV: torch.Tensor, attempt_M: torch.Tensor) -> torch.Tensor:
        """The logits `[M, V]` at the temperature of the attempt."""
        if self.max_retries < 2:
            return logits_MV
        return logits_MV * (1 / self.retry_temperature) ** (attempt_M - 1).clamp(min=0)[:, None]
