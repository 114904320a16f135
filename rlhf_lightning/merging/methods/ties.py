"""TIES: trim, elect signs, merge what agrees (Yadav et al., 2023, arXiv:2306.01708), in three conventions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...utils.validation import check_choice
from .base import Block, TensorView
from .magnitude import Threshold, Trimmer, kth_largest, not_below
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

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Elects signs and averages the differences of one block that agree."""
        assert block.base_RC is not None
        sparse_MRC = self.sparse(block, view, observed)
        # Weights of 1 cost nothing.
        weights_M11 = None if self.weights is None else self.weights_M(sparse_MRC)[:, None, None]
        weighted_MRC = sparse_MRC if weights_M11 is None else sparse_MRC * weights_M11
        voting_MRC = weighted_MRC if self.preset == "mergekit" else sparse_MRC
        votes_RC = voting_MRC.sum(0)
        sign_RC = torch.where(votes_RC < 0, -1.0, 1.0).to(votes_RC.dtype)
        if self.preset == "paper":
            self._resolve(sign_RC, votes_RC, sparse_MRC, survey)

        # Entries of 0 agree with no sign.
        agrees_MRC = voting_MRC * sign_RC > 0
        total_RC = torch.where(agrees_MRC, weighted_MRC, 0.0).sum(0)
        if self.preset == "peft" or weights_M11 is None:
            divisor_RC = agrees_MRC.sum(0, dtype=total_RC.dtype)
        else:
            divisor_RC = (agrees_MRC * weights_M11).sum(0)
        divisor_RC.masked_fill_(divisor_RC == 0, 1.0)
        return torch.addcdiv(block.base_RC, total_RC, divisor_RC, value=self.scale)

    def _resolve(self, sign_RC: Tensor, votes_RC: Tensor, sparse_MRC: Tensor, survey: Any) -> None:
        """Gives entries whose differences cancel exactly the sign of the majority; where all are 0, none matters."""
        cancel_RC = (votes_RC == 0).logical_and_((sparse_MRC != 0).any(0))
        if bool(cancel_RC.any()):
            sign_RC[cancel_RC] = 1.0 if survey is None else survey.majority(self)


class Survey:
    """Statistics of the whole model, which the paper's convention needs.

    Args:
        views: all tensors.
        thresholds: of each model, the magnitude from which differences are kept.
    """

    def __init__(self, views: Sequence[TensorView], thresholds: list[Threshold]) -> None:
        self.views = views
        self.thresholds = thresholds
        self._majority: float | None = None

    def majority(self, method: Ties) -> float:
        """Returns the sign that most entries of the model elect; counted when it is first needed, which is rare."""
        if self._majority is None:
            votes = 0
            for view in self.views:
                for block in view.blocks():
                    votes += int(method.sparse(block, view, self).sum(0).sign().sum())
            self._majority = float((votes > 0) - (votes < 0))
        return self._majority


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
        # The authors' code keeps what is not below the (d - k d)-th smallest: one more than k d.
        k = min(count, int(self.density * count) + 1)
        return Survey(views, kth_largest(views, k, num_models))

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds what is kept of each model's tensor."""
        if survey is not None:
            return survey
        k = int(self.density * view.elements)
        k = max(1, k) if self.preset == "mergekit" else k
        return [Trimmer(threshold, k) for threshold in kth_largest([view], k, view.num_models)]

    def sparse(self, block: Block, view: TensorView, observed: Any) -> Tensor:
        """Removes the small differences."""
        deltas_MRC = block.deltas_MRC
        if self.density == 1:
            return deltas_MRC
        if isinstance(observed, Survey):
            kept = [not_below(d, t.value) for d, t in zip(deltas_MRC, observed.thresholds, strict=True)]
        else:
            kept = [keeps(delta) for delta, keeps in zip(deltas_MRC, observed, strict=True)]
        return torch.stack(kept)


def check_density(density: float) -> None:
    """Raises unless a density is in (0, 1]."""
    if not 0 < density <= 1 or not math.isfinite(density):
        raise ValueError(f"density is {density}; it must be in (0, 1] (0.2 keeps a fifth of the differences)")
