"""The critic's loss, and the variance of the returns that it explains.

Shapes: N sampled tokens of all sequences, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.validation import check_positive, check_same_shape


def _squared_errors(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    check_same_shape("N", values_N=values_N, old_values_N=old_values_N, returns_N=returns_N)
    if cliprange is not None:
        check_positive("cliprange", cliprange, "0.2 is usual")
    errors_N = (values_N - returns_N).square()
    if cliprange is None:
        return errors_N, errors_N
    moved_N = values_N - old_values_N
    # Within the range, the value itself: old + (value - old) would differ from it by rounding.
    clipped_N = torch.where(moved_N.abs() > cliprange, old_values_N + moved_N.clamp(-cliprange, cliprange), values_N)
    return errors_N, (clipped_N - returns_N).square()


def value_clipped(
    values_N: Tensor, *, old_values_N: Tensor, returns_N: Tensor, cliprange: float | None = 0.2
) -> Tensor:
    """Marks by 1 the values whose loss is that of the clipped value, which has no gradient; else 0, (N,).

    Args:
        values_N: as for ``value_loss``.
        old_values_N: as for ``value_loss``.
        returns_N: as for ``value_loss``.
        cliprange: as for ``value_loss``.

    Example:
        >>> one = torch.ones(1)
        >>> value_clipped(0.5 * one, old_values_N=0 * one, returns_N=one, cliprange=0.2)
        tensor([1.])
    """
    errors_N, clipped_errors_N = _squared_errors(values_N.detach(), old_values_N, returns_N, cliprange)
    return (clipped_errors_N > errors_N).to(values_N.dtype)


def value_loss(values_N: Tensor, *, old_values_N: Tensor, returns_N: Tensor, cliprange: float | None = 0.2) -> Tensor:
    """Computes the clipped squared error of the critic, one value per token.

    Paper: PPO as implemented by its authors, described in Implementation Matters in Deep Policy Gradients (Engstrom et
    al., 2020, arXiv:2005.12729): max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2.

    Args:
        values_N: the critic's values, (N,).
        old_values_N: its values when the tokens were sampled, (N,).
        returns_N: targets, advantages plus old values, (N,).
        cliprange: distance from its old value up to which a value can lower the loss, above 0; ``None`` is the plain
            squared error.

    Returns:
        Losses (N,).

    Raises:
        ValueError: for a range of 0 or below.

    Example:
        >>> one = torch.ones(1)
        >>> value_loss(0.5 * one, old_values_N=0 * one, returns_N=one, cliprange=0.2)
        tensor([0.3200])
    """
    errors_N, clipped_errors_N = _squared_errors(values_N, old_values_N, returns_N, cliprange)
    return torch.maximum(errors_N, clipped_errors_N) / 2


def explained_variance_sums(values_N: Tensor, *, returns_N: Tensor) -> Tensor:
    """Computes the sums for ``explained_variance``, to be added over micro-batches and ranks.

    Args:
        values_N: the critic's values, (N,).
        returns_N: targets, (N,).

    Returns:
        Number of tokens, sum and sum of squares of the returns, and of the errors; (5,) in fp64, because variances
        from sums cancel.

    Example:
        >>> explained_variance_sums(torch.tensor([0.0, 1.0]), returns_N=torch.tensor([1.0, 3.0])).tolist()
        [2.0, 4.0, 10.0, 3.0, 5.0]
    """
    returns = returns_N.detach().double()
    errors = returns - values_N.detach().double()
    count = torch.full((), returns.numel(), dtype=torch.float64, device=returns.device)
    return torch.stack([count, returns.sum(), returns.square().sum(), errors.sum(), errors.square().sum()])


def explained_variance(sums: Tensor) -> Tensor:
    """Computes the share of the returns' variance that the critic explains: 1 - Var(R - V) / Var(R).

    Args:
        sums: from ``explained_variance_sums``, (5,), added over all parts of the global batch.

    Returns:
        A scalar: 1 is a perfect critic, 0 one as good as a constant, below 0 one that is worse; NaN where all returns
        are equal or missing.

    Example:
        >>> returns = torch.tensor([1.0, 2.0, 3.0])
        >>> explained_variance(explained_variance_sums(returns + 0.5, returns_N=returns))
        tensor(1., dtype=torch.float64)
    """
    count, returns, returns_squared, errors, errors_squared = sums.unbind()
    variance = returns_squared - returns.square() / count
    error_variance = errors_squared - errors.square() / count
    # Rounding leaves a small variance where equal returns have none.
    is_constant = variance <= 1e-12 * returns_squared
    return torch.where(is_constant, torch.full_like(variance, torch.nan), 1 - error_variance / variance)
