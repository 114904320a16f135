"""Win rates of paired answers, as counted and controlled for length."""

from __future__ import annotations

import numpy as np

from ..utils.validation import check_positive, check_same_length
from .intervals import Values

_STEPS = 100


def length_controlled_win_rate(outcomes: Values, length_differences: Values, *, ridge: float = 1e-4) -> float:
    r"""Estimates the win rate that answers of equal length would have.

    Paper: Dubois et al., 2024 (arXiv:2404.04475), the regression of two models without the difficulty of prompts,
    which takes many models to fit: :math:`P(\text{win}) = \sigma(\theta + \phi \tanh(d / \text{std}(d)))` with the
    difference d of lengths and its sample deviation; the rate is :math:`\sigma(\theta)`. Fitted by Newton's method to
    the cross-entropy with outcomes in [0, 1], plus ``ridge`` times the squares of both coefficients, which keeps them
    finite where one model always wins.

    Args:
        outcomes: 1 for a win, 0 for a loss, 1/2 for a tie, or a probability; at least two.
        length_differences: length of the model's answer less that of the other's, in the same order.
        ridge: above 0.

    Returns:
        A number in (0, 1).

    Raises:
        ValueError: lists of different lengths, fewer than two, or an outcome outside [0, 1].

    Example:
        >>> outcomes, differences = [1, 1, 1, 0, 0, 1], [40, 55, 60, -50, -45, -2]
        >>> round(length_controlled_win_rate(outcomes, differences, ridge=0.01), 2)
        0.69
    """
    check_same_length(outcomes=outcomes, length_differences=length_differences)
    check_positive("ridge", ridge, "0.0001 is usual")
    wins, lengths = np.asarray(outcomes, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if len(wins) < 2:
        raise ValueError(f"there are {len(wins)} outcomes; a regression needs at least two")
    if not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError(f"an outcome is {wins[~((wins >= 0) & (wins <= 1))][0]}; it must be in [0, 1]")
    spread = lengths.std(ddof=1)
    columns = np.stack([np.ones_like(wins), np.tanh(lengths / spread) if spread > 0 else np.zeros_like(wins)], axis=1)

    def loss(weights: np.ndarray) -> float:
        logits = columns @ weights
        return float((np.logaddexp(0, logits) - wins * logits).mean() + ridge * (weights @ weights))

    # The loss is convex; a step that would not lower it is halved.
    weights = np.zeros(2)
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(-columns @ weights))
        gradient = columns.T @ (chances - wins) / len(wins) + 2 * ridge * weights
        curvature = (columns.T * (chances * (1 - chances))) @ columns / len(wins) + 2 * ridge * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-12:
            break
    return float(1 / (1 + np.exp(-weights[0])))
