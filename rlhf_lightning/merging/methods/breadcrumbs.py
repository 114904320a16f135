"""Model breadcrumbs: drop the largest and the smallest differences (Davari & Belilovsky, 2023, arXiv:2312.06795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView
from .magnitude import trim, trimmers_of
from .task_arithmetic import add_deltas


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    r"""Removes the outliers and the smallest differences of every tensor, and adds the others to the base.

    Of n entries the :math:`\lfloor \gamma n \rfloor` largest are dropped, and of the rest all but the
    :math:`\lfloor k n \rfloor` largest; nothing is rescaled.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        density: k, the fraction that is kept, in (0, 1].
        gamma: fraction of outliers that is dropped, in [0, 1 - density].
    """

    name: ClassVar[str] = "breadcrumbs"
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    density: float = 0.9
    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1 - self.density + 1e-12:
            raise ValueError(
                f"gamma is {self.gamma} with density={self.density}; it must be in [0, {1 - self.density:.4g}], "
                "1 - density"
            )

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the thresholds of outliers and of what is kept."""
        outliers = int(self.gamma * view.elements)
        kept = min(view.elements, outliers + int(self.density * view.elements))
        return trimmers_of(view, kept), trimmers_of(view, outliers)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Adds the differences between the two thresholds."""
        kept, outliers = observed
        return add_deltas(block, trim(block, kept) - trim(block, outliers), self.weights, self.scale)
