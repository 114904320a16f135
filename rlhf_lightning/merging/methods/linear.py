"""Weighted mean of models (model soups, Wortsman et al., 2022, arXiv:2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView, shares_of, weighted_sum, weights_of


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    r"""Weighted mean: :math:`\theta = \sum_i w_i \theta_i / \sum_i w_i`.

    Args:
        weights: one per model; all equal by default.
        normalize: divide by the sum of the weights.

    Raises:
        ValueError: the weights sum to 0 and are to be normalised.

    Example:
        >>> Linear(weights=(1.0, 3.0)).weights
        (1.0, 3.0)
    """

    name: ClassVar[str] = "linear"
    weights: tuple[float, ...] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize and self.weights is not None and sum(self.weights) == 0:
            raise ValueError(f"weights is {list(self.weights)}, whose sum is 0: give others, or normalize=False")

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Averages one block."""
        factors = shares_of if self.normalize else weights_of
        return weighted_sum(factors(self.weights, block.models_MRC), block.models_MRC)
