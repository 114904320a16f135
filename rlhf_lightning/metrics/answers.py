"""Metrics of verified answers as torchmetrics: accuracy with its interval, pass@k, maj@k, best-of-n, unique answers.

Rows are prompts: samples of one prompt are not independent, and no interval counts them as such.
Legend: P prompts, n samples of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.validation import check_count, check_same_length
from .at_k import expected_best, majority_at_k, pass_at_k, usual_ks
from .intervals import share_interval
from .over_ranks import MeanMetric, Numbers, RankMetric, check_shares, without_values
from .texts import unique_share

Rows = Sequence[Sequence[float]] | Tensor


class AnswerAccuracy(RankMetric):
    """Computes the share of right answers with its confidence interval (``share_interval``).

    ``compute`` returns ``accuracy``, ``accuracy_low`` and ``accuracy_high``; nan without prompts.

    Args:
        level: of confidence, in (0, 1).
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = AnswerAccuracy()
        >>> metric.update([1.0, 0.0, 1.0, 1.0])
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'accuracy': 0.75, 'accuracy_low': 0.3006, 'accuracy_high': 0.9544}
    """

    higher_is_better = True
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, level: float = 0.95, **settings: Any) -> None:
        super().__init__(**settings)
        share_interval(1, 1.0, 1.0, level)  # refuses a level out of its range
        self.level = level
        self.add_sums(count=(), total=(), squares=())

    def update(self, right: Numbers) -> None:
        """Adds prompts.

        Args:
            right: the share of each prompt's samples that are right.

        Raises:
            ValueError: a share outside [0, 1].
        """
        shares = self.as_tensor(right).flatten()
        check_shares("right", shares)
        self.count += len(shares)
        self.total += shares.sum()
        self.squares += shares.square().sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns the accuracy and both ends of its interval."""
        names = ("accuracy", "accuracy_low", "accuracy_high")
        if not self.count:
            return self.scalars(without_values(names))
        found = share_interval(int(self.count), float(self.total), float(self.squares), self.level)
        return self.scalars(dict(zip(names, (found.value, found.low, found.high), strict=True)))


class _AtK(RankMetric):
    """Base of the curves over k, from n samples of each prompt.

    Args:
        num_samples: n, at least 1.
        ks: of the curve, each from 1 to n; by default powers of two, and n.
        settings: those of ``torchmetrics.Metric``.
    """

    higher_is_better = True
    prefix: ClassVar[str]
    count: Tensor
    totals: Tensor

    def __init__(self, num_samples: int, ks: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        check_count("num_samples", num_samples, "as many as each prompt has")
        self.num_samples = num_samples
        self.ks = usual_ks(num_samples) if ks is None else tuple(ks)
        for k in self.ks:
            pass_at_k(num_samples, 0, k)  # refuses a k out of its range
        self.add_sums(count=(), totals=(len(self.ks),))

    def add(self, curves: Sequence[Sequence[float]]) -> None:
        """Adds one curve per prompt, with a value for each k."""
        if curves:
            self.count += len(curves)
            self.totals += self.as_tensor(curves).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Returns the mean over prompts for each k; nan without prompts."""
        means = self.totals / self.count
        return {f"{self.prefix}@{k}": mean for k, mean in zip(self.ks, means, strict=True)}

    def checked(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Raises unless every prompt has n values."""
        for number, row in enumerate(rows):
            if len(row) != self.num_samples:
                raise ValueError(
                    f"{name}[{number}] has {len(row)} values; give num_samples={self.num_samples} for each prompt"
                )


class PassAtK(_AtK):
    """Computes pass@k for several k without bias, as the mean of ``pass_at_k`` over prompts.

    Args:
        num_samples: n, at least 1.
        ks: each from 1 to n; by default powers of two, and n.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = PassAtK(num_samples=4)
        >>> metric.update([[1, 0, 0, 0], [0, 0, 0, 0]])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'pass@1': 0.125, 'pass@2': 0.25, 'pass@4': 0.5}
    """

    prefix = "pass"

    def update(self, right: Rows) -> None:
        """Adds prompts.

        Args:
            right: (P, n): whether each sample is right.

        Raises:
            ValueError: another number of samples, or a value that is not 0 or 1.
        """
        rows = _lists(right)
        self.checked("right", rows)
        for row in rows:
            if wrong := [value for value in row if value not in (0, 1)]:
                raise ValueError(f"right has {wrong[0]!r}; a sample is right, 1, or not, 0")
        counts = [int(sum(row)) for row in rows]
        self.add([[pass_at_k(self.num_samples, count, k) for k in self.ks] for count in counts])


class MajorityAtK(_AtK):
    """Computes maj@k for several k without bias, as the mean of ``majority_at_k`` over prompts.

    Args:
        num_samples: n, from 1 to 1,000.
        ks: each from 1 to n; by default powers of two, and n.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = MajorityAtK(num_samples=3)
        >>> metric.update([["3", "3", "5"]], [[1, 1, 0]])
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'maj@1': 0.6667, 'maj@2': 0.6667, 'maj@3': 1.0}
    """

    prefix = "maj"

    def update(self, answers: Sequence[Sequence[Hashable | None]], values: Rows) -> None:
        """Adds prompts.

        Args:
            answers: (P, n): the answer of each sample, ``None`` without one.
            values: (P, n): what choosing it is worth, such as 1 for a right one.

        Raises:
            ValueError: other numbers of prompts or samples.
        """
        rows = _lists(values)
        check_same_length(answers=answers, values=rows)
        self.checked("answers", answers)
        self.checked("values", rows)
        self.add([[majority_at_k(*pair, k) for k in self.ks] for pair in zip(answers, rows, strict=True)])


class BestOfNCurve(_AtK):
    """Computes what the best of n samples by a score is worth, without bias, as the mean of ``expected_best``.

    Args:
        num_samples: n, at least 1.
        ks: each from 1 to n; by default powers of two, and n.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = BestOfNCurve(num_samples=2)
        >>> metric.update([[0.1, 0.9]], [[0, 1]])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'best@1': 0.5, 'best@2': 1.0}
    """

    prefix = "best"

    def update(self, scores: Rows, values: Rows | None = None) -> None:
        """Adds prompts.

        Args:
            scores: (P, n): by which the best is chosen.
            values: (P, n): what each sample is worth, such as 1 for a right one; by default its score.

        Raises:
            ValueError: other numbers of prompts or samples.
        """
        scored = _lists(scores)
        worth = scored if values is None else _lists(values)
        check_same_length(scores=scored, values=worth)
        self.checked("scores", scored)
        self.checked("values", worth)
        curves = [expected_best(*pair) for pair in zip(scored, worth, strict=True)]
        self.add([[curve[k - 1] for k in self.ks] for curve in curves])


class UniqueAnswers(MeanMetric):
    """Computes the share of different answers to a prompt, as the mean over prompts that have one.

    Example:
        >>> metric = UniqueAnswers()
        >>> metric.update([["3", "3", "5", None], [None]])
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    def update(self, answers: Sequence[Sequence[Hashable | None]]) -> None:
        """Adds the answers of prompts."""
        self.add([unique_share(row) for row in answers])


def _lists(rows: Rows) -> list[list[float]]:
    return rows.tolist() if isinstance(rows, torch.Tensor) else [list(row) for row in rows]
