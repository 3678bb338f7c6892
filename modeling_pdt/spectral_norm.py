"""Largest singular values of weights, found without a decomposition of the whole matrix, and kept below a limit."""

import torch

DIRECTIONS = 8
ITERATIONS = 12


@torch.no_grad()
def largest_singular_value(matrix: torch.Tensor) -> torch.Tensor:
    """
    By subspace iteration from a fixed start: a function of the matrix alone, never above the true value.

    Args:
        matrix (`torch.Tensor` of shape `[..., rows, columns]`): Read in float32.

    Returns:
        `torch.Tensor` of shape `[...]`.
    """
    matrix = matrix.detach().float()
    columns = matrix.shape[-1]
    count = min(DIRECTIONS, *matrix.shape[-2:])
    start = torch.arange(1, columns * count + 1, device=matrix.device, dtype=torch.float32).sin()
    basis = torch.linalg.qr(start.view(columns, count)).Q.expand(*matrix.shape[:-2], columns, count)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.mT @ (matrix @ basis)).Q
    return torch.linalg.matrix_norm(matrix @ basis, ord=2)


@torch.no_grad()
def limit_spectral_norm(weight: torch.Tensor, limit: float) -> None:
    """
    Scales every matrix of `weight` whose largest singular value exceeds `limit` down to it, in place.

    Args:
        weight (`torch.Tensor` of shape `[..., rows, columns]`): Left as it is where it has no values (meta device).
        limit (`float`): Above 0.
    """
    if weight.is_meta:
        return
    excess = (largest_singular_value(weight) / limit)[..., None, None]
    weight.copy_(torch.where(excess > 1.0 + 1e-6, weight / excess.clamp(min=1e-12), weight))
