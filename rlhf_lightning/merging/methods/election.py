"""Election of a sign for every entry, and the mean of the differences that agree with it, in three conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Block, weights_of

Preset = Literal["paper", "peft", "mergekit"]


def elect_and_average(
    block: Block,
    sparse_MRC: Tensor,
    weights: Sequence[float] | None,
    scale: float,
    preset: Preset,
    majority: Callable[[], float] = lambda: 1.0,
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
    """
    assert block.base_RC is not None
    # Weights of 1 cost nothing.
    weights_M11 = None if weights is None else weights_of(weights, sparse_MRC)[:, None, None]
    weighted_MRC = sparse_MRC if weights_M11 is None else sparse_MRC * weights_M11
    voting_MRC = weighted_MRC if preset == "mergekit" else sparse_MRC
    votes_RC = voting_MRC.sum(0)
    sign_RC = torch.where(votes_RC < 0, -1.0, 1.0).to(votes_RC.dtype)
    if preset == "paper":
        # Where all differences are 0 the sign does not matter.
        cancel_RC = (votes_RC == 0).logical_and_((sparse_MRC != 0).any(0))
        if bool(cancel_RC.any()):
            sign_RC[cancel_RC] = majority()

    # Entries of 0 agree with no sign.
    agrees_MRC = voting_MRC * sign_RC > 0
    total_RC = torch.where(agrees_MRC, weighted_MRC, 0.0).sum(0)
    if preset == "peft" or weights_M11 is None:
        divisor_RC = agrees_MRC.sum(0, dtype=total_RC.dtype)
    else:
        divisor_RC = (agrees_MRC * weights_M11).sum(0)
    divisor_RC.masked_fill_(divisor_RC == 0, 1.0)
    return torch.addcdiv(block.base_RC, total_RC, divisor_RC, value=scale)


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
