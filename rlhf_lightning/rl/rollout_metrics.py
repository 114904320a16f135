"""Logged metrics of the completions of an iteration or of a validation set.

Legend: S completions of all prompts, K reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..distributed.collectives import gather_objects
from .advantages import group_advantages


def rollout_metrics(
    rewards_SK: Tensor,
    scores_S: Tensor,
    *,
    group_index_S: Tensor,
    names: Sequence[str],
    lengths_S: Tensor,
    ended_S: Tensor,
) -> dict[str, Tensor]:
    """Computes means, spreads and extremes of rewards and lengths over all completions.

    ``reward_std`` is the mean over groups of the standard deviation within a group and ``frac_reward_zero_std`` the
    share of groups with equal rewards, for groups of two completions or more. ``rewards/<name>/mean`` and ``std`` are
    over all completions that the function scored, and ``scored`` is their share. ``completions/clipped_ratio`` is the
    share truncated by the length limit, and ``terminated`` lengths are those of the others. Undefined metrics are
    omitted.

    Args:
        rewards_SK: one number per reward function, NaN where it could not score.
        scores_S: their weighted sum, NaN where none could score.
        group_index_S: prompt of each completion, from 0 on.
        names: names of the functions.
        lengths_S: tokens of each completion.
        ended_S: 1 where a completion ended before the limit, else 0.

    Example:
        >>> ones, index = torch.ones(2), torch.tensor([0, 0])
        >>> found = rollout_metrics(torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 0.0]), group_index_S=index,
        ...                         names=["right"], lengths_S=ones, ended_S=ones)
        >>> float(found["reward"]), float(found["frac_reward_zero_std"])
        (0.5, 0.0)
    """
    num_groups = int(group_index_S.max()) + 1 if len(group_index_S) else 0
    groups = group_advantages(scores_S, group_index_S=group_index_S, num_groups=num_groups)
    values = {"reward": scores_S.nanmean()}

    # With one completion per prompt there is no spread within groups.
    if num_groups < len(scores_S):
        values |= {
            "reward_std": groups.std_G.mean(),
            "frac_reward_zero_std": (~groups.has_signal_G).double().mean(),
        }

    # Each function alone, unweighted. One value has no standard deviation with Bessel's correction: 0 without it.
    for name, column_S in zip(names, rewards_SK.unbind(dim=1), strict=True):
        scored = column_S[~column_S.isnan()]
        values[f"rewards/{name}/scored"] = torch.tensor(len(scored) / max(len(column_S), 1))
        if len(scored):
            values[f"rewards/{name}/mean"] = scored.mean()
            values[f"rewards/{name}/std"] = scored.std(correction=min(1, len(scored) - 1))

    for kind, lengths in (("", lengths_S), ("terminated_", lengths_S[ended_S.bool()])):
        if len(lengths):
            values |= {
                f"completions/mean_{kind}length": lengths.mean(),
                f"completions/min_{kind}length": lengths.amin(),
                f"completions/max_{kind}length": lengths.amax(),
            }
    values["completions/clipped_ratio"] = 1 - ended_S.mean()

    # NaN: means over no completion at all.
    return {name: value for name, value in values.items() if not value.isnan()}


def objective_metrics(sums: Mapping[str, float], *, coef: float) -> dict[str, Tensor]:
    """Computes what PPO maximises, as means over completions, whose tokens each has for itself.

    Args:
        sums: over all completions: ``samples``, ``tokens``, ``scores``, ``entropy``, ``num_eos``, and ``kl`` with a
            reference.
        coef: weight of the divergence.

    Returns:
        Nothing where no completion could be scored, so that means are undefined.

    Example:
        >>> sums = {"samples": 2.0, "tokens": 8.0, "scores": 3.0, "entropy": 4.0, "num_eos": 1.0, "kl": 1.0}
        >>> float(objective_metrics(sums, coef=0.1)["objective/rlhf_reward"])
        1.45
    """
    if not sums["samples"]:
        return {}
    count = sums["samples"]
    values = {
        "objective/scores": sums["scores"] / count,
        "objective/entropy": sums["entropy"] / count,
        "completions/num_eos": sums["num_eos"],
    }
    if "kl" in sums:
        penalty = -coef * sums["kl"] / count
        values |= {
            "kl": sums["kl"] / max(sums["tokens"], 1.0),
            "objective/kl": sums["kl"] / count,
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + values["objective/scores"],
            "kl_coef": coef,
        }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def sampling_metrics(difference_N: Tensor, weights_N: Tensor) -> dict[str, Tensor]:
    """Computes how far the trained distribution is from the sampling distribution, over all ranks.

    Args:
        difference_N: log-prob under the trained minus log-prob under the sampling distribution, of this rank's tokens.
        weights_N: their importance weights.
    """
    gap_N = difference_N.abs()
    local_sums = [float(gap_N.sum()), float(weights_N.sum()), float(len(gap_N))]
    ends = [float(gap_N.max()), float(weights_N.min()), float(weights_N.max())] if len(gap_N) else None
    parts = gather_objects((local_sums, ends))
    gap, weight, count = (sum(part[0][n] for part in parts) for n in range(3))
    seen = [part[1] for part in parts if part[1] is not None]
    if not seen:
        return {}
    values = {
        "sampling/sampling_logp_difference/mean": gap / count,
        "sampling/sampling_logp_difference/max": max(end[0] for end in seen),
        "sampling/importance_sampling_ratio/mean": weight / count,
        "sampling/importance_sampling_ratio/min": min(end[1] for end in seen),
        "sampling/importance_sampling_ratio/max": max(end[2] for end in seen),
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
