"""Election of a sign for every entry, and the mean of the differences that agree with it, in three conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Block

Preset = Literal["paper", "peft", "mergekit"]


def elect_and_average(
    block: Block,
    sparse_MRC: Tensor,
    weights: Sequence[float] | None,
    scale: float,
    preset: Preset,
    majority: Callable[[], float] = lambda: 1.0,
    *,
    divide: bool = True,
) -> Tensor:
    r"""Elects a sign for every entry, and adds the mean of the differences that agree with it to the base.

    With :math:`\tau_i` the sparse differences and :math:`\gamma = \operatorname{sign} \sum_i \tau_i`,
    :math:`\theta = \theta_0 + \lambda \sum_{i \in A} w_i \tau_i / D` over those with the elected sign, where D is

    - ``paper``: the sum of their weights, which is the paper's plain mean for equal weights; entries whose sum is 0
      take the sign of the majority of all entries of the model;
    - ``peft``: their number, so that weights scale the result; the election ignores weights, and 0 counts as positive;
    - ``mergekit``: the sum of their weights; the election counts weights, and 0 counts as positive.

    Args:
        block: with the base.
        sparse_MRC: what is left of every model's differences.
        weights: one per model; 1 each by default.
        scale: lambda.
        preset: the convention.
        majority: returns the sign of entries that cancel exactly, under ``paper``.
        divide: by D; else by 1.
    """
    assert block.base_RC is not None
    factors = [1.0] * len(sparse_MRC) if weights is None else [float(weight) for weight in weights]
    voices = factors if preset == "mergekit" else [1.0] * len(factors)
    votes_RC = sparse_MRC[0] * voices[0]
    for sparse_RC, voice in zip(sparse_MRC[1:], voices[1:], strict=True):
        votes_RC.add_(sparse_RC, alpha=voice)
    sign_RC = torch.copysign(votes_RC.new_ones(()), votes_RC)
    total_RC, divisor_RC = _agreeing(sparse_MRC, sign_RC, factors, voices, preset)
    if preset == "paper":
        # Where positive differences agree with a sum of 0, negative ones cancel them. (Comparisons into floating-point
        # numbers take a fraction of the time of booleans.)
        zero_RC = torch.eq(votes_RC, 0, out=torch.empty_like(votes_RC))
        ones = [1.0] * len(factors)
        count_RC = divisor_RC if weights is None else _agreeing(sparse_MRC, sign_RC, ones, ones, preset)[1]
        if float(zero_RC.mul_(count_RC).sum()) > 0:
            sign_RC[votes_RC == 0] = majority()
            total_RC, divisor_RC = _agreeing(sparse_MRC, sign_RC, factors, voices, preset)
    if not divide:
        return block.base_RC.add(total_RC, alpha=scale)
    divisor_RC += torch.eq(divisor_RC, 0, out=torch.empty_like(divisor_RC))
    return torch.addcdiv(block.base_RC, total_RC, divisor_RC, value=scale)


def _agreeing(
    sparse_MRC: Tensor, sign_RC: Tensor, factors: Sequence[float], voices: Sequence[float], preset: Preset
) -> tuple[Tensor, Tensor]:
    """Sums the weighted differences that agree with a sign, and what they are divided by, ``(R, C)`` each."""
    total_RC, divisor_RC = torch.zeros_like(sign_RC), torch.zeros_like(sign_RC)
    agreeing_RC = torch.empty_like(sign_RC)
    for sparse_RC, factor, voice in zip(sparse_MRC, factors, voices, strict=True):
        # Positive where the difference agrees; 0 agrees with no sign.
        torch.mul(sparse_RC, sign_RC, out=agreeing_RC)
        if voice != 1:
            agreeing_RC.mul_(voice)
        agreeing_RC.relu_()
        total_RC.add_(agreeing_RC, alpha=1.0 if preset == "mergekit" else factor)
        divisor_RC.add_(agreeing_RC.sign_(), alpha=1.0 if preset == "peft" else factor)
    return total_RC.mul_(sign_RC), divisor_RC


def election_conventions(preset: Preset) -> dict[str, Any]:
    """Returns what a preset decides, for the manifest.

    Example:
        >>> election_conventions("peft")
        {'elect_on': 'raw', 'normalize_by': 'count', 'zero_sign': 'positive'}
    """
    return {
        "elect_on": "weighted" if preset == "mergekit" else "raw",
        "normalize_by": "count" if preset == "peft" else "weight",
        "zero_sign": "majority" if preset == "paper" else "positive",
    }
