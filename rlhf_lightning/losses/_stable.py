"""Logistic and exponential functions that do not overflow and keep their gradient."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this exponent, exp is continued by its tangent: its square still fits in fp32 at exponents of 1e4, and unlike
# with a clamp the gradient does not vanish.
MAX_EXPONENT: Final = 30.0


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Computes -(1 - e) log S(m) - e log S(-m), with S the logistic function and e = ``label_smoothing``."""
    loss = -F.logsigmoid(margin)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def _beyond(exponent: Tensor) -> Tensor:
    return math.exp(MAX_EXPONENT) * (exponent - MAX_EXPONENT).relu()


def bounded_exp(exponent: Tensor) -> Tensor:
    """Computes exp(x), continued by its tangent above ``MAX_EXPONENT`` so that no log-ratio overflows.

    Args:
        exponent: any shape.

    Returns:
        Finite values of the same shape for any finite exponent.

    Example:
        >>> bounded_exp(torch.tensor([0.0, 1e4])).isfinite().all()
        tensor(True)
    """
    return exponent.clamp(max=MAX_EXPONENT).exp() + _beyond(exponent)


def bounded_expm1(exponent: Tensor) -> Tensor:
    """Computes exp(x) - 1, continued by its tangent above ``MAX_EXPONENT``."""
    return exponent.clamp(max=MAX_EXPONENT).expm1() + _beyond(exponent)


def log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) for x <= 0, accurate at both ends; x is at most minus the dtype's epsilon.

    Machler (2012), "Accurately computing log(1 - exp(-|a|))": log(-expm1(x)) near 0, log1p(-exp(x)) below -log 2.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Each branch gets an argument at which it is finite, so that the branch not taken puts no NaN in the gradient.
    far = torch.log1p(-x.clamp(max=-math.log(2)).exp())
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    return torch.where(x < -math.log(2), far, near)
