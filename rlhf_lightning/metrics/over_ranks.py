"""Base of the metrics that are exact over ranks: their states are sums and counts, which ranks add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from ..distributed.lockstep import barrier
from ..utils.validation import check_same_shape

Numbers = Sequence[float] | Tensor


class RankMetric(Metric):
    """Base of the metrics: what ``compute`` returns does not depend on how rows were split into batches and ranks.

    Args:
        settings: those of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    # Sums of shares and log-probs need fp64; counts and hashes are whole numbers.
    state_dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"dist_sync_fn": partial(_gather, dtype=self.state_dtype), **settings})

    def add_sums(self, **shapes: tuple[int, ...]) -> None:
        """Adds states that start at 0 and are summed over ranks, by name with their shapes."""
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=self.state_dtype), dist_reduce_fx="sum")

    def as_tensor(self, values: Numbers | Sequence[Sequence[float]]) -> Tensor:
        """Returns numbers in fp64 on the device of the states."""
        return torch.as_tensor(values, dtype=torch.float64, device=self.device).detach()

    def scalars(self, values: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Returns values as tensors of no dimension, in fp64 on the device of the states."""
        return {name: torch.as_tensor(v, dtype=torch.float64, device=self.device) for name, v in values.items()}


class MeanMetric(RankMetric):
    """Base of the metrics that are one mean: ``update`` calls ``add``.

    Args:
        settings: those of ``torchmetrics.Metric``.
    """

    count: Tensor
    total: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_sums(count=(), total=())

    def add(self, values: Numbers) -> None:
        """Adds values; nan count for nothing."""
        numbers = self.as_tensor(values).flatten()
        given = ~numbers.isnan()
        self.count += given.sum()
        self.total += numbers[given].sum()

    def compute(self) -> Tensor:
        """Returns the mean, a scalar in fp64; nan without values."""
        return self.total / self.count


def check_shares(name: str, values: Tensor) -> None:
    """Raises unless all values are in [0, 1]."""
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        raise ValueError(f"{name} has {values[outside][0].item():.4g}; every value must be in [0, 1]: give shares")


def check_pairs(**values: Tensor) -> None:
    """Raises unless all are of one dimension and one length, without nan."""
    check_same_shape("B", **values)
    for name, given in values.items():
        if given.isnan().any():
            raise ValueError(f"{name}[{int(given.isnan().nonzero()[0])}] is nan: leave such rows out")


def without_values(names: Sequence[str]) -> dict[str, float]:
    """Returns nan for every name."""
    return dict.fromkeys(names, math.nan)


def _gather(value: Tensor, group: Any = None, *, dtype: torch.dtype) -> list[Tensor]:
    # Ranks that share weights may still be at their passes; and a rank that saw no rows has an empty state of no type.
    barrier()
    return list(gather_all_tensors(value.to(dtype), group))
