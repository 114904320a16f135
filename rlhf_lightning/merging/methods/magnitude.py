"""Exact selection of the largest differences of tensors, or of whole models, that are read in blocks.

Sorting would need the whole tensor and, by ``kthvalue``, several times the time of reading it. Here a sample of rows
brackets the threshold of each model, and one pass counts the magnitudes above the bracket and makes a histogram of
those within it. Bit patterns of positive floating-point numbers are ordered as the numbers are, and a bracket of fp32
holds so few that a bin is one number: then the counts are exact. Where bins are wider, or the sample misses, the
bracket is set anew and the pass repeated. Memory does not depend on the number of elements.

Comparisons are numpy's: on a CPU, torch takes ten times as long to make booleans.

Legend: M models, R rows and C columns of a block, N elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Block, TensorView

# Up to this size all elements are sorted, and no sample is taken.
_WHOLE = 1 << 16
# Most sampled elements, and the least number of elements for each of them.
_SAMPLE, _LEAST_STRIDE = 1 << 20, 16
# Most pieces of consecutive rows that a tensor's sample is read in.
_PIECES = 64
# Standard deviations of a sampled rank within which the true one is looked for first.
_DEVIATIONS = 7
_BINS = 1 << 16
Array = Any


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude.

    Args:
        value: the magnitude; infinite for k = 0.
        above: number of larger ones.
        equal: number of equal ones.
    """

    value: float
    above: int
    equal: int


class _Bracket(NamedTuple):
    """Least and largest magnitude among which a threshold is looked for, numbers of the precision of the merge."""

    low: Any
    high: Any


class _Counts(NamedTuple):
    """Magnitudes of one block: how many are above a bracket, how many within it, and those, unless they are equal."""

    above: int
    within: int
    within_N: Array


def kth_largest(views: Sequence[TensorView], k: int, num_models: int) -> list[Threshold]:
    """Finds the k-th largest magnitude of every model's differences to the base, over all given tensors.

    Args:
        views: one tensor, or all of a model.
        k: from 0 to the number of elements.
        num_models: M.
    """
    if k <= 0:
        return [Threshold(math.inf, 0, 0)] * num_models
    count = sum(view.elements for view in views)
    models = range(num_models)
    if count <= _WHOLE:
        parts = [_magnitudes(block, models) for view in views for block in view.blocks()]
        return [_kth_of(np.concatenate([part[model] for part in parts]), k) for model in models]

    found: dict[int, Threshold] = {}
    brackets = dict(enumerate(_sampled_brackets(views, count, k, num_models)))
    while brackets:
        searches = {model: _Search(bracket, k) for model, bracket in brackets.items()}
        for part in _counted(views, brackets):
            for model, counts in part.items():
                searches[model].add(counts)
        results = {model: search.result() for model, search in searches.items()}
        found |= {model: result for model, result in results.items() if isinstance(result, Threshold)}
        brackets = {model: result for model, result in results.items() if isinstance(result, _Bracket)}
    return [found[model] for model in models]


def _kth_of(magnitudes_N: Array, k: int) -> Threshold:
    place = len(magnitudes_N) - k
    value = np.partition(magnitudes_N, place)[place]
    return Threshold(float(value), int((magnitudes_N > value).sum()), int((magnitudes_N == value).sum()))


def _magnitudes(block: Block, models: Sequence[int]) -> dict[int, Array]:
    """Returns the magnitudes of some models' differences, ``(N,)`` each."""
    return {model: block.delta_RC(model).abs_().numpy().reshape(-1) for model in models}


def _counted(views: Sequence[TensorView], brackets: Mapping[int, _Bracket]) -> Iterator[dict[int, _Counts]]:
    """Yields the counts of all blocks in one pass."""

    def of_block(block: Block) -> dict[int, _Counts]:
        return {model: _count(values, brackets[model]) for model, values in _magnitudes(block, [*brackets]).items()}

    for view in views:
        yield from view.map(of_block)


def _count(magnitudes_N: Array, bracket: _Bracket) -> _Counts:
    above_N = magnitudes_N > bracket.high
    above = int(np.count_nonzero(above_N))
    within_N = magnitudes_N >= bracket.low
    within = int(np.count_nonzero(within_N)) - above
    if bracket.low == bracket.high:
        return _Counts(above, within, magnitudes_N[:0])
    within_N ^= above_N
    return _Counts(above, within, magnitudes_N[within_N])


class _Search:
    """Collects the counts of all blocks for one model, and finds the k-th largest among them.

    Args:
        bracket: in which it is looked for.
        k: from 1.
    """

    def __init__(self, bracket: _Bracket, k: int) -> None:
        self.bracket = bracket
        self.k = k
        self.above = 0
        self.low, self.high = _pattern(bracket.low), _pattern(bracket.high)
        self.shift = max(0, (self.high - self.low).bit_length() - (_BINS - 1).bit_length())
        self.bins = np.zeros(_BINS, dtype=np.int64)

    def add(self, counts: _Counts) -> None:
        """Adds the counts of one block."""
        self.above += counts.above
        if self.low == self.high:
            self.bins[0] += counts.within
        else:
            places_N = (counts.within_N.view(_patterns_of(counts.within_N)) - self.low) >> self.shift
            np.add.at(self.bins, places_N, 1)

    def result(self) -> Threshold | _Bracket:
        """Returns the threshold, or the bracket of the next pass."""
        number, largest = type(self.bracket.low), np.finfo(type(self.bracket.low)).max
        if self.k <= self.above:
            return _Bracket(np.nextafter(self.bracket.high, largest), largest)
        descending = np.cumsum(self.bins[::-1])
        if self.k <= self.above + descending[-1]:
            place = int(np.searchsorted(descending, self.k - self.above))
            chosen = _BINS - 1 - place
            above = self.above + int(descending[place] - self.bins[chosen])
            first = self.low + (chosen << self.shift)
            if self.shift == 0:
                return Threshold(float(_number(first, number)), above, int(self.bins[chosen]))
            return _Bracket(_number(first, number), _number(min(first + (1 << self.shift) - 1, self.high), number))
        return _Bracket(number(0), np.nextafter(self.bracket.low, number(0)))


def _patterns_of(numbers: Array) -> type[Any]:
    """Returns the type of whole numbers that has the bits of floating-point numbers."""
    return np.uint32 if numbers.itemsize == 4 else np.uint64


def _pattern(number: Any) -> int:
    return int(number.view(_patterns_of(number)))


def _number(pattern: int, kind: Any) -> Any:
    return _patterns_of(kind(0))(pattern).view(kind)


# The sample.


def _sampled_brackets(views: Sequence[TensorView], count: int, k: int, num_models: int) -> list[_Bracket]:
    """Returns bounds that hold each k-th largest magnitude almost certainly."""
    stride = max(_LEAST_STRIDE, count // _SAMPLE)
    pieces = [piece for view in views for piece in _pieces(view, stride, num_models)]
    return [_bracket([piece[model] for piece in pieces], k / count) for model in range(num_models)]


def _pieces(view: TensorView, stride: int, num_models: int) -> Iterator[list[Array]]:
    """Yields the magnitudes of about one element in ``stride``, in pieces of rows at even distances."""
    models = range(num_models)
    if view.rows < 2 * stride:
        for block in view.blocks():
            kept = [values[::stride] for values in _magnitudes(block, models).values()]
            yield from (list(part) for part in zip(*(np.array_split(v, 16) for v in kept), strict=True))
        return
    rows = max(1, view.rows // stride // _PIECES)
    for first in range(0, view.rows - rows + 1, rows * stride):
        yield list(_magnitudes(view.read(first, rows), models).values())


def _bracket(pieces: Sequence[Array], share: float) -> _Bracket:
    """Returns the sample's quantile, less and more the error of its rank.

    Rows of a matrix differ more than independent draws would: the error is that of a sample of pieces.

    Args:
        pieces: sampled magnitudes.
        share: part of all elements that is not below the threshold.
    """
    ordered_N = np.sort(np.concatenate(pieces))[::-1]
    size = len(ordered_N)
    guess = ordered_N[min(size - 1, int(share * size))]
    squares = sum((np.count_nonzero(piece >= guess) - share * len(piece)) ** 2 for piece in pieces)
    margin = _DEVIATIONS * math.sqrt(max(squares, share * (1 - share) * size, 1.0)) + 2
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    number = type(ordered_N[0])
    high = np.finfo(number).max if first < 0 else ordered_N[first]
    return _Bracket(number(0) if last >= size else ordered_N[last], high)


# Trimming.


@dataclass(frozen=True)
class Trimmer:
    """Removes what is below a threshold from one model's differences.

    Args:
        value: the least magnitude that is kept.
        last: index in the tensor of the last element of that magnitude that is kept; all by default.
    """

    value: float
    last: int | None = None

    def __call__(self, delta_RC: Tensor, first_row: int) -> None:
        """Sets what is not kept of a contiguous block of differences to 0."""
        flat_N = delta_RC.view(-1)
        kept = len(flat_N) if self.last is None else max(0, self.last + 1 - first_row * delta_RC.shape[1])
        drop_below(flat_N[:kept], self.value)
        _drop_up_to(flat_N[kept:], self.value)


def trim(block: Block, trimmers: Sequence[Trimmer]) -> Tensor:
    """Returns the differences of one block without the small ones of every model."""
    deltas_MRC = block.deltas_MRC
    for delta_RC, keep in zip(deltas_MRC, trimmers, strict=True):
        keep(delta_RC, block.first_row)
    return deltas_MRC


def trimmers_of(view: TensorView, k: int) -> list[Trimmer]:
    """Returns, for each model, what keeps exactly the k largest differences of a tensor; of equal ones, the first."""
    thresholds = kth_largest([view], k, view.num_models)
    left = {n: k - t.above for n, t in enumerate(thresholds) if t.above + t.equal > k}
    last = _last_kept(view, {model: thresholds[model].value for model in left}, left)
    return [Trimmer(threshold.value, last.get(model)) for model, threshold in enumerate(thresholds)]


def _last_kept(view: TensorView, values: Mapping[int, float], left: dict[int, int]) -> dict[int, int]:
    """Finds, for each model, the index of the last element of a magnitude that is kept."""
    found: dict[int, int] = {}

    def places(block: Block) -> tuple[int, dict[int, Array]]:
        magnitudes = _magnitudes(block, [*values])
        return block.first_row, {model: np.flatnonzero(found == values[model]) for model, found in magnitudes.items()}

    if not values:
        return found
    for first_row, equal in view.map(places):
        for model, places_N in equal.items():
            if model not in found and left[model] <= len(places_N):
                found[model] = first_row * view.columns + int(places_N[left[model] - 1])
            left[model] -= len(places_N)
        if len(found) == len(values):
            break
    return found


def drop_below(block: Tensor, value: float) -> None:
    """Sets magnitudes below a value to 0."""
    # Drops magnitudes up to the next lower number of the block's precision.
    bound = float(torch.nextafter(block.new_tensor(value), block.new_tensor(-1.0)))
    if bound >= 0:
        _drop_up_to(block, bound)


def _drop_up_to(block: Tensor, bound: float) -> None:
    """Sets magnitudes up to a bound to 0, in one pass and without another block."""
    torch.ops.aten.hardshrink.out(block, bound, out=block)
