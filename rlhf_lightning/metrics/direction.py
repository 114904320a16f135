"""Tells from a metric's name whether more of it is better."""

from __future__ import annotations

import re
from typing import Literal

# Words in a metric's name that decide whether more of it is better.
_MORE = {"accuracy", "accuracies", "reward", "rewards", "margin", "margins", "f1", "auc"}
_LESS = {"loss", "perplexity", "nll", "kl", "error", "errors", "mse", "mae", "brier", "failures"}
_NEITHER = {"std", "rejected", "min", "max", "ratio"}


def direction_of(monitor: str) -> Literal["max", "min"]:
    """Derives from a metric's name whether more or less of it is better.

    Raises:
        ValueError: the name does not tell.

    Example:
        >>> direction_of("val/loss"), direction_of("val/rewards/accuracies")
        ('min', 'max')
    """
    # A quality_loss is a loss: words for less win over words for more.
    words = set(re.split(r"[^a-z0-9]+", monitor.lower()))
    if words & _LESS and not words & _NEITHER:
        return "min"
    if words & _MORE and not words & _NEITHER:
        return "max"
    raise ValueError(
        f"monitor is {monitor!r}, whose name does not say whether more of it is better: set mode to max or min"
    )
