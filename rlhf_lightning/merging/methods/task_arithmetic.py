"""Task arithmetic (Ilharco et al., 2022, arXiv:2212.04089)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, TensorView, Weighted
from .linear import weighted_sum


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Weighted):
    r"""Adds differences to the base: :math:`\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)`.

    Args:
        weights: one per model; 1 each by default. Negative ones remove what a model learned.
        scale: lambda; 0 gives the base.
    """

    name: ClassVar[str] = "task_arithmetic"
    needs_base: ClassVar[bool] = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be a finite number (1 is usual, 0 gives the base)")

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Returns the differences to add, ``(M, R, C)``; subclasses remove some of their entries."""
        return block.deltas_MRC

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Adds the weighted differences of one block."""
        assert block.base_RC is not None
        deltas_MRC = self.sparse(block, view, observed)
        return block.base_RC + self.scale * weighted_sum(self.weights_M(deltas_MRC), deltas_MRC)
