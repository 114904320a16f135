"""DELLA: drop small differences with a higher probability (Deep et al., 2024, arXiv:2406.11617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Block, TensorView
from .dare import random_block
from .ties import SignElection, check_density


@dataclass(frozen=True, kw_only=True)
class Della(SignElection):
    r"""Drops differences with probabilities by their rank in the row, then elects signs and averages what agrees.

    The entry of rank r (0 for the smallest of a row of n) is kept with probability
    :math:`p = (k - \epsilon) + 2 \epsilon\, r / (n - 1)` and divided by it, so that the expectation is the difference.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        density: k, the mean probability of keeping an entry, in (0, 1].
        epsilon: half the range of the probabilities, at least 0; ``density`` +- ``epsilon`` must lie in (0, 1].
        seed: of the masks.
        preset: the convention of the election: ``paper``, ``peft`` or ``mergekit``.
    """

    name: ClassVar[str] = "della"
    density: float = 0.5
    epsilon: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        if self.epsilon < 0 or self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"epsilon is {self.epsilon} with density={self.density}; density - epsilon and density + epsilon must "
                "lie in (0, 1]"
            )

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Drops differences by rank, and divides those that are kept by their probability."""
        kept = []
        for model, delta_RC in enumerate(block.deltas_MRC):
            # The rank of each entry: the inverse of the sorting permutation.
            order_RC = delta_RC.abs().argsort(dim=1, stable=True)
            steps_C = torch.arange(view.columns, dtype=delta_RC.dtype) / max(1, view.columns - 1)
            rank_RC = torch.empty_like(delta_RC).scatter_(1, order_RC, steps_C.expand_as(delta_RC))
            keep_RC = self.density - self.epsilon + 2 * self.epsilon * rank_RC
            draws_RC = random_block(delta_RC.shape, self.seed, model, view.name, block.first_row)
            kept.append(delta_RC * (draws_RC < keep_RC) / keep_RC)
        return torch.stack(kept)
