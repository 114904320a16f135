r"""Opinion pools: the next token's distribution of several models as one, and the weights of greatest likelihood.

With the models' distributions :math:`p_m` and weights :math:`w_m \ge 0` that sum to 1,

- *arithmetic* (linear pool, Stone, 1961): :math:`p = \sum_m w_m p_m`, a mean of probabilities;
- *geometric* (logarithmic pool, Genest and Zidek, 1986): :math:`p \propto \prod_m p_m^{w_m}`, a mean of logits;
- *vote*: :math:`p` is the weight of the models whose most likely token it is.

Legend: M models, N rows, L and T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Pooling = Literal["arithmetic", "geometric", "vote"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
# Breaks ties of greedy votes; far below the difference that one vote makes.
_TIE = 1e-5
# Masked tokens have a log-probability of minus infinity, which has no mean.
_LEAST = -1e4


def pooled_scores(scores_MNV: Tensor, weights_M: Tensor, pooling: Pooling, *, greedy: bool = False) -> Tensor:
    """Combines the scores of several models to those of one.

    Args:
        scores_MNV: of each model, normalised or not.
        weights_M: above 0, with the sum 1.
        pooling: ``arithmetic``, ``geometric`` or ``vote``.
        greedy: whether the most likely token is taken: a tie of votes then goes to the token that is more likely in
            the mean of probabilities.

    Returns:
        Scores whose softmax is the pooled distribution, ``(N, V)``. Those of equal models are that model's own, so
        that a repetition penalty, which reads more than the distribution, does the same.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
        >>> pooled_scores(scores, torch.tensor([0.5, 0.5]), "arithmetic").softmax(-1)
        tensor([[0.7000, 0.3000]])
        >>> pooled_scores(scores, torch.tensor([0.5, 0.5]), "geometric").softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    weights_M11 = weights_M.to(scores_MNV)[:, None, None]
    if pooling == "geometric":
        return (weights_M11 * scores_MNV).sum(0)
    logprobs_MNV = scores_MNV.log_softmax(-1)
    mixed_NV = (logprobs_MNV + weights_M11.log()).logsumexp(0)
    if pooling == "arithmetic":
        # On the scale of the models' own scores.
        return mixed_NV + (weights_M11[..., 0] * scores_MNV.logsumexp(-1)).sum(0)[:, None]

    # Scores that are not finite would have a most likely token as well.
    broken_N1 = ~torch.isfinite(scores_MNV.amax(-1)).all(0)[:, None]
    votes_NM = scores_MNV.argmax(-1).T
    shares_NV = torch.zeros_like(mixed_NV).scatter_add_(1, votes_NM, weights_M11[:, :, 0].T.expand(votes_NM.shape))
    voted_NV = shares_NV.log()
    if greedy:
        voted_NV += _TIE * mixed_NV.exp()
    return voted_NV.masked_fill(broken_N1, math.nan)


# Weights of greatest likelihood.


class Point(NamedTuple):
    """A concave function at one point.

    Args:
        value: of the function.
        gradient_M: its gradient.
        hessian_MM: its second derivatives.
    """

    value: float
    gradient_M: Tensor
    hessian_MM: Tensor


Objective = Callable[[Tensor], Point]


def arithmetic_likelihood(logprobs_TM: Tensor, weights_T: Tensor) -> Objective:
    r"""Returns the mean log-likelihood of an arithmetic pool, :math:`\sum_t c_t \log \sum_m w_m p_m(y_t)`.

    Args:
        logprobs_TM: log-probability of each token under each model, in fp64.
        weights_T: what each token counts, with the sum 1.
    """

    def at(weights_M: Tensor) -> Point:
        mixed_T = (logprobs_TM + weights_M.log()).logsumexp(-1)
        ratios_TM = (logprobs_TM - mixed_T[:, None]).exp()
        weighted_TM = ratios_TM * weights_T[:, None]
        return Point(float(weights_T @ mixed_T), weighted_TM.sum(0), -weighted_TM.T @ ratios_TM)

    return at


def geometric_likelihood(read: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]) -> Objective:
    r"""Returns the mean log-likelihood of a geometric pool.

    :math:`\sum_t c_t [\sum_m w_m \log p_m(y_t) - \log \sum_v \exp \sum_m w_m \log p_m(v)]`; its second derivatives are
    minus the covariances of the models' log-probabilities under the pool.

    Args:
        read: yields, each time that it is called, parts of all tokens: log-probabilities of the whole vocabulary
            ``(M, L, V)``, the tokens ``(L,)``, and what they count ``(L,)``, with the sum 1 over all parts.
    """

    def at(weights_M: Tensor) -> Point:
        value, gradient_M = 0.0, torch.zeros_like(weights_M)
        hessian_MM = weights_M.new_zeros(len(weights_M), len(weights_M))
        for given_MLV, tokens_L, counts_L in read():
            logprobs_MLV = given_MLV.double().clamp(min=_LEAST)
            scores_LV = torch.einsum("m,mlv->lv", weights_M, logprobs_MLV)
            pool_LV, totals_L = scores_LV.softmax(-1), scores_LV.logsumexp(-1)
            chosen_L1 = tokens_L[:, None]
            value += float(counts_L @ (scores_LV.gather(-1, chosen_L1)[:, 0] - totals_L))
            means_ML = (pool_LV * logprobs_MLV).sum(-1)
            own_ML = logprobs_MLV.gather(-1, chosen_L1.expand(len(weights_M), -1, -1))[..., 0]
            gradient_M += (own_ML - means_ML) @ counts_L
            centred_MLV = logprobs_MLV - means_ML[..., None]
            hessian_MM -= torch.einsum("lv,mlv,nlv->mn", pool_LV * counts_L[:, None], centred_MLV, centred_MLV)
        return Point(value, gradient_M, hessian_MM)

    return at


def maximize_on_simplex(objective: Objective, count: int, *, tolerance: float = 1e-11, most: int = 60) -> Tensor:
    """Maximises a concave function of weights that are at least 0 and sum to 1, by Newton's method.

    Each step maximises the quadratic approximation within these bounds and is halved until the function rises enough.
    It ends where the function is within ``tolerance`` of its maximum, which the gradient bounds: a concave function
    lies below its tangent.

    Args:
        objective: the function.
        count: number of weights.
        tolerance: distance to the maximum.
        most: largest number of steps.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.1, 0.9]], dtype=torch.float64)
        >>> likelihood = arithmetic_likelihood(probabilities.log(), torch.full((4,), 0.25, dtype=torch.float64))
        >>> [round(weight, 6) for weight in maximize_on_simplex(likelihood, 2).tolist()]  # 0.1 + 0.8 w = 3/4
        [0.8125, 0.1875]
    """
    weights_M = torch.full((count,), 1 / count, dtype=torch.float64)
    point = objective(weights_M)
    for _ in range(most):
        if float(point.gradient_M.max() - weights_M @ point.gradient_M) <= tolerance:
            break
        direction_M = _quadratic_maximum(weights_M, point) - weights_M
        rise = float(point.gradient_M @ direction_M)
        size, found = 1.0, None
        while size > 1e-8:
            candidate_M = weights_M + size * direction_M
            found = objective(candidate_M)
            if found.value >= point.value + 1e-4 * size * rise:
                break
            size, found = size / 2, None
        if found is None:  # rounding allows no further rise
            break
        weights_M, point = candidate_M, found
    return weights_M.clamp(min=0) / weights_M.clamp(min=0).sum()


def _quadratic_maximum(weights_M: Tensor, point: Point) -> Tensor:
    """Maximises the quadratic approximation at a point: moves mass between the two weights that gain most by it."""
    found_M = weights_M.clone()
    for _ in range(1000):
        slope_M = point.gradient_M + point.hessian_MM @ (found_M - weights_M)
        to = int(slope_M.argmax())
        origin = int(slope_M.masked_fill(found_M <= 0, math.inf).argmin())
        gain = float(slope_M[to] - slope_M[origin])
        if gain <= 1e-14:
            break
        move_M = torch.zeros_like(found_M)
        move_M[to], move_M[origin] = 1.0, -1.0
        curvature = -float(move_M @ point.hessian_MM @ move_M)
        mass = min(float(found_M[origin]), gain / curvature if curvature > 0 else math.inf)
        found_M += mass * move_M
    return found_M
