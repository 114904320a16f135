"""Exact selection of the largest differences of tensors, or of whole models, that are read in blocks.

Sorting would need the whole tensor and, by ``kthvalue``, several times the time of reading it. Here a sample brackets
the threshold of each model, one pass counts the magnitudes above the bracket and keeps those within it, and the exact
order statistic is taken among the few that are kept. Where the sample misses, the bracket is widened and the pass
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TensorView

# Sampled elements: the bracket then holds about 1 % of all.
_SAMPLE = 1 << 18
# Below this size everything is kept, and no sample is taken.
_WHOLE = 1 << 16


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
    brackets = _brackets(views, count, k, num_models)
    found: dict[int, Threshold] = {}
    while len(found) < num_models:
        missing = [model for model in range(num_models) if model not in found]
        for model, (above, within) in zip(missing, _collect(views, missing, brackets), strict=True):
            place = k - above  # among those within, in descending order
            if 1 <= place <= len(within):
                value = within.kthvalue(len(within) - place + 1).values
                larger = int((within > value).sum())
                found[model] = Threshold(float(value), above + larger, int((within == value).sum()))
                continue
            # The sample missed: everything on the side where the value lies.
            low, high = brackets[model]
            brackets[model] = (high, math.inf) if place < 1 else (-1.0, low)
    return [found[model] for model in range(num_models)]


def _collect(
    views: Sequence[TensorView], models: Sequence[int], brackets: Sequence[tuple[float, float]]
) -> list[tuple[int, Tensor]]:
    """Counts, for each model, magnitudes above its bracket, and returns those within it, in one pass."""
    above = [0] * len(models)
    kept: list[list[Tensor]] = [[] for _ in models]
    for magnitudes_MN in _magnitudes(views):
        for number, model in enumerate(models):
            low, high = brackets[model]
            magnitudes_N = magnitudes_MN[model]
            within_N = magnitudes_N > low
            if high < math.inf:
                over_N = magnitudes_N > high
                above[number] += int(torch.count_nonzero(over_N))
                within_N ^= over_N  # those over are above the lower end as well
            kept[number].append(magnitudes_N[within_N])
    return [(n, torch.cat(parts)) for n, parts in zip(above, kept, strict=True)]


def _magnitudes(views: Sequence[TensorView]) -> Iterator[Tensor]:
    for view in views:
        for block in view.blocks():
            yield block.deltas_MRC.abs_().flatten(1)


def _brackets(views: Sequence[TensorView], count: int, k: int, num_models: int) -> list[tuple[float, float]]:
    """Returns bounds that hold each k-th largest magnitude almost certainly, from rows at even distances."""
    if count <= _WHOLE:
        return [(-1.0, math.inf)] * num_models
    sample_MN = torch.cat([_sampled(view, max(1, count // _SAMPLE)) for view in views], dim=1)
    ordered_MN = sample_MN.sort(dim=1, descending=True).values
    # Rows differ more than independent draws do: twelve standard deviations of the rank among those.
    size = ordered_MN.shape[1]
    rank = k / count * size
    margin = 12 * math.sqrt(max(rank * (1 - k / count), 1.0)) + 2
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    highs = [math.inf] * num_models if first < 0 else ordered_MN[:, first].tolist()
    lows = [-1.0] * num_models if last >= size else ordered_MN[:, last].tolist()
    # An open lower end: equal magnitudes must all be within.
    return [(math.nextafter(low, -math.inf), high) for low, high in zip(lows, highs, strict=True)]


def _sampled(view: TensorView, stride: int) -> Tensor:
    """Returns the magnitudes of every ``stride``-th row, or of every ``stride``-th entry of a tensor of few rows."""
    if view.rows < 2 * stride:
        parts = [block.deltas_MRC.abs_().flatten(1)[:, ::stride] for block in view.blocks()]
    else:
        parts = [view.read(row, 1).deltas_MRC.abs_().flatten(1) for row in range(stride // 2, view.rows, stride)]
    return torch.cat(parts, dim=1)


class Trimmer:
    """Keeps exactly the k largest magnitudes of one tensor that is read in blocks; of equal ones, the first.

    Args:
        threshold: the k-th largest magnitude.
        k: how many to keep.
    """

    def __init__(self, threshold: Threshold, k: int) -> None:
        self.threshold = threshold
        self.equal_left = k - threshold.above

    def __call__(self, block: Tensor) -> Tensor:
        """Returns the next block with 0 in place of what is not kept."""
        if self.equal_left >= self.threshold.equal:
            return not_below(block, self.threshold.value)
        magnitudes = block.abs()
        kept = magnitudes > self.threshold.value
        equal = (magnitudes == self.threshold.value).flatten().nonzero().squeeze(-1)[: self.equal_left]
        self.equal_left -= len(equal)
        kept.view(-1)[equal] = True
        return block * kept


def not_below(block: Tensor, value: float) -> Tensor:
    """Returns a block with 0 in place of magnitudes below a value."""
    if value == math.inf:
        return torch.zeros_like(block)
    # hardshrink keeps what is strictly above its bound: the next lower number of the block's precision.
    bound = float(torch.nextafter(block.new_tensor(value), block.new_tensor(-1.0)))
    return torch.nn.functional.hardshrink(block, bound) if bound >= 0 else block
