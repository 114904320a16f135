"""Fisher-weighted averaging (Matena & Raffel, 2021, arXiv:2111.09832)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...utils.validation import check_positive
from .base import Block, Method, TensorView, weights_of


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    r"""Averages each entry with the models' Fisher information as weights.

    :math:`\theta = \sum_i w_i F_i \theta_i / \sum_i w_i F_i`, with the diagonal
    :math:`F_i = \mathbb{E}_x \mathbb{E}_{y \sim p_i(y|x)} [(\nabla \log p_i(y|x))^2]` of model i, and ``floor`` added
    to every :math:`F_i`, so that entries without information are averaged plainly.

    Args:
        weights: one positive number per model; all equal by default.
        floor: added to the information, above 0, relative to its mean over the tensor's entries and models.
    """

    name: ClassVar[str] = "fisher"
    needs_data: ClassVar[bool] = True
    needs_positive: ClassVar[str] = "Fisher averaging"
    weights: tuple[float, ...] | None = None
    floor: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("floor", self.floor, "1e-6 is usual")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Computes the floor of one tensor."""
        total, count = 0.0, 0
        for block in view.blocks():
            assert block.fisher_MRC is not None
            total += float(block.fisher_MRC.double().sum())
            count += block.fisher_MRC.numel()
        mean = total / max(1, count)
        return self.floor * mean if mean > 0 else 1.0

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Averages one block."""
        assert block.fisher_MRC is not None
        precision_MRC = (block.fisher_MRC + observed) * weights_of(self.weights, block.models_MRC)[:, None, None]
        merged_RC: Tensor = (precision_MRC * block.models_MRC).sum(0) / precision_MRC.sum(0)
        return merged_RC
