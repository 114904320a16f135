"""Metrics of single rewards: their statistics, and their correlation with ratings."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from .functional import correlation, correlation_sums


class RewardStatistics(Metric):
    """Computes mean, standard deviation (of the population), minimum and maximum of rewards.

    The state is count, mean and sum of squared distances from the mean, which merge exactly; with plain sums of
    squares, rewards far from 0 would lose precision.

    Example:
        >>> metric = RewardStatistics()
        >>> metric.update(torch.tensor([1.0, 3.0]))
        >>> metric.update(torch.tensor([5.0]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'mean': 3.0, 'std': 1.633, 'min': 1.0, 'max': 5.0}
    """

    is_differentiable = False
    full_state_update = False
    moments: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("moments", torch.zeros(1, 3, dtype=torch.float64), dist_reduce_fx=merge_moments)
        self.add_state("least", torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("greatest", torch.tensor(-torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, rewards: Tensor) -> None:
        """Adds rewards of any shape."""
        values = rewards.detach().double().flatten()
        if not len(values):
            return
        mean = values.mean()
        new = torch.stack([values.new_tensor(len(values)), mean, (values - mean).square().sum()])
        self.moments = merge_moments(torch.stack([self.moments[0], new]))
        self.least = torch.minimum(self.least, values.min())
        self.greatest = torch.maximum(self.greatest, values.max())

    def compute(self) -> dict[str, Tensor]:
        """Returns ``mean``, ``std``, ``min`` and ``max`` of all rewards so far; nan before the first."""
        count, mean, squares = self.moments.reshape(-1, 3)[0]
        nan = torch.full_like(mean, torch.nan)
        seen = count > 0
        values = {"mean": mean, "std": (squares / count).sqrt(), "min": self.least, "max": self.greatest}
        return {name: torch.where(seen, value, nan) for name, value in values.items()}


def merge_moments(moments: Tensor) -> Tensor:
    """Merges counts, means and sums of squared distances: ``(..., 3) -> (1, 3)``.

    Formula: Chan, Golub and LeVeque, 1979: with n and the mean m of all, sum of (M2_i + n_i (m_i - m)^2).

    Args:
        moments: (..., 3), one row of count, mean and sum of squared distances from that mean per part.

    Example:
        >>> merge_moments(torch.tensor([[1.0, 2.0, 0.0], [1.0, 4.0, 0.0]])).tolist()
        [[2.0, 3.0, 2.0]]
    """
    count, mean, squares = moments.reshape(-1, 3).unbind(dim=1)
    total = count.sum()
    overall = (count * mean).sum() / total.clamp_min(1)
    return torch.stack([total, overall, (squares + count * (mean - overall).square()).sum()])[None]


class AttributeCorrelation(Metric):
    """Computes the correlation of each attribute's reward with its rating (``functional.attribute_correlation``).

    Args:
        num_attributes: K, at least 1.

    Raises:
        ValueError: ``num_attributes`` is below 1.

    Example:
        >>> metric = AttributeCorrelation(num_attributes=2)
        >>> metric.update(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        >>> metric.update(torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, float("nan")]]))
        >>> metric.compute()
        tensor([ 1., -1.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, num_attributes: int) -> None:
        super().__init__()
        if num_attributes < 1:
            raise ValueError(f"num_attributes is {num_attributes}; it must be at least 1")
        self.add_state("sums", torch.zeros(6, num_attributes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards_BK: Tensor, ratings_BK: Tensor) -> None:
        """Adds rows."""
        self.sums += correlation_sums(rewards_BK, ratings_BK)

    def compute(self) -> Tensor:
        """Returns correlations (K,) over all rows so far."""
        return correlation(self.sums)
