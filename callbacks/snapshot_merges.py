"""Merges of snapshots of one policy, tensor by tensor, whole or sharded, computed in fp32 at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .trained_weights import exact

Weights = Mapping[str, Tensor]
Decay = Literal["linear", "cosine", "sqrt"]
DECAYS: tuple[Decay, ...] = get_args(Decay)
# Directions that are nearer to each other have no angle that could be divided by.
_PARALLEL = 1 - 1e-7


def decay_weights(count: int, decay: Decay) -> list[float]:
    r"""Returns the weights of snapshots whose mean stands for a decay of the learning rate over their window.

    Paper: WSM (Tian et al., 2025, arXiv:2507.17634). A mean with weights c_j moves from the first snapshot by sums of
    w_i times the update from snapshot i to the next, w_i = sum_{j > i} c_j. Here w_i = f(i / N) for N snapshots
    and a decay f from 1 to 0, so c_j = f((j - 1) / N) - f(j / N).

    Args:
        count: N, at least 1.
        decay: ``linear``, f(x) = 1 - x, the plain mean; ``cosine``, (1 + cos(pi x)) / 2; ``sqrt``, 1 - sqrt(x).

    Returns:
        N weights, oldest snapshot first; their sum is 1.

    Example:
        >>> [round(weight, 3) for weight in decay_weights(4, "sqrt")]
        [0.5, 0.207, 0.159, 0.134]
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "sqrt": lambda x: 1 - math.sqrt(x),
    }
    values = [shapes[decay](number / count) for number in range(count + 1)]
    return [before - after for before, after in pairwise(values)]


@torch.no_grad()
def mean_merge(snapshots: Sequence[Weights], start: Weights, eta: float, decay: Decay = "linear") -> dict[str, Tensor]:
    """Averages snapshots.

    Args:
        snapshots: at least one, oldest first.
        start: weights that the mean is pulled towards; empty for no pull.
        eta: position between the start and the mean.
        decay: see ``decay_weights``.
    """
    found = {}
    weights = decay_weights(len(snapshots), decay)
    for name in snapshots[0]:
        if decay == "linear":
            total = exact(snapshots[0][name]).clone()
            for snapshot in snapshots[1:]:
                total += exact(snapshot[name])
            mean = total / len(snapshots)
        else:
            mean = weights[0] * exact(snapshots[0][name])
            for weight, snapshot in zip(weights[1:], snapshots[1:], strict=True):
                mean += weight * exact(snapshot[name])
        found[name] = exact(start[name]) + eta * (mean - exact(start[name])) if start else mean
    return found


@torch.no_grad()
def spherical_merge(snapshots: Sequence[Weights], start: Weights, eta: float) -> dict[str, Tensor]:
    """Merges the task vectors of policies on the sphere, one after the other.

    Args:
        snapshots: policies, at least one.
        start: weights that they were trained from.
        eta: position between the start and the merge.
    """
    found = {}
    for name in snapshots[0]:
        origin = exact(start[name])
        merged = exact(snapshots[0][name]) - origin
        for count, snapshot in enumerate(snapshots[1:], start=2):
            delta = exact(snapshot[name]) - origin
            norms = _inner(merged, merged), _inner(delta, delta)
            first, second = arc_weights(*norms, _inner(merged, delta), 1 / count)
            merged = first * merged + second * delta
        found[name] = origin + eta * merged
    return found


def _inner(one: Tensor, other: Tensor) -> float:
    """The inner product, over all shards, summed in fp64."""
    total = (one.double() * other.double()).sum()
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def arc_weights(one: float, other: float, inner: float, t: float) -> tuple[float, float]:
    """Returns the factors of two vectors in their spherical interpolation.

    Args:
        one: squared norm of the first vector.
        other: squared norm of the second.
        inner: their inner product.
        t: position on the arc, in [0, 1].

    Returns:
        ``sin((1 - t) w) / sin(w)`` and ``sin(t w) / sin(w)`` for their angle ``w``; the linear ones where they have no
        angle, or one that leaves the arc open.

    Example:
        >>> [round(weight, 6) for weight in arc_weights(1.0, 1.0, 0.0, 0.5)]
        [0.707107, 0.707107]
    """
    norms = math.sqrt(one * other)
    cosine = inner / norms if norms > 0 else 1.0
    if not -_PARALLEL < cosine < _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
