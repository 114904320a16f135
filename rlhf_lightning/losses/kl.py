"""Per-token estimators of the divergence of the policy from a reference.

Shapes: N sampled tokens of all sequences, flat.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor

from ..utils.validation import check_choice, check_same_shape
from ._stable import bounded_exp

KLEstimator = Literal["k1", "k2", "k3"]

KL_ESTIMATORS: Final[tuple[KLEstimator, ...]] = get_args(KLEstimator)

# Below this magnitude exp(x) - 1 - x loses digits to cancellation and its series is used; the first omitted term is
# below the rounding of fp64 there.
_SERIES_BELOW: Final = 0.5
_SERIES_LAST: Final = 14


def _exp_minus_tangent(exponent: Tensor) -> Tensor:
    """Computes exp(x) - 1 - x to full relative precision, never negative."""
    is_small = exponent.abs() < _SERIES_BELOW
    # The branch not taken must stay finite too, or the gradient becomes NaN.
    small = torch.where(is_small, exponent, torch.zeros_like(exponent))
    series = torch.ones_like(small)
    for order in range(_SERIES_LAST, 2, -1):
        series = 1 + small / order * series
    return torch.where(is_small, small.square() / 2 * series, bounded_exp(exponent) - 1 - exponent)


def kl_per_token(
    logprobs_N: Tensor,
    *,
    ref_logprobs_N: Tensor,
    estimator: KLEstimator = "k3",
    importance_ratio_N: Tensor | None = None,
) -> Tensor:
    """Estimates KL(policy || reference) from the sampled tokens, one value per token.

    Papers: Approximating KL Divergence (Schulman, 2020) for the estimators; DeepSeek-V3.2 (2025, arXiv:2512.02556),
    eq. 7, for the importance ratio. With r = log p - log ref:

    =========  =================  ==================================  ======================================
    estimator  value              expected gradient, on policy        expected gradient, with the ratio
    =========  =================  ==================================  ======================================
    ``k1``     r                  0: of no use as a loss              that of KL(policy || reference)
    ``k2``     r^2 / 2            that of KL(policy || reference)     that of the expectation of r^2 / 2
    ``k3``     e^-r - 1 + r       that of KL(reference || policy)     that of KL(policy || reference)
    =========  =================  ==================================  ======================================

    A loss differentiates the value at the sampled token but not the probability of sampling it. Multiplying by the
    differentiable ratio of the policy to the one that sampled (1 in value on policy) restores that part.

    No clamps: ``k3`` is computed from its series near r = 0, where the formula cancels, and grows linearly instead of
    exponentially for r below -30, where it would overflow.

    Args:
        logprobs_N: the policy's log-probability of each sampled token, (N,).
        ref_logprobs_N: the reference's, (N,).
        estimator: ``k1`` (unbiased, any sign), ``k2`` (biased, low variance) or ``k3`` (unbiased, never negative).
        importance_ratio_N: p / p_old with its gradient, from ``importance_ratio``, (N,); ``None`` for none.

    Returns:
        Estimates (N,).

    Raises:
        ValueError: for an estimator that does not exist.

    Example:
        >>> kl_per_token(torch.tensor([-1.0]), ref_logprobs_N=torch.tensor([-1.5]), estimator="k3")
        tensor([0.1065])
    """
    check_choice("kl estimator", estimator, KL_ESTIMATORS)
    check_same_shape("N", logprobs_N=logprobs_N, ref_logprobs_N=ref_logprobs_N, importance_ratio_N=importance_ratio_N)
    log_ratio_N = logprobs_N - ref_logprobs_N
    if estimator == "k1":
        kl_N = log_ratio_N
    elif estimator == "k2":
        kl_N = log_ratio_N.square() / 2
    else:
        kl_N = _exp_minus_tangent(-log_ratio_N)
    return kl_N if importance_ratio_N is None else kl_N * importance_ratio_N
