"""Karcher mean: the point of the sphere with the least sum of squared arcs to all models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...utils.validation import check_count, check_positive
from .base import Block, Method, TensorView, grams, shares_of, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Karcher(Method):
    r"""Riemannian mean of the directions of each tensor, times the weighted mean of their norms.

    On the unit sphere the mean :math:`\mu` is where :math:`\sum_i w_i \log_\mu(u_i) = 0` (Karcher, 1977). It is found
    by the fixed-point iteration :math:`\mu \leftarrow \exp_\mu(\sum_i w_i \log_\mu u_i)` from the normalised mean. As
    every iterate is a combination of the models, only their inner products are needed: a tensor is read twice,
    whatever the number of iterations. For two models with equal weights it is the middle of the arc.

    Args:
        weights: one positive number per model; all equal by default.
        max_iterations: at least 1.
        tolerance: length of the mean logarithm at which the iteration ends, above 0.

    Raises:
        ValueError: the directions of a tensor have no mean: they cancel, or do not converge.
    """

    name: ClassVar[str] = "karcher"
    needs_positive: ClassVar[str] = "a mean on the sphere"
    weights: tuple[float, ...] | None = None
    max_iterations: int = 1000
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_iterations", self.max_iterations, "1000 is ample")
        check_positive("tolerance", self.tolerance, "1e-10 is usual")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the coefficients of the models in the mean."""
        found = grams(view)
        weights_M = shares_of(self.weights, found.norms_M)
        norm = float(weights_M @ found.norms_M)
        if view.elements == 1 or float(found.norms_M.min()) == 0:
            return weights_M.tolist()  # no directions to average
        coefficients_M = mean_direction(found.cosines_MM(), weights_M, self.max_iterations, self.tolerance, view.name)
        return (coefficients_M / found.norms_M * norm).tolist()

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Combines one block."""
        return weighted_sum(torch.tensor(observed, dtype=block.models_MRC.dtype), block.models_MRC)


def mean_direction(cosines_MM: Tensor, weights_M: Tensor, most: int, tolerance: float, name: str) -> Tensor:
    """Finds the coefficients of unit vectors in their Karcher mean, from their inner products.

    Args:
        cosines_MM: inner products of the unit vectors, in fp64.
        weights_M: positive, with the sum 1.
        most: maximum number of iterations.
        tolerance: length of the mean logarithm at which to stop.
        name: of the tensor, for errors.
    """
    mean_M = weights_M.clone()
    length = float((mean_M @ cosines_MM @ mean_M).clamp(min=0).sqrt())
    if length < 1e-6:
        raise ValueError(f"the directions of the tensor {name!r} cancel, and have no mean: use method='linear'")
    mean_M = mean_M / length
    for _ in range(most):
        # The logarithm of u_i at the mean: its part across the mean, scaled to the angle between both.
        along_M = (cosines_MM @ mean_M).clamp(-1, 1)
        angles_M = along_M.acos()
        sines_M = (1 - along_M.square()).clamp(min=0).sqrt()
        stretch_M = torch.where(sines_M > 1e-9, angles_M / sines_M.clamp(min=1e-9), 1.0) * weights_M
        step_M = stretch_M - (stretch_M @ along_M) * mean_M
        size = float((step_M @ cosines_MM @ step_M).clamp(min=0).sqrt())
        if size < tolerance:
            return mean_M
        angle = torch.tensor(size, dtype=mean_M.dtype)
        mean_M = angle.cos() * mean_M + angle.sin() / size * step_M
        mean_M = mean_M / (mean_M @ cosines_MM @ mean_M).sqrt()
    raise ValueError(
        f"the directions of the tensor {name!r} did not converge to a mean in {most} iterations (left: {size:.1e}): "
        "they are too far apart; use method='linear'"
    )
