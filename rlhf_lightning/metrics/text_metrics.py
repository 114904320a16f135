"""Metrics of completions as torchmetrics: diversity, repetition, length, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from ..utils.validation import check_count
from .over_ranks import MeanMetric, Numbers, RankMetric, check_shares, without_values
from .texts import ngrams, repetition, self_bleu

_FAR = 1 << 62


class DistinctN(RankMetric):
    """Computes distinct-n, the share of different n-grams among those of all completions; see ``texts.distinct_n``.

    Different n-grams of all ranks are known by 64-bit hashes: of a billion, less than one in two is expected to be
    missed.

    Args:
        n: words of an n-gram, at least 1.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = DistinctN(2)
        >>> metric.update(["a b a", "a b"])
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    higher_is_better = True
    state_dtype: ClassVar[torch.dtype] = torch.int64
    count: Tensor
    hashes: list[Tensor]

    def __init__(self, n: int, **settings: Any) -> None:
        super().__init__(**settings)
        check_count("n", n, "1 and 2 are usual")
        self.n = n
        self.add_sums(count=())
        self.add_state("hashes", [], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str]) -> None:
        """Adds completions."""
        found = [ngram for text in texts for ngram in ngrams(text, self.n)]
        self.count += len(found)
        new = torch.tensor(sorted({_hash(ngram) for ngram in found}), dtype=torch.int64, device=self.device)
        self.hashes = [torch.cat([*self.hashes, new]).unique()]

    def compute(self) -> Tensor:
        """Returns a scalar in (0, 1], fp64; nan without any n-gram."""
        known = dim_zero_cat(self.hashes).unique() if len(self.hashes) else ()
        return torch.as_tensor(len(known), device=self.device) / self.count.double()


class SelfBLEU(MeanMetric):
    """Computes self-BLEU of the samples of each prompt, as the mean over prompts; see ``texts.self_bleu``.

    Needs sacrebleu (the extra ``evaluation``).
    """

    higher_is_better = False

    def update(self, groups: Sequence[Sequence[str]]) -> None:
        """Adds prompts.

        Args:
            groups: the samples of each prompt, at least two.

        Raises:
            ModuleNotFoundError: sacrebleu is not installed.
            ValueError: fewer than two samples.
        """
        self.add([self_bleu(group) for group in groups])


class CompletionLengths(RankMetric):
    """Computes mean, standard deviation, minimum and maximum of lengths.

    Example:
        >>> metric = CompletionLengths()
        >>> metric.update([2, 4])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'length/mean': 3.0, 'length/std': 1.0, 'length/min': 2.0, 'length/max': 4.0}
    """

    state_dtype: ClassVar[torch.dtype] = torch.int64
    count: Tensor
    total: Tensor
    squares: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_sums(count=(), total=(), squares=())
        self.add_state("least", torch.tensor(_FAR), dist_reduce_fx="min")
        self.add_state("most", torch.tensor(-_FAR), dist_reduce_fx="max")

    def update(self, lengths: Sequence[int] | Tensor) -> None:
        """Adds completions by their lengths, whole numbers such as counts of tokens."""
        numbers = torch.as_tensor(lengths, dtype=torch.int64, device=self.device).flatten()
        if not len(numbers):
            return
        self.count += len(numbers)
        self.total += numbers.sum()
        self.squares += numbers.square().sum()
        self.least = torch.minimum(self.least, numbers.min())
        self.most = torch.maximum(self.most, numbers.max())

    def compute(self) -> dict[str, Tensor]:
        """Returns four scalars in fp64; nan without completions."""
        names = ("length/mean", "length/std", "length/min", "length/max")
        if not self.count:
            return self.scalars(without_values(names))
        count, total, squares = int(self.count), int(self.total), int(self.squares)
        # Whole numbers, so that nothing is lost where the deviation is small.
        std = (count * squares - total * total) ** 0.5 / count
        return self.scalars(dict(zip(names, (total / count, std, self.least, self.most), strict=True)))


class TruncationShare(MeanMetric):
    """Computes the share of completions that were cut off at their limit.

    Example:
        >>> metric = TruncationShare()
        >>> metric.update([True, False, False, False])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, truncated: Numbers) -> None:
        """Adds completions: 1 for one that was cut off, else 0."""
        values = self.as_tensor(truncated)
        check_shares("truncated", values)
        self.add(values)


class RepetitionShare(MeanMetric):
    """Computes the share of a completion's n-grams that occurred before in it, as the mean over completions.

    Args:
        n: words of an n-gram, at least 1.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = RepetitionShare()
        >>> metric.update(["a b c a b c", "a b c"])
        >>> metric.compute()
        tensor(0.1250, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, n: int = 3, **settings: Any) -> None:
        super().__init__(**settings)
        check_count("n", n, "3 is usual")
        self.n = n

    def update(self, texts: Sequence[str]) -> None:
        """Adds completions."""
        self.add([repetition(text, self.n) for text in texts])


def _hash(ngram: tuple[str, ...]) -> int:
    # Words have no spaces within.
    return int.from_bytes(blake2b(" ".join(ngram).encode(), digest_size=8).digest(), "big", signed=True)
