"""Spherical interpolation of two models (Shoemake, 1985, "Animating rotation with quaternion curves")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...utils.validation import check_choice
from .base import Block, Method, TensorView, grams, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Slerp(Method):
    r"""Interpolates each tensor along the arc between two models.

    With the angle :math:`\omega` between the flattened tensors a and b,
    :math:`\theta = [\sin((1 - t) \omega)\, a + \sin(t \omega)\, b] / \sin \omega`. Nearly parallel tensors are
    interpolated linearly, which is the limit; so are tensors of one element and tensors of norm 0, which have no angle.

    Args:
        t: position on the arc, in [0, 1]: 0 is the first model, 1 the second.
        antiparallel: between tensors in opposite directions every arc is as good as any other: ``error`` names the
            tensor, ``linear`` interpolates it linearly, through 0.

    Example:
        >>> Slerp(t=0.3).t
        0.3
    """

    name: ClassVar[str] = "slerp"
    t: float = 0.5
    antiparallel: Literal["error", "linear"] = "error"
    _parallel: ClassVar[float] = 1 - 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.t <= 1:
            raise ValueError(f"t is {self.t}; it must be in [0, 1], 0 for the first model and 1 for the second")
        check_choice("antiparallel", self.antiparallel, ("error", "linear"))

    def check(self, num_models: int) -> None:
        """Checks that there are two models."""
        if num_models != 2:
            raise ValueError(f"slerp interpolates between 2 models, and was given {num_models}: use karcher for more")

    def observe(self, view: TensorView, survey: Any) -> Any:
        """Computes the coefficients of the two models."""
        found = grams(view)
        cosine = float(found.cosines_MM()[0, 1])
        if view.elements == 1 or float(found.norms_M.min()) == 0 or cosine > self._parallel:
            return [1 - self.t, self.t]
        if cosine < -self._parallel:
            if self.antiparallel == "linear":
                return [1 - self.t, self.t]
            raise ValueError(
                f"the tensor {view.name!r} has opposite directions in the two models (cosine {cosine:.6f}), between "
                "which no arc is the shortest: give antiparallel='linear', or use method='linear'"
            )
        omega = math.acos(cosine)
        return [math.sin((1 - self.t) * omega) / math.sin(omega), math.sin(self.t * omega) / math.sin(omega)]

    def combine(self, block: Block, view: TensorView, observed: Any, survey: Any) -> Tensor:
        """Combines one block."""
        return weighted_sum(torch.tensor(observed, dtype=block.models_MRC.dtype), block.models_MRC)
