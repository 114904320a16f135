"""Task arithmetic (Ilharco et al., 2022, arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView, weighted_sum, weights_of


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    r"""Adds differences to the base: :math:`\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)`.

    Args:
        weights: one per model; 1 each by default. Negative ones remove what a model learned.
        scale: lambda; 0 gives the base.
    """

    name: ClassVar[str] = "task_arithmetic"
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Adds the weighted differences of one block."""
        return add_deltas(block, block.deltas_MRC, self.weights, self.scale)


def add_deltas(block: Block, deltas_MRC: Tensor, weights: Sequence[float] | None, scale: float) -> Tensor:
    """Adds weighted differences to a block of the base.

    Args:
        block: with the base.
        deltas_MRC: differences of every model, or what a method keeps of them.
        weights: one per model; 1 each by default.
        scale: lambda.
    """
    assert block.base_RC is not None
    return block.base_RC + scale * weighted_sum(weights_of(weights, deltas_MRC), deltas_MRC)
