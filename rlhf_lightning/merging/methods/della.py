"""DELLA: drop small differences with a higher probability (Deep et al., 2024, arXiv:2406.11617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Block, Method, TensorView
from .dare import norm_ratios, random_block
from .election import Preset, elect_and_average, election_conventions


@dataclass(frozen=True, kw_only=True)
class Della(Method):
    r"""Drops differences with probabilities by their rank in the row, then elects signs and averages what agrees.

    The entry of rank r (0 for the smallest of a row of n) is kept with probability
    :math:`p = (k - \epsilon) + 2 \epsilon\, r / (n - 1)` and divided by it, so that the expectation is the difference.
    Under ``mergekit`` what is kept is rescaled to the tensor's L1 norm instead.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        preset: the convention of the election and of rescaling: ``paper``, ``peft`` or ``mergekit``.
        density: k, the mean probability of keeping an entry, in (0, 1].
        epsilon: half the range of the probabilities, at least 0; ``density`` +- ``epsilon`` must lie in (0, 1].
        seed: of the masks.
    """

    name: ClassVar[str] = "della"
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    preset: Preset = "paper"
    density: float = 0.5
    epsilon: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0 or self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"epsilon is {self.epsilon} with density={self.density}; density - epsilon and density + epsilon must "
                "lie in (0, 1]"
            )

    def conventions(self) -> dict[str, Any]:
        """Adds what the preset decides."""
        return {**super().conventions(), **election_conventions(self.preset)}

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds the factors of rescaling."""
        if self.preset != "mergekit":
            return None
        return norm_ratios(view, lambda block: self._kept(block, view.name))

    def _kept(self, block: Block, name: str) -> Tensor:
        """Returns the differences of one block that are kept."""
        rescale = self.preset != "mergekit"
        return drop_by_rank(block, name, self.density, self.epsilon, self.seed, rescale=rescale)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Elects signs among the differences of one block that are kept, and averages what agrees."""
        kept_MRC = self._kept(block, view.name)
        if observed is not None:
            kept_MRC = kept_MRC * kept_MRC.new_tensor(observed)[:, None, None]
        return elect_and_average(block, kept_MRC, self.weights, self.scale, self.preset)


def drop_by_rank(block: Block, name: str, density: float, epsilon: float, seed: int, *, rescale: bool = True) -> Tensor:
    """Drops the differences of one block by their ranks in the row, and divides the others by their probability.

    Args:
        block: of the tensor ``name``.
        name: of the tensor.
        density: mean probability of keeping an entry.
        epsilon: half the range of the probabilities.
        seed: of the masks.
        rescale: divide.
    """
    kept, columns = [], block.models_MRC.shape[-1]
    for model, delta_RC in enumerate(block.deltas_MRC):
        # The rank of each entry: the inverse of the sorting permutation.
        order_RC = delta_RC.abs().argsort(dim=1, stable=True)
        steps_C = torch.arange(columns, dtype=delta_RC.dtype) / max(1, columns - 1)
        rank_RC = torch.empty_like(delta_RC).scatter_(1, order_RC, steps_C.expand_as(delta_RC))
        keep_RC = density - epsilon + 2 * epsilon * rank_RC
        draws_RC = random_block(delta_RC.shape, seed, model, name, block.first_row)
        kept_RC = delta_RC * (draws_RC < keep_RC)
        kept.append(kept_RC / keep_RC if rescale else kept_RC)
    return torch.stack(kept)
