"""RegMean: the linear layers whose outputs are closest to all models' on their own inputs (arXiv:2212.09849)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...utils.validation import check_not_negative
from .base import Block, Method, TensorView, shares_of, weighted_sum, weights_of


class _Problem(NamedTuple):
    """Inner products of a layer's inputs in every model, the decomposition of their sum, and a solution if whole."""

    products_MCC: Tensor
    factor_CC: Tensor
    solution: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RegMean(Method):
    r"""Solves a least-squares problem for each linear layer; other tensors are averaged.

    :math:`W = \arg\min_W \sum_i w_i\, \mathbb{E}_x \lVert W x_i - W_i x_i \rVert^2 = (\sum_i w_i W_i G_i)
    (\sum_i w_i G_i)^{-1}` with :math:`G_i = \mathbb{E}[x_i x_i^T]` over the layer's inputs in model i (Jin et al.).
    Entries off the diagonal of each G are multiplied by ``shrinkage``, and ``ridge`` times the mean diagonal is added
    to the diagonal. Solved by Cholesky decomposition in fp64.

    Args:
        weights: one positive number per model; all equal by default.
        shrinkage: alpha, in [0, 1]: 1 is the least-squares solution, 0 weighs the inputs of a layer one by one. 0.9 in
            the paper for most models.
        ridge: at least 0; where inputs are fewer than a layer's, or linearly dependent, it must be above 0.

    Raises:
        ValueError: the inner products of a layer are singular.
    """

    name: ClassVar[str] = "regmean"
    needs_data: ClassVar[bool] = True
    needs_positive: ClassVar[str] = "least squares"
    weights: tuple[float, ...] | None = None
    shrinkage: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("ridge", self.ridge, "1e-6 is usual")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage is {self.shrinkage}; it must be in [0, 1] (0.9 is usual, 1 is least squares)")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Decomposes the sum of a layer's inner products; ``None`` for tensors that are no linear layer's weight."""
        if view.activations is None:
            return None
        products_MCC = torch.stack([self._shrunk(product) for product in view.activations.products])
        products_MCC = products_MCC * weights_of(self.weights, products_MCC)[:, None, None]
        total_CC = products_MCC.sum(0)
        total_CC.diagonal().add_(self.ridge * float(total_CC.diagonal().mean()))
        factor_CC, failed = torch.linalg.cholesky_ex(total_CC)
        pivots_C = factor_CC.diagonal()
        if int(failed) or float(pivots_C.min()) < 1e-7 * float(pivots_C.max()):
            raise ValueError(
                f"the inputs of the layer {view.name!r} are linearly dependent, and do not determine its weights: "
                "give ridge=1e-4 or shrinkage=0.9, or more rows"
            )
        if not view.activations.transposed:
            return _Problem(products_MCC, factor_CC)

        # Stored as inputs x outputs, the rows of a block share their problem with all others: solved as a whole.
        whole_MRC = torch.cat([block.models_MRC for block in view.blocks()], dim=1).double()
        right_RC = torch.einsum("mcd,mde->ce", products_MCC, whole_MRC)
        return _Problem(products_MCC, factor_CC, torch.cholesky_solve(right_RC, factor_CC))

    def _shrunk(self, product_CC: Tensor) -> Tensor:
        product_CC = product_CC.double()
        diagonal_CC = product_CC.diagonal().diag()
        return diagonal_CC + self.shrinkage * (product_CC - diagonal_CC)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Solves for the rows of one block: each row of a weight is a problem of its own."""
        if observed is None:
            return weighted_sum(shares_of(self.weights, block.models_MRC), block.models_MRC)
        dtype = block.models_MRC.dtype
        if observed.solution is not None:
            rows = block.models_MRC.shape[1]
            solution: Tensor = observed.solution[block.first_row : block.first_row + rows]
            return solution.to(dtype)
        right_RC = torch.einsum("mrc,mcd->rd", block.models_MRC.double(), observed.products_MCC)
        return torch.cholesky_solve(right_RC.T, observed.factor_CC).T.to(dtype)
