"""Logged metrics of the completions of an iteration or of a validation set.

Legend: E prompts, G completions of each, K reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.collectives import gather_objects
from .advantages import group_advantages


def rollout_metrics(
    rewards_EGK: Tensor, scores_EG: Tensor, *, names: Sequence[str], lengths_EG: Tensor, ended_EG: Tensor
) -> dict[str, Tensor]:
    """Computes means, spreads and extremes of rewards and lengths over all completions.

    ``reward_std`` is the mean over groups of the standard deviation within a group and ``frac_reward_zero_std`` the
    share of groups with equal rewards, for groups of two completions or more. ``rewards/<name>/mean`` and ``std`` are
    over all completions that the function scored, and ``scored`` is their share. ``completions/clipped_ratio`` is the
    share truncated by the length limit, and ``terminated`` lengths are those of the others. Undefined metrics are
    omitted.

    Args:
        rewards_EGK: one number per reward function, NaN where it could not score.
        scores_EG: their weighted sum, NaN where none could score.
        names: names of the functions.
        lengths_EG: tokens of each completion.
        ended_EG: 1 where a completion ended before the limit, else 0.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> found = rollout_metrics(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[1.0, 0.0]]), names=["right"],
        ...                         lengths_EG=ones, ended_EG=ones)
        >>> float(found["reward"]), float(found["frac_reward_zero_std"])
        (0.5, 0.0)
    """
    num_groups, group_size = scores_EG.shape
    index_S = torch.arange(num_groups, device=scores_EG.device).repeat_interleave(group_size)
    groups = group_advantages(scores_EG.flatten(), group_index_S=index_S, num_groups=num_groups)
    values = {"reward": scores_EG.nanmean()}
    if group_size > 1:
        values |= {
            "reward_std": groups.std_G.mean(),
            "frac_reward_zero_std": (~groups.has_signal_G).double().mean(),
        }
    for name, column_S in zip(names, rewards_EGK.flatten(0, 1).unbind(dim=1), strict=True):
        scored = column_S[~column_S.isnan()]
        values[f"rewards/{name}/scored"] = torch.tensor(len(scored) / max(len(column_S), 1))
        if len(scored):
            values[f"rewards/{name}/mean"] = scored.mean()
            values[f"rewards/{name}/std"] = scored.std(correction=min(1, len(scored) - 1))
    ended = ended_EG.bool()
    for kind, lengths in (("", lengths_EG.flatten()), ("terminated_", lengths_EG[ended])):
        if len(lengths):
            values |= {
                f"completions/mean_{kind}length": lengths.mean(),
                f"completions/min_{kind}length": lengths.amin(),
                f"completions/max_{kind}length": lengths.amax(),
            }
    values["completions/clipped_ratio"] = 1 - ended_EG.mean()
    return {name: value for name, value in values.items() if not value.isnan()}


def sampling_metrics(difference_N: Tensor, weights_N: Tensor) -> dict[str, Tensor]:
    """Computes how far the trained distribution is from the sampling distribution, over all ranks.

    Args:
        difference_N: log-prob under the trained minus log-prob under the sampling distribution, of this rank's tokens.
        weights_N: their importance weights.
    """
    gap_N = difference_N.abs()
    own = [float(gap_N.sum()), float(weights_N.sum()), float(len(gap_N))]
    ends = [float(gap_N.max()), float(weights_N.min()), float(weights_N.max())] if len(gap_N) else None
    parts = gather_objects((own, ends))
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
