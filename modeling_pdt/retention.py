"""Retention: which of a stream's older rounds stay readable when there are more than the bus has places for.

Letters: M readers or rows, S streams, V rounds, K notes per block, N note width.
"""

import torch

RETENTION_MODES = ("fifo", "scored", "compressed", "hybrid")
RETENTION_SCORES = ("novelty", "attention")


def retained_places(retention: str, capacity: int) -> tuple[int, int, int]:
    """
    How the `capacity` places of every producer are shared out.

    - `"fifo"`: the newest rounds.
    - `"scored"`: the newest half (rounded up); the others go to the older rounds with the highest score.
    - `"compressed"`: one place holds the mean of all rounds that have no place of their own; the others the newest.
    - `"hybrid"`: one place for the mean; of the others the newest half (rounded up), then the highest score.

    Returns:
        `(recent, scored, merged)`, which add up to `capacity`.
    """
    merged = int(retention in ("compressed", "hybrid"))
    places = capacity - merged
    scored = places // 2 if retention in ("scored", "hybrid") else 0
    return places - scored, scored, merged


def novelty(
    notes_MKN: torch.Tensor, earlier_MVKN: torch.Tensor, published_MV: torch.Tensor, round_M: torch.Tensor
) -> torch.Tensor:
    """
    How little the notes of a round resemble what their stream published before: 1 - max over earlier rounds of the
    cosine between the rounds' mean notes; 1 for a first round.

    Args:
        notes_MKN (`torch.Tensor` of shape `[M, K, N]`): Notes of the rounds `round_M`.
        earlier_MVKN, published_MV (`torch.Tensor` of shape `[M, V, K, N]` and `[M, V]`): The stream's stored rounds.
        round_M (`torch.LongTensor` of shape `[M]`): Only rounds before these count.

    Returns:
        `torch.Tensor` of shape `[M]`, in [0, 2].
    """
    mean = notes_MKN.float().mean(dim=1)[:, None]
    cosine = torch.nn.functional.cosine_similarity(mean, earlier_MVKN.float().mean(dim=2), dim=-1)
    before = published_MV & (torch.arange(published_MV.shape[1], device=round_M.device) < round_M[:, None])
    highest = cosine.masked_fill(~before, float("-inf")).amax(dim=1)
    return 1 - torch.where(before.any(dim=1), highest, 0.0)


def select_older(old_MSV: torch.Tensor, score_MSV: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The old rounds with the highest scores, in order of writing; the earlier of equals.

    Args:
        old_MSV (`torch.BoolTensor` of shape `[M, S, V]`): Rounds to choose from.
        score_MSV (`torch.Tensor` of shape `[M, S, V]`): Their scores.
        places (`int`): How many to choose, at most V.

    Returns:
        `(rounds, rest)`: `[M, S, places]` with -1 where there are fewer, and the old rounds not chosen `[M, S, V]`.
    """
    order = score_MSV.masked_fill(~old_MSV, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    index = order[..., :places]
    chosen = torch.zeros_like(old_MSV).scatter(-1, index, True) & old_MSV
    return torch.where(old_MSV.gather(-1, index), index, -1).sort(dim=-1).values, old_MSV & ~chosen


def merge_rounds(notes_MSVKN: torch.Tensor, rest_MSV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One round in place of many: the mean of their notes, brought back to the mean of their norms.

    Returns:
        `(notes, version)`: `[M, S, 1, K, N]`, and `[M, S, 1]`, the newest round in it or -1 for none.
    """
    weight = rest_MSV.to(notes_MSVKN)[..., None, None]
    count = weight.sum(dim=2, keepdim=True).clamp(min=1)
    mean = (notes_MSVKN * weight).sum(dim=2, keepdim=True) / count
    norm = (notes_MSVKN.norm(dim=-1, keepdim=True) * weight).sum(dim=2, keepdim=True) / count
    scale = norm / mean.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    version = torch.where(rest_MSV, torch.arange(rest_MSV.shape[2], device=rest_MSV.device), -1)
    return mean * scale, version.amax(dim=2, keepdim=True)
