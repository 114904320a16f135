"""Model stock (Jang et al., 2024, arXiv:2403.19522)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView, grams


@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    r"""Moves from the base towards the mean of the models, by as much as their differences agree.

    For each tensor :math:`\theta = t\, \bar\theta + (1 - t)\, \theta_0` with
    :math:`t = N \cos\theta / (1 + (N - 1) \cos\theta)`, where the cosine is the mean over pairs of differences to the
    base; t is kept in [0, 1].
    """

    name: ClassVar[str] = "model_stock"
    needs_base: ClassVar[bool] = True

    def check(self, num_models: int) -> None:
        """Checks that there are at least two models."""
        if num_models < 2:
            raise ValueError(f"model_stock compares at least 2 models, and was given {num_models}")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Computes the ratio from the cosines of the differences."""
        cosines_MM = grams(view, of_deltas=True).cosines_MM()
        count = len(cosines_MM)
        mean = float((cosines_MM.sum() - cosines_MM.trace()) / (count * (count - 1)))
        if mean <= 0:
            return 0.0
        return min(1.0, count * mean / (1 + (count - 1) * mean))

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Interpolates one block between the base and the mean."""
        assert block.base_RC is not None
        return block.base_RC.lerp(block.models_MRC.mean(0), observed)
