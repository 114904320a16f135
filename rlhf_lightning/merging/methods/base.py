"""Base class of merging methods, and the view of one tensor of all models that they compute on.

A tensor is read in blocks of whole rows, in one order and at boundaries that depend on its shape alone, so that a merge
that streams from disk computes the same as one on tensors in memory. A method may look at all blocks of a tensor
before it merges them (``observe``), and at all tensors before that (``survey``).

Legend: M models, R rows and C columns of a block; a tensor of more dimensions has its first as rows and the others as
columns, a vector is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...utils.option_groups import OptionGroup

# Elements of a block: 1 MiB in fp32 for each model, so that a dozen operations on it stay in the processor's caches.
BLOCK_ELEMENTS = 1 << 18
Found = TypeVar("Found")


@dataclass(frozen=True)
class Block:
    """Some rows of one tensor.

    Args:
        models_MRC: of every model, in the precision that the merge computes in.
        base_RC: of the base; ``None`` without one.
        first_row: of these rows in the tensor.
        fisher_MRC: the models' Fisher information, where the method takes it.
    """

    models_MRC: Tensor
    base_RC: Tensor | None
    first_row: int = 0
    fisher_MRC: Tensor | None = None

    @property
    def deltas_MRC(self) -> Tensor:
        """Differences of the models to the base (task vectors)."""
        assert self.base_RC is not None
        return self.models_MRC - self.base_RC

    def delta_RC(self, model: int) -> Tensor:
        """Difference of one model to the base."""
        assert self.base_RC is not None
        return self.models_MRC[model] - self.base_RC


class Activations(NamedTuple):
    """Inputs of the linear layer that a tensor is the weight of.

    Args:
        products: of every model the mean of x x^T over the layer's inputs x, inputs x inputs.
        transposed: whether the weight is stored as inputs x outputs (Conv1D).
    """

    products: Sequence[Tensor]
    transposed: bool = False


@dataclass(frozen=True)
class TensorView:
    """One tensor of all models, whose rows can be read any number of times.

    Args:
        name: of the tensor.
        rows: R of the whole tensor.
        columns: C.
        num_models: M.
        read: reads rows, from the first of them and their number.
        activations: of the linear layer that the tensor is the weight of, where the method takes them.
    """

    name: str
    rows: int
    columns: int
    num_models: int
    read: Callable[[int, int], Block]
    activations: Activations | None = None

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return self.rows * self.columns

    def blocks(self) -> Iterator[Block]:
        """Reads all blocks in order."""
        return TensorView.map(self, lambda block: block)

    def map(self, function: Callable[[Block], Found]) -> Iterator[Found]:
        """Applies a function to all blocks; yields its results in their order.

        Views of models on disk read and compute several blocks at a time.
        """
        step = block_rows(self.rows, self.columns)
        for first in range(0, self.rows, step):
            yield function(self.read(first, min(step, self.rows - first)))


@dataclass(frozen=True, kw_only=True)
class Method(OptionGroup):
    """A merging method and its options; the computations are functions of tensors, in the methods' files.

    Options that several methods have are checked here, where a method declares them: ``weights``, one per model,
    ``scale`` of the merged differences, and ``density``, the fraction of them that is kept.

    Attributes:
        name: in options and manifests.
        needs_base: whether it merges differences to a base.
        needs_data: whether it weighs the models by what they compute on rows of data.
        needs_positive: what needs positive weights, for the error; empty where any finite weights do.
    """

    name: ClassVar[str]
    needs_base: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    needs_positive: ClassVar[str] = ""

    def __post_init__(self) -> None:
        weights = getattr(self, "weights", None)
        if isinstance(weights, list):
            weights = tuple(float(weight) for weight in weights)
            object.__setattr__(self, "weights", weights)
        super().__post_init__()
        if weights is not None and not all(map(math.isfinite, weights)):
            raise ValueError(f"weights is {list(weights)}; all must be finite numbers")
        if weights is not None and self.needs_positive and min(weights) <= 0:
            raise ValueError(f"weights is {list(weights)}; {self.needs_positive} needs positive ones")
        scale, density = getattr(self, "scale", 1.0), getattr(self, "density", 1.0)
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; it must be a finite number (1 is usual, 0 gives the base)")
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}; it must be in (0, 1] (0.2 keeps a fifth of the differences)")

    def check(self, num_models: int) -> None:
        """Checks the options for a number of models.

        Raises:
            ValueError: for a number of models that it cannot merge, or weights of another number.
        """
        weights = getattr(self, "weights", None)
        if weights is not None and len(weights) != num_models:
            raise ValueError(f"weights has {len(weights)} numbers for {num_models} models: give one for each")

    def survey(self, views: Iterable[TensorView], num_models: int) -> Any:
        """Looks at all tensors before the first is merged; ``None`` where that is not needed."""
        return None

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Looks at all blocks of one tensor before they are merged; ``None`` where that is not needed."""
        return None

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Merges one block: ``(R, C)``."""
        raise TypeError(f"{type(self).__name__} must define combine(block, view, observed, survey)")

    def conventions(self) -> dict[str, Any]:
        """Returns the options with everything that a preset decides, for the manifest."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


def block_rows(rows: int, columns: int) -> int:
    """Returns the rows of a block of a tensor: a function of its shape alone."""
    return max(1, min(rows, BLOCK_ELEMENTS // max(1, columns)))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the rows and columns that a tensor of any shape is read as.

    Example:
        >>> matrix_shape((4, 3, 2)), matrix_shape((7,)), matrix_shape(())
        ((4, 6), (1, 7), (1, 1))
    """
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def view_of(
    models: Sequence[Tensor],
    base: Tensor | None,
    *,
    name: str = "tensor",
    dtype: torch.dtype = torch.float32,
    fisher: Sequence[Tensor] | None = None,
    activations: Activations | None = None,
) -> TensorView:
    """Makes a view of tensors in memory."""
    rows, columns = matrix_shape(models[0].shape)

    def part(tensor: Tensor, first: int, count: int) -> Tensor:
        return tensor.reshape(rows, columns)[first : first + count].to(dtype)

    def read(first: int, count: int) -> Block:
        return Block(
            torch.stack([part(model, first, count) for model in models]),
            None if base is None else part(base, first, count),
            first,
            None if fisher is None else torch.stack([part(each, first, count) for each in fisher]),
        )

    return TensorView(name, rows, columns, len(models), read, activations)


def merge_view(method: Method, view: TensorView, survey: Any = None) -> Iterator[Tensor]:
    """Merges one tensor block by block."""
    observed = method.observe(view, survey)
    yield from view.map(lambda block: method.combine(block, view, observed, survey))


def merge_tensors(
    method: Method,
    models: Sequence[dict[str, Tensor]],
    base: dict[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
    activations: Mapping[str, Activations] | None = None,
) -> dict[str, Tensor]:
    """Merges state dicts in memory.

    Args:
        method: the method and its options.
        models: M state dicts with the same names and shapes.
        base: that of the base, for methods that need one.
        dtype: to compute in, and of the result: float32 or float64.
        fisher: the models' Fisher information, for ``Fisher``.
        activations: by name of a linear layer's weight, for ``RegMean``.

    Example:
        >>> from rlhf_lightning.merging.methods import Linear
        >>> merge_tensors(Linear(weights=(1.0, 3.0)), [{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}])["w"]
        tensor([3.])
    """
    method.check(len(models))
    if method.needs_base and base is None:
        raise ValueError(f"{method.name} merges differences to a base model: give base=")
    views = [
        view_of(
            [model[name] for model in models],
            None if base is None else base[name],
            name=name,
            dtype=dtype,
            fisher=None if fisher is None else [each[name] for each in fisher],
            activations=None if activations is None else activations.get(name),
        )
        for name in models[0]
    ]
    survey = method.survey(views, len(models))
    return {
        view.name: torch.cat(list(merge_view(method, view, survey))).reshape(models[0][view.name].shape)
        for view in views
    }


# Weights of models.


def weights_of(weights: Sequence[float] | None, like: Tensor) -> Tensor:
    """Returns the weights of the models, 1 each by default, ``(M,)`` in the precision of a tensor ``(M, ...)``."""
    return like.new_ones(len(like)) if weights is None else like.new_tensor(weights)


def shares_of(weights: Sequence[float] | None, like: Tensor) -> Tensor:
    """Returns the weights of the models divided by their sum.

    Example:
        >>> shares_of((1.0, 3.0), torch.zeros(2, 5))
        tensor([0.2500, 0.7500])
    """
    weights_M = weights_of(weights, like)
    return weights_M / weights_M.sum()


def weighted_sum(weights_M: Tensor, tensors_MRC: Tensor) -> Tensor:
    """Sums tensors with weights, one after the other: the order of additions is that of the models."""
    total = tensors_MRC[0] * weights_M[0]
    for weight, tensor in zip(weights_M[1:], tensors_MRC[1:], strict=True):
        total = total.addcmul_(tensor, weight)
    return total


@dataclass
class Grams:
    """Inner products of the models' tensors (or of their differences to the base), ``(M, M)`` in fp64.

    Args:
        products_MM: the inner products.
    """

    products_MM: Tensor
    norms_M: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.norms_M = self.products_MM.diagonal().clamp(min=0).sqrt()

    def cosines_MM(self) -> Tensor:
        """Returns the cosines; 0 where a norm is 0."""
        outer = self.norms_M[:, None] * self.norms_M
        return torch.where(outer > 0, self.products_MM / outer.clamp(min=1e-300), 0.0).clamp(-1, 1)


def grams(view: TensorView, *, of_deltas: bool = False) -> Grams:
    """Computes all inner products of one tensor in one pass, summed in fp64.

    Every method whose result is a combination of the models with coefficients that depend on angles and distances
    needs nothing else of the tensor.
    """

    def products(block: Block) -> Tensor:
        rows_MN = (block.deltas_MRC if of_deltas else block.models_MRC).flatten(1).double()
        return rows_MN @ rows_MN.T

    return Grams(torch.stack(list(view.map(products))).sum(0))
