"""Metrics of the rewards of pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from .functional import calibration_error, calibration_sums, preference_accuracy, preference_margin


class PreferenceAccuracy(Metric):
    """Computes the share of pairs whose chosen completion has the higher reward (``functional.preference_accuracy``).

    Example:
        >>> metric = PreferenceAccuracy()
        >>> metric.update(torch.tensor([2.0]), torch.tensor([1.0]))
        >>> metric.update(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 0.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen_P: Tensor, rejected_P: Tensor) -> None:
        """Adds pairs."""
        if len(chosen_P):
            self.hits += preference_accuracy(chosen_P, rejected_P) * chosen_P.numel()
            self.count += chosen_P.numel()

    def compute(self) -> Tensor:
        """Returns the share over all pairs so far."""
        return self.hits / self.count


class PreferenceMargin(Metric):
    """Computes the mean of chosen minus rejected reward (``functional.preference_margin``).

    Example:
        >>> metric = PreferenceMargin()
        >>> metric.update(torch.tensor([2.0]), torch.tensor([1.0]))
        >>> metric.update(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 0.0]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen_P: Tensor, rejected_P: Tensor) -> None:
        """Adds pairs."""
        if len(chosen_P):
            self.total += preference_margin(chosen_P, rejected_P) * chosen_P.numel()
            self.count += chosen_P.numel()

    def compute(self) -> Tensor:
        """Returns the mean over all pairs so far."""
        return self.total / self.count


class ExpectedCalibrationError(Metric):
    """Computes the expected calibration error (``functional.expected_calibration_error``).

    Args:
        num_bins: bins of equal width over [0, 1], at least 1.

    Raises:
        ValueError: ``num_bins`` is below 1.

    Example:
        >>> metric = ExpectedCalibrationError(num_bins=10)
        >>> metric.update(torch.tensor([0.9, 0.9]), torch.tensor([1, 0]))
        >>> metric.update(torch.tensor([0.6, 0.6]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums: Tensor

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        if num_bins < 1:
            raise ValueError(f"num_bins is {num_bins}; it must be at least 1 (15 is usual)")
        self.num_bins = num_bins
        self.add_state("sums", torch.zeros(3, num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, confidence_B: Tensor, correct_B: Tensor) -> None:
        """Adds predictions."""
        self.sums += calibration_sums(confidence_B, correct_B, self.num_bins)

    def compute(self) -> Tensor:
        """Returns the error over all predictions so far."""
        return calibration_error(self.sums)
