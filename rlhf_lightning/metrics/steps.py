"""Metrics of solutions judged step by step."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from .functional import first_error, first_error_sums


class FirstErrorF1(Metric):
    """Computes the F1 of ProcessBench (``functional.first_error_f1``).

    Example:
        >>> metric = FirstErrorF1()
        >>> metric.update(torch.tensor([1, 2]), torch.tensor([1, 0]))
        >>> metric.update(torch.tensor([-1]), torch.tensor([-1]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'f1': 0.6667, 'with_error': 0.5, 'without_error': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted_S: Tensor, expected_S: Tensor) -> None:
        """Adds sequences: index of the predicted first error and of the actual one; -1 for none."""
        self.sums += first_error_sums(predicted_S, expected_S)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``f1`` and the accuracies ``with_error`` and ``without_error``; nan if either kind is missing."""
        return first_error(self.sums)._asdict()
