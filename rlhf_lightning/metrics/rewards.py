"""Logged metrics of rewards, explicit or implied by a policy, from the rows of a whole batch.

Legend: E examples, P pairs, K attributes.
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


def reward_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """Computes the mean rewards of chosen and of rejected completions, and their difference, the margin.

    For pairs this is the mean of the pairs' margins.

    Args:
        chosen: any number of rewards, of at most one dimension; without any, there is neither a mean nor a margin.
        rejected: likewise; the numbers may differ.

    Example:
        >>> reward_metrics(torch.tensor([1.0, 3.0]), torch.tensor([0.5]))["rewards/margins"]
        tensor(1.5000)
    """
    means = {"chosen": chosen, "rejected": rejected}
    values = {f"rewards/{name}": rewards.mean() for name, rewards in means.items() if len(rewards)}
    if len(values) == 2:
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    return values


def pair_metrics(
    chosen_P: Tensor, rejected_P: Tensor, *, tie_P: Tensor | None = None, calibration: bool = False
) -> Metrics:
    """Computes the mean rewards and margin of pairs, and accuracy: the share where the chosen one's is larger.

    Args:
        chosen_P: rewards of the chosen completions.
        rejected_P: of the rejected ones.
        tie_P: bool, pairs that accuracy and calibration leave out.
        calibration: also compute the expected calibration error.
    """
    values = reward_metrics(chosen_P, rejected_P)
    margins = chosen_P - rejected_P
    decided = margins if tie_P is None else margins[~tie_P]
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
