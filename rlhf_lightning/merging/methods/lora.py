"""Sums of LoRA adapters as one adapter: exact by concatenation, or of a given rank by singular values.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

Adding the A and the B of adapters instead, as a linear combination of their files does, also adds the products of
different adapters' factors, which belong to none of them.

Legend: r rank, R sum of ranks, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...utils.validation import check_count
from .base import Method


class Product(NamedTuple):
    """The product B A, and the norm of its difference to the sum that it stands for.

    Args:
        b_Or: the left factor.
        a_rI: the right factor.
        norm: Frobenius norm of the sum; 0 where it was not needed.
        error: Frobenius norm of the difference.
    """

    b_Or: Tensor
    a_rI: Tensor
    norm: float = 0.0
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cat(Method):
    r"""Sums adapters exactly, as one of the rank :math:`\sum_i r_i`: their factors one after the other.

    Args:
        weights: one per adapter, not 0; 1 each by default.

    Example:
        >>> Cat(weights=(0.7, 0.3)).name
        'cat'
    """

    name: ClassVar[str] = "cat"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self.weights)


@dataclass(frozen=True, kw_only=True)
class Svd(Method):
    r"""Sums adapters as one of a given rank, the closest to the sum (Eckart and Young, 1936).

    Args:
        weights: one per adapter, not 0; 1 each by default.
        rank: of the result, at least 1; a layer whose sum has a lower rank is exact.

    Example:
        >>> Svd(rank=8).rank
        8
    """

    name: ClassVar[str] = "svd"
    weights: tuple[float, ...] | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self.weights)
        if self.rank is None:
            raise ValueError("svd needs the rank of the result: give rank=16, or use method='cat', which is exact")
        check_count("rank", self.rank, "16 is usual")


def _check_weights(weights: Sequence[float] | None) -> None:
    if weights is not None and 0 in weights:
        raise ValueError(f"weights is {list(weights)}; a weight of 0 leaves an adapter out: remove it from models")


def concatenate(products: Sequence[tuple[Tensor, Tensor]], factors: Sequence[float]) -> Product:
    """Returns a sum of products as one product.

    Args:
        products: pairs of B ``(O, r)`` and A ``(r, I)``.
        factors: of each product.

    Example:
        >>> one, other = (torch.tensor([[1.0]]), torch.tensor([[2.0]])), (torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        >>> found = concatenate([one, other], [1.0, 10.0])
        >>> found.b_Or @ found.a_rI
        tensor([[32.]])
    """
    b_OR = torch.cat([b_Or * factor for (b_Or, _), factor in zip(products, factors, strict=True)], dim=1)
    return Product(b_OR, torch.cat([a_rI for _, a_rI in products]))


def truncate(product: Product, rank: int) -> Product:
    """Returns the closest product of a rank, in the Frobenius norm.

    The singular values are those of a matrix of R x R, between the orthogonal bases of the two factors: the dense sum
    is never computed.

    Args:
        product: of the rank R.
        rank: at least 1.
    """
    q_OR, left_RR = torch.linalg.qr(product.b_Or)
    q_IR, right_RR = torch.linalg.qr(product.a_rI.T)
    u_RR, values_R, v_RR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    # Values of rounding only add nothing.
    significant = int((values_R > values_R[0] * torch.finfo(values_R.dtype).eps * len(values_R)).sum())
    r = max(1, min(rank, significant))
    roots_r = values_R[:r].sqrt()
    error = float(values_R[r:].norm()) if significant > r else 0.0
    return Product(
        (q_OR @ u_RR[:, :r]) * roots_r, roots_r[:, None] * (v_RR[:r] @ q_IR.T), float(values_R.norm()), error
    )
