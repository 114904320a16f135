"""Geometric median: the point with the least sum of distances to all models (Weiszfeld, 1937)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...utils.validation import check_count, check_positive
from .base import Block, Method, TensorView, grams, shares_of, weighted_sum


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Method):
    r"""Minimises the weighted sum of distances to the models for each tensor, so that an outlier counts little.

    :math:`\theta = \arg\min_\theta \sum_i w_i \lVert \theta - \theta_i \rVert`, by Weiszfeld's iteration
    with the step of Vardi and Zhang (2000) for iterates that meet a model. As every iterate is a combination of the
    models, only their inner products are needed.

    Args:
        weights: one positive number per model; all equal by default.
        max_iterations: at least 1.
        tolerance: change of the coefficients at which the iteration ends, above 0.
    """

    name: ClassVar[str] = "geometric_median"
    needs_positive: ClassVar[str] = "a median"
    weights: tuple[float, ...] | None = None
    max_iterations: int = 10_000
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_iterations", self.max_iterations, "10000 is ample")
        check_positive("tolerance", self.tolerance, "1e-12 is usual")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the coefficients of the models in the median."""
        products_MM = grams(view).products_MM
        shares_M = shares_of(self.weights, products_MM)
        return median_coefficients(products_MM, shares_M, self.max_iterations, self.tolerance)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Combines one block."""
        return weighted_sum(torch.tensor(observed, dtype=block.models_MRC.dtype), block.models_MRC)


def median_coefficients(products_MM: Tensor, weights_M: Tensor, most: int, tolerance: float) -> list[float]:
    """Finds the coefficients of points in their geometric median, from their inner products in fp64."""
    squares_M = products_MM.diagonal()
    scale = float(squares_M.max().sqrt()) or 1.0
    mean_M = weights_M.clone()
    for _ in range(most):
        inner = mean_M @ products_MM @ mean_M
        distances_M = (squares_M - 2 * products_MM @ mean_M + inner).clamp(min=0).sqrt()
        meets_M = distances_M < 1e-9 * scale
        pulls_M = torch.where(meets_M, 0.0, weights_M / distances_M.clamp(min=1e-300))
        if float(pulls_M.sum()) == 0:
            break  # all models are equal
        target_M = pulls_M / pulls_M.sum()

        # An iterate on a model stays if the pull of the others is weaker than that model's own weight.
        if bool(meets_M.any()):
            towards_M = pulls_M - pulls_M.sum() * mean_M
            pull = float((towards_M @ products_MM @ towards_M).clamp(min=0).sqrt())
            own = float(weights_M[meets_M].sum())
            share = 1.0 if pull == 0 else min(1.0, own / pull)
            target_M = (1 - share) * target_M + share * mean_M
        change = float((target_M - mean_M).abs().max())
        mean_M = target_M
        if change < tolerance:
            break
    return [float(coefficient) for coefficient in mean_M]
