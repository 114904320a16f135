"""TIES: trim, elect signs, merge what agrees (Yadav et al., 2023, arXiv:2306.01708), in three conventions."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Block, Method, TensorView
from .election import Preset, elect_and_average, election_conventions
from .magnitude import Trimmer, kth_largest, trim, trimmers_of


@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    r"""TIES: keeps the largest differences of each model, elects signs, and averages what agrees.

    The conventions differ in the election (see ``elect_and_average``), and in what is kept:

    - ``paper``: the largest of the whole model, of its :math:`d` entries those not below the
      :math:`(d - \lfloor k d \rfloor)`-th smallest, as the authors' code does (one more than k d, and all equal ones);
    - ``peft`` and ``mergekit``: exactly :math:`\lfloor k n \rfloor` of every tensor of n entries, for ``mergekit`` at
      least one.

    Args:
        weights: one per model; 1 each by default.
        scale: lambda; 1 in the paper's main results.
        preset: the convention: ``paper``, ``peft`` or ``mergekit``.
        density: k, the fraction of entries that is kept, in (0, 1]; 0.2 in the paper.

    Example:
        >>> Ties(density=0.2, preset="peft").conventions()["trim_scope"]
        'tensor'
    """

    name: ClassVar[str] = "ties"
    needs_base: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    preset: Preset = "paper"
    density: float = 0.2

    def conventions(self) -> dict[str, Any]:
        """Adds what the preset decides."""
        scope = "model" if self.preset == "paper" else "tensor"
        return {**super().conventions(), **election_conventions(self.preset), "trim_scope": scope}

    def survey(self, views: Iterable[TensorView], num_models: int) -> Any:
        """Finds the thresholds of whole models, and the sign of most entries, for the paper's convention."""
        if self.preset != "paper":
            return None
        views = list(views)
        if self.density == 1:
            return Survey(views, [Trimmer(0.0)] * num_models)
        count = sum(view.elements for view in views)
        # The authors' code keeps what is not below the (d - k d)-th smallest: one more than k d.
        k = min(count, int(self.density * count) + 1)
        return Survey(views, [Trimmer(threshold.value) for threshold in kth_largest(views, k, num_models)])

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Finds what is kept of each model's tensor."""
        if survey is not None:
            return survey.trimmers
        if self.density == 1:
            return [Trimmer(0.0)] * view.num_models
        k = int(self.density * view.elements)
        return trimmers_of(view, max(1, k) if self.preset == "mergekit" else k)

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Trims the differences of one block, elects signs, and averages what agrees."""
        trimmed_MRC = trim(block, observed)
        majority = (lambda: 1.0) if survey is None else survey.majority
        return elect_and_average(block, trimmed_MRC, self.weights, self.scale, self.preset, majority)


class Survey:
    """Statistics of the whole model, which the paper's convention needs.

    Args:
        views: all tensors.
        trimmers: remove what is not kept, for each model.
    """

    def __init__(self, views: Sequence[TensorView], trimmers: Sequence[Trimmer]) -> None:
        self.views = views
        self.trimmers = trimmers
        self._majority: float | None = None
        self._lock = threading.Lock()

    def majority(self) -> float:
        """Returns the sign that most entries of the model elect; counted when it is first needed, which is rare."""
        # Called where blocks are merged, several at a time: one of them counts, alone.
        with self._lock:
            if self._majority is None:
                blocks = (block for view in self.views for block in view.blocks())
                votes = sum(int(trim(block, self.trimmers).sum(0).sign().sum()) for block in blocks)
                self._majority = float((votes > 0) - (votes < 0))
            return self._majority
