"""TIES: trim, elect signs, merge what agrees (Yadav et al., 2023, arXiv:2306.01708), in three conventions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...utils.validation import check_choice
from .base import Block, TensorView
from .magnitude import Threshold, Trimmer, kth_largest
from .task_arithmetic import TaskArithmetic

Preset = Literal["paper", "peft", "mergekit"]
PRESETS = ("paper", "peft", "mergekit")


@dataclass(frozen=True, kw_only=True)
class SignElection(TaskArithmetic):
    r"""Base of the methods that elect a sign for every entry and average the differences that agree with it.

    With :math:`\tau_i` the sparse differences and :math:`\gamma = \operatorname{sign} \sum_i \tau_i`,
    :math:`\theta = \theta_0 + \lambda \sum_{i \in A} w_i \tau_i / D` over those with the elected sign, where D is

    - ``paper``: the sum of their weights, which is the paper's plain mean for equal weights; entries whose sum is 0
      take the sign of the majority of all entries of the model;
    - ``peft``: their number, so that weights scale the result; the election ignores weights, and 0 counts as positive;
    - ``mergekit``: the sum of their weights; the election counts weights, and 0 counts as positive.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda.
        preset: the convention: ``paper``, ``peft`` or ``mergekit``.
    """

    preset: Preset = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("preset", self.preset, PRESETS)

    def conventions(self) -> dict[str, Any]:
        """Adds what the preset decides."""
        return {
            **super().conventions(),
            "elect_on": "weighted" if self.preset == "mergekit" else "raw",
            "normalize_by": "count" if self.preset == "peft" else "weight",
            "zero_sign": "majority" if self.preset == "paper" else "positive",
        }

    def elected(self, sparse_MRC: Tensor) -> Tensor:
        """Returns the sums whose signs are elected, ``(R, C)``."""
        if self.preset != "mergekit":
            return sparse_MRC.sum(0)
        return (sparse_MRC * self.weights_M(sparse_MRC)[:, None, None]).sum(0)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Elects signs and averages the differences of one block that agree."""
        assert block.base_RC is not None
        sparse_MRC = self.sparse(block, view, observed)
        sign_RC = self.elected(sparse_MRC).sign()
        sign_RC[sign_RC == 0] = survey.majority if survey is not None else 1.0

        # Weighted differences agree by their own sign where the election counts weights.
        weights_M11 = self.weights_M(sparse_MRC)[:, None, None]
        weighted_MRC = sparse_MRC * weights_M11
        voting_MRC = weighted_MRC if self.preset == "mergekit" else sparse_MRC
        agrees_MRC = (voting_MRC.sign() == sign_RC).to(sparse_MRC.dtype)
        total_RC = (weighted_MRC * agrees_MRC).sum(0)
        divisor_RC = (agrees_MRC if self.preset == "peft" else agrees_MRC * weights_M11).sum(0)
        divisor_RC[divisor_RC == 0] = 1.0
        return block.base_RC + self.scale * total_RC / divisor_RC


@dataclass
class _Survey:
    """Statistics of the whole model, which the paper's convention needs: thresholds, and the sign of most entries."""

    thresholds: list[Threshold] = field(default_factory=list)
    majority: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ties(SignElection):
    r"""TIES: keeps the largest differences of each model, elects signs, and averages what agrees.

    The conventions differ in what is kept as well:

    - ``paper``: the largest of the whole model, of its :math:`d` entries those not below the
      :math:`(d - \lfloor k d \rfloor)`-th smallest, as the authors' code does (one more than k d, and all equal ones);
    - ``peft`` and ``mergekit``: exactly :math:`\lfloor k n \rfloor` of every tensor of n entries, for ``mergekit`` at
      least one.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda; 1 in the paper's main results.
        density: k, the fraction of entries that is kept, in (0, 1]; 0.2 in the paper.
        preset: the convention: ``paper``, ``peft`` or ``mergekit``.

    Example:
        >>> Ties(density=0.2, preset="peft").conventions()["trim_scope"]
        'tensor'
    """

    name: ClassVar[str] = "ties"
    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def conventions(self) -> dict[str, Any]:
        """Adds the scope of trimming."""
        return {**super().conventions(), "trim_scope": "model" if self.preset == "paper" else "tensor"}

    def survey(self, views: Iterable[TensorView], num_models: int) -> Any:
        """Finds the thresholds of whole models, and the sign of most entries, for the paper's convention."""
        if self.preset != "paper":
            return None
        views = list(views)
        count = sum(view.elements for view in views)
        k = count if self.density == 1 else int(self.density * count) + 1
        found = _Survey()
        for model in range(num_models):
            found.thresholds.append(
                kth_largest(
                    partial(_deltas, views, model),
                    count,
                    min(k, count),
                )
            )
        votes = 0
        for view in views:
            for block in view.blocks():
                votes += int(self.elected(_not_below(block.deltas_MRC, found.thresholds)).sign().sum())
        found.majority = float((votes > 0) - (votes < 0))
        return found

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds what is kept of each model's tensor."""
        if survey is not None:
            return survey
        k = int(self.density * view.elements)
        k = max(1, k) if self.preset == "mergekit" else k
        thresholds = thresholds_of(view, k)
        return [Trimmer(threshold, k) for threshold in thresholds]

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Removes the small differences."""
        if isinstance(observed, _Survey):
            return _not_below(block.deltas_MRC, observed.thresholds)
        if self.density == 1:
            return block.deltas_MRC
        deltas_MRC = block.deltas_MRC
        return torch.stack([delta * keeps(delta) for delta, keeps in zip(deltas_MRC, observed, strict=True)])


def check_density(density: float) -> None:
    """Raises unless a density is in (0, 1]."""
    if not 0 < density <= 1 or not math.isfinite(density):
        raise ValueError(f"density is {density}; it must be in (0, 1] (0.2 keeps a fifth of the differences)")


def thresholds_of(view: TensorView, k: int) -> list[Threshold]:
    """Finds the k-th largest difference of each model's tensor."""
    models = len(next(view.blocks()).models_MRC)
    return [kth_largest(partial(_deltas, [view], model), view.elements, k) for model in range(models)]


def _deltas(views: Sequence[TensorView], model: int) -> Iterator[Tensor]:
    return (block.delta_RC(model) for view in views for block in view.blocks())


def _not_below(deltas_MRC: Tensor, thresholds: list[Threshold]) -> Tensor:
    limits_M11 = deltas_MRC.new_tensor([threshold.value for threshold in thresholds])[:, None, None]
    return deltas_MRC * (deltas_MRC.abs() >= limits_M11)
