"""Reads an adapter's folder as if it were a whole model: each tensor of its base with the adapter's difference.

Computed from the formulas of LoRA (Hu et al., 2021, arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA
(arXiv:2402.09353), in the precision of the merge and for some rows at a time:

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) for rsLoRA
    W' = m (W + s B A) / ||W + s B A||        for DoRA, the norm over the inputs of each output
    b' = b + s c        with a bias c of the adapter's second layer (``lora_bias``)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter_files import Adapter, Factors
from .tensor_files import StoredTensor


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from one of the base; read like a ``StoredTensor``.

    Args:
        base: the base's tensor.
        factors: the adapter's part.
        dtype: that the result is computed in.
    """

    base: StoredTensor
    factors: Factors
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.base.shape

    @property
    def file(self) -> Path:
        """File of the base's tensor."""
        return self.base.file

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.base.elements

    def rows(self, first: int, count: int) -> Tensor:
        """Computes some rows, as a matrix (see ``matrix_shape``)."""
        raise TypeError(f"{type(self).__name__} must define rows(first, count)")


@dataclass(frozen=True)
class AdaptedTensor(Derived):
    """A weight of the base with the adapter's difference.

    Args:
        transposed: whether the weight is stored as inputs x outputs (Conv1D, embeddings).
    """

    transposed: bool

    def rows(self, first: int, count: int) -> Tensor:
        """Computes some rows of the adapted weight."""
        magnitude_O = self.factors.magnitude_O
        if magnitude_O is not None and self.transposed:
            return self._rows_of_transposed_dora()[first : first + count]
        weight = self._sum(first, count)
        if magnitude_O is None:
            return weight
        return weight.mul_((magnitude_O.to(self.dtype)[first : first + count] / weight.norm(dim=1))[:, None])

    def _sum(self, first: int, count: int) -> Tensor:
        """Computes W + s B A for some rows of the weight as it is stored."""
        weight = self.base.rows(first, count).to(self.dtype)
        a_rI, b_Or = self.factors.a_rI.to(self.dtype), self.factors.b_Or.to(self.dtype)
        last = first + len(weight)
        delta = (b_Or @ a_rI[:, first:last]).T if self.transposed else b_Or[first:last] @ a_rI
        return weight + delta.mul_(self.factors.scale)

    def _rows_of_transposed_dora(self) -> Tensor:
        """Computes a whole weight stored as inputs x outputs: norms over the inputs need all rows."""
        assert self.factors.magnitude_O is not None
        weight = self._sum(0, self.base.shape[0])
        return weight.mul_(self.factors.magnitude_O.to(self.dtype) / weight.norm(dim=0))


@dataclass(frozen=True)
class ShiftedBias(Derived):
    """A bias of the base plus the bias of the adapter's second factor."""

    def rows(self, first: int, count: int) -> Tensor:
        """Computes the bias, as one row."""
        assert self.factors.bias_O is not None
        return self.base.rows(0, 1).to(self.dtype) + self.factors.scale * self.factors.bias_O.to(self.dtype)[None]


def adapted_tensors(
    adapter: Adapter, base: Mapping[str, StoredTensor], *, dtype: torch.dtype
) -> dict[str, StoredTensor | Derived]:
    """Reads an adapter as the tensors of a whole model.

    Args:
        adapter: the adapter.
        base: tensors of its base model.
        dtype: to compute sums in.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    for name, tensor in (*adapter.own_base.items(), *adapter.trained.items()):
        if name not in base:
            raise ValueError(f"{str(adapter.file)!r} has {name!r}, which its base model does not have")
        if base[name].shape != tensor.shape:
            raise ValueError(
                f"{str(adapter.file)!r} has {name!r} of shape {tensor.shape}, and its base model one of shape "
                f"{base[name].shape}: give as base the model that it was trained on, with the tokens that were added "
                "to it"
            )
    base = {**base, **adapter.own_base}
    found: dict[str, StoredTensor | Derived] = {**base, **adapter.trained}
    for path, factors in adapter.layers.items():
        found |= _adapted(path, factors, adapter, base, dtype)
    return found


def _adapted(
    path: str, factors: Factors, adapter: Adapter, base: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Derived]:
    """Combines the factors of one layer with its weight and bias."""
    weight = base.get(f"{path}.weight")
    outputs, inputs = factors.b_Or.shape[0], factors.a_rI.shape[1]
    plain, flipped = (outputs, inputs), (inputs, outputs)
    transposed = factors.embedding or bool(adapter.config.get("fan_in_fan_out"))
    # A model may mix both layouts; the flag of the config decides for square weights only.
    if weight is not None and not factors.embedding and plain != flipped:
        transposed = weight.shape == flipped
    shape = flipped if transposed else plain
    if weight is None or weight.shape != shape:
        has = "no such weight" if weight is None else f"one of shape {weight.shape}"
        raise ValueError(
            f"the adapter {str(adapter.folder)!r} changes {path}.weight of shape {shape}, and its base model has "
            f"{has}: give the base that it was trained on"
        )
    found: dict[str, Derived] = {f"{path}.weight": AdaptedTensor(weight, factors, dtype, transposed)}
    if factors.bias_O is not None:
        bias = base.get(f"{path}.bias")
        if bias is None:
            raise ValueError(
                f"the adapter {str(adapter.folder)!r} has a bias for {path!r}, whose layer has none: it equals no "
                "weights of the base model"
            )
        found[f"{path}.bias"] = ShiftedBias(bias, factors, dtype)
    return found
