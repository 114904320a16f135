"""Logged metrics of a reward model, from the rows of a whole batch.

Legend: E examples, K attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..distributed.collectives import Metrics
from .functional import attribute_correlation, expected_calibration_error


def spread(rewards: Tensor) -> Metrics:
    """Computes mean, standard deviation, minimum and maximum of rewards of any shape."""
    values = {f"rewards/{name}": getattr(rewards, name)() for name in ("mean", "min", "max")}
    return values | ({"rewards/std": rewards.std(correction=0)} if rewards.numel() > 1 else {})


def pair_metrics(rewards_E2: Tensor, tie_E: Tensor, *, calibration: bool) -> Metrics:
    """Computes means of chosen and rejected rewards and of their margin, and accuracy over pairs that are not ties.

    Args:
        rewards_E2: chosen and rejected.
        tie_E: bool.
        calibration: also compute the expected calibration error.
    """
    chosen, rejected = rewards_E2.unbind(dim=1)
    values = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }
    decided = (chosen - rejected)[~tie_E]
    if len(decided):
        values["rewards/accuracies"] = (decided > 0).double().mean()
        if calibration:
            values["calibration_error"] = expected_calibration_error(decided.abs().sigmoid(), decided > 0)
    return values


def rating_metrics(rewards_EK: Tensor, ratings_EK: Tensor, names: Sequence[str]) -> Metrics:
    """Computes mean squared error and correlation of every attribute, over the rows where it was rated.

    Args:
        rewards_EK: the model's rewards.
        ratings_EK: NaN where a rating is missing.
        names: of the attributes.
    """
    rewards_EK = rewards_EK.double()
    correlations = attribute_correlation(rewards_EK, ratings_EK)
    values = {}
    for k, name in enumerate(names):
        error = (rewards_EK[:, k] - ratings_EK[:, k])[~ratings_EK[:, k].isnan()]
        if len(error):
            values[f"mse/{name}"] = error.square().mean()
        if not correlations[k].isnan():
            values[f"correlation/{name}"] = correlations[k]
    return values
