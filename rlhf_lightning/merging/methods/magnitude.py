"""Exact selection of the largest magnitudes of one tensor, or of a whole model, that is read in blocks.

Sorting would need the whole tensor and, by ``kthvalue``, several times the time of reading it. Here a sample brackets
the threshold, one pass counts the magnitudes above the bracket and keeps those within it, and the exact order
statistic is taken among the few that are kept. Where the sample misses, the bracket is widened and the pass repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Sampled elements: the bracket then holds about 1 % of all.
_SAMPLE = 1 << 18
# Below this size everything is kept, and no sample is taken.
_WHOLE = 1 << 20

Parts = Callable[[], Iterator[Tensor]]


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


def kth_largest(parts: Parts, count: int, k: int) -> Threshold:
    """Finds the k-th largest magnitude of a tensor.

    Args:
        parts: yields the tensor's parts in any shape; called several times.
        count: number of elements in all.
        k: from 0 to ``count``.

    Example:
        >>> kth_largest(lambda: iter([torch.tensor([3.0, -5.0]), torch.tensor([1.0, 3.0])]), count=4, k=2)
        Threshold(value=3.0, above=1, equal=2)
    """
    if k <= 0:
        return Threshold(math.inf, 0, 0)
    low, high = _bracket(parts, count, k)
    while True:
        above, within = _collect(parts, low, high)
        place = k - above  # among those within, in descending order
        if 1 <= place <= len(within):
            value = within.kthvalue(len(within) - place + 1).values
            larger = int((within > value).sum())
            return Threshold(float(value), above + larger, int((within == value).sum()))
        # The sample missed: everything on the side where the value lies.
        low, high = (high, math.inf) if place < 1 else (-1.0, low)


def _collect(parts: Parts, low: float, high: float) -> tuple[int, Tensor]:
    """Counts magnitudes above ``high``, and returns those in ``(low, high]``."""
    above, kept = 0, []
    for part in parts():
        magnitudes = part.abs().flatten()
        over = magnitudes > high
        above += int(over.sum())
        kept.append(magnitudes[(magnitudes > low).logical_and_(over.logical_not_())])
    return above, torch.cat(kept)


def _bracket(parts: Parts, count: int, k: int) -> tuple[float, float]:
    """Returns bounds that hold the k-th largest magnitude almost certainly, from an even sample."""
    if count <= _WHOLE:
        return -1.0, math.inf
    stride = count // _SAMPLE
    taken = [part.flatten()[::stride].abs() for part in parts()]
    sample = torch.cat(taken).sort(descending=True).values
    # Six standard deviations of the rank in the sample.
    rank = k / count * len(sample)
    margin = 6 * math.sqrt(max(rank * (1 - k / count), 1.0)) + 2
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    high = math.inf if first < 0 else float(sample[first])
    low = -1.0 if last >= len(sample) else float(sample[last])
    # An open lower end: equal magnitudes must all be within.
    return math.nextafter(low, -math.inf), high


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
        """Returns which entries of the next block are kept."""
        magnitudes = block.abs()
        if self.equal_left >= self.threshold.equal:
            return magnitudes >= self.threshold.value
        kept = magnitudes > self.threshold.value
        equal = (magnitudes == self.threshold.value).flatten().nonzero().squeeze(-1)[: self.equal_left]
        self.equal_left -= len(equal)
        kept.view(-1)[equal] = True
        return kept
