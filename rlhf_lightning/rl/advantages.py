"""From rewards to advantages: baselines within a group of samples, generalised advantage estimation, whitening.

Shapes: S sequences, G groups (the samples of one prompt), K reward functions, N sampled tokens of all sequences, flat;
tokens of different sequences may be interleaved, those of one sequence are in order. Index tensors hold the group of
each sequence and the sequence of each token. The reward of a sample that could not be scored is NaN. Statistics are
computed in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..utils.option_groups import OptionGroup
from ..utils.validation import check_choice

ScaleRewards = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

SCALE_REWARDS: Final[tuple[ScaleRewards, ...]] = get_args(ScaleRewards)
BASELINES: Final[tuple[Baseline, ...]] = get_args(Baseline)

# Rewards of a group that differ by less than this many roundings of their dtype are equal.
_SPREAD_TOLERANCE: Final = 8


class GroupAdvantages(NamedTuple):
    """Advantages per sequence, and statistics per group.

    Attributes:
        advantages_S: (S,), 0 for a sample that could not be scored.
        std_G: standard deviation of the scored rewards of each group, (G,), 0 for fewer than two.
        has_signal_G: whether two scored rewards of the group differ, (G,); if not, all its advantages are 0.
    """

    advantages_S: Tensor
    std_G: Tensor
    has_signal_G: Tensor


class AdvantagesAndReturns(NamedTuple):
    """Advantages and returns (the critic's targets) per token, (N,) each."""

    advantages_N: Tensor
    returns_N: Tensor


def _group_mean_and_std(values_S: Tensor, index_S: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes count, mean and sample standard deviation of each group, ignoring NaN."""
    scored_S = ~values_S.isnan()
    filled_S = values_S.nan_to_num(nan=0.0)
    zeros_G = filled_S.new_zeros(num_groups)
    count_G = zeros_G.index_add(0, index_S, scored_S.to(filled_S.dtype))
    mean_G = zeros_G.index_add(0, index_S, filled_S) / count_G.clamp(min=1)
    squares_S = torch.where(scored_S, (filled_S - mean_G[index_S]).square(), torch.zeros_like(filled_S))
    variance_G = zeros_G.index_add(0, index_S, squares_S) / (count_G - 1).clamp(min=1)
    return count_G, mean_G, variance_G.sqrt()


def _has_signal(rewards_S: Tensor, index_S: Tensor, num_groups: int) -> Tensor:
    def extreme(values_S: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
        start_G = values_S.new_full((num_groups,), math.inf if reduce == "amin" else -math.inf)
        return start_G.scatter_reduce(0, index_S, values_S, reduce)

    low_G = extreme(rewards_S.nan_to_num(nan=math.inf), "amin")
    high_G = extreme(rewards_S.nan_to_num(nan=-math.inf), "amax")
    size_G = torch.maximum(low_G.abs(), high_G.abs())
    return high_G - low_G > _SPREAD_TOLERANCE * torch.finfo(rewards_S.dtype).eps * size_G


def combine_rewards(rewards_SK: Tensor, *, weights_K: Tensor) -> Tensor:
    """Computes the weighted sum of the rewards of each sample.

    Args:
        rewards_SK: one column per reward function, NaN where it could not score, (S, K).
        weights_K: weight of each function, (K,).

    Returns:
        Rewards (S,); a missing reward counts as 0, and the sum is NaN where all are missing.

    Example:
        >>> nan = float("nan")
        >>> combine_rewards(torch.tensor([[1.0, 2.0], [1.0, nan], [nan, nan]]), weights_K=torch.tensor([1.0, 0.5]))
        tensor([2., 1., nan])
    """
    if rewards_SK.ndim != 2 or weights_K.shape != rewards_SK.shape[1:]:
        raise ValueError(
            f"rewards have shape {tuple(rewards_SK.shape)}, weights {tuple(weights_K.shape)}: use one weight per column"
        )
    totals_S = (rewards_SK * weights_K.to(rewards_SK)).nansum(dim=1)
    return totals_S.masked_fill(rewards_SK.isnan().all(dim=1), torch.nan)


def group_advantages(
    rewards_S: Tensor,
    *,
    group_index_S: Tensor,
    num_groups: int,
    scale_rewards: ScaleRewards = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-4,
) -> GroupAdvantages:
    """Computes the advantage of each sample over the others of its group.

    Papers: DeepSeekMath (Shao et al., 2024, arXiv:2402.03300), section 4.1, for (r - mean) / (std + eps); Dr. GRPO (Liu
    et al., 2025, arXiv:2503.20783) for ``none``; Tricks or Traps (Liu et al., 2025, arXiv:2508.08221) for ``batch``,
    the standard deviation of all rewards; RLOO (Ahmadian et al., 2024, arXiv:2402.14740) for ``leave_one_out``: the
    mean of the other samples. Samples that could not be scored are excluded from all statistics and get 0.

    Groups may differ in size but not be split over calls, and ``batch`` needs the global batch: gather first.

    Args:
        rewards_S: (S,), NaN where a sample could not be scored.
        group_index_S: group of each sample, 0 to ``num_groups - 1``, (S,).
        num_groups: G.
        scale_rewards: divide by the standard deviation of the ``group``, of the ``batch``, or not at all (``none``).
        baseline: subtract the ``mean`` of the group, or the mean of its other samples (``leave_one_out``).
        eps: added to the standard deviation, at least 0.

    Returns:
        The advantages in the rewards' dtype, and statistics per group.

    Raises:
        ValueError: for an unknown name or a number out of range.

    Example:
        >>> group_advantages(
        ...     torch.tensor([1.0, 0.0, 5.0, 5.0]), group_index_S=torch.tensor([0, 0, 1, 1]), num_groups=2,
        ...     scale_rewards="none",
        ... ).advantages_S
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    check_choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    check_choice("baseline", baseline, BASELINES)
    if not eps >= 0:
        raise ValueError(f"eps={eps} is below 0: 1e-4 is usual")

    rewards = rewards_S.double()
    count_G, mean_G, std_G = _group_mean_and_std(rewards, group_index_S, num_groups)
    has_signal_G = _has_signal(rewards_S, group_index_S, num_groups)
    advantages_S = rewards - mean_G[group_index_S]
    if baseline == "leave_one_out":
        # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
        advantages_S = advantages_S * (count_G / (count_G - 1).clamp(min=1))[group_index_S]
    if scale_rewards == "group":
        advantages_S = advantages_S / (std_G + eps)[group_index_S]
    elif scale_rewards == "batch":
        _, _, std = _group_mean_and_std(rewards, torch.zeros_like(group_index_S), 1)
        advantages_S = advantages_S / (std + eps)

    # Rounding alone must not become an advantage after division by a tiny deviation.
    teaches_S = has_signal_G[group_index_S] & ~rewards.isnan()
    advantages_S = torch.where(teaches_S, advantages_S, torch.zeros_like(advantages_S))
    return GroupAdvantages(advantages_S.to(rewards_S.dtype), std_G.to(rewards_S.dtype), has_signal_G)


def gdpo_advantages(
    rewards_SK: Tensor, *, weights_K: Tensor, group_index_S: Tensor, num_groups: int, eps: float = 1e-4
) -> GroupAdvantages:
    """Normalises each reward function within its group, sums them, and normalises the sums over the batch.

    Paper: GDPO (Liu et al., 2026, arXiv:2601.05242): A_k = (r_k - mean) / (std + eps) within the group, A the sum of
    w_k A_k, and (A - mean) / (std + eps) over the batch, so that a reward with a wide range does not drown the others.
    A function that scored fewer than two samples of a group, or all of them alike, adds 0 there.

    Args:
        rewards_SK: of the global batch, NaN where a function could not score, (S, K).
        weights_K: weight of each function, (K,).
        group_index_S: group of each sample, (S,).
        num_groups: G.
        eps: added to the standard deviations, at least 0.

    Returns:
        The advantages in the rewards' dtype, and per group the standard deviation of the weighted sum of rewards and
        whether any function gives a signal.

    Example:
        >>> gdpo_advantages(
        ...     torch.tensor([[1.0, 0.0], [0.0, 300.0]]), weights_K=torch.tensor([2.0, 1.0]),
        ...     group_index_S=torch.tensor([0, 0]), num_groups=1,
        ... ).advantages_S
        tensor([ 0.7070, -0.7070])
    """
    combined_S = combine_rewards(rewards_SK, weights_K=weights_K)
    parts = [
        group_advantages(column_S, group_index_S=group_index_S, num_groups=num_groups, eps=eps)
        for column_S in rewards_SK.unbind(dim=1)
    ]
    weights = weights_K.double().tolist()
    total_S = torch.stack(
        [weight * part.advantages_S.double() for weight, part in zip(weights, parts, strict=True)]
    ).sum(dim=0)
    total_S = total_S.masked_fill(combined_S.isnan(), torch.nan)
    one_group_S = torch.zeros_like(group_index_S)
    _, mean, std = _group_mean_and_std(total_S, one_group_S, 1)
    advantages_S = ((total_S - mean) / (std + eps).clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(nan=0.0)
    _, _, std_G = _group_mean_and_std(combined_S.double(), group_index_S, num_groups)
    has_signal_G = torch.stack([part.has_signal_G for part in parts]).any(dim=0)
    return GroupAdvantages(advantages_S.to(rewards_SK.dtype), std_G.to(rewards_SK.dtype), has_signal_G)


@dataclass(frozen=True, kw_only=True)
class RelativeAdvantage(OptionGroup):
    """The advantage of a completion over the others of its group.

    ``group_advantages`` and ``gdpo_advantages`` document papers and formulas.

    Args:
        scale_rewards: divide advantages by the deviation of the ``group``, of the whole ``batch``, or not at all
            (``none``).
        baseline: the ``mean`` of the group, or of its other samples (``leave_one_out``).
        multi_objective_aggregation: sum the rewards and normalise (``sum_then_normalize``), or the other way round
            (``normalize_then_sum``, GDPO), which needs the defaults of the other options.

    Raises:
        ValueError: options that exclude each other.

    Example:
        >>> rewards_SK = torch.tensor([[1.0], [0.0]])
        >>> RelativeAdvantage(scale_rewards="none")(
        ...     rewards_SK, scores_S=rewards_SK[:, 0], weights_K=torch.ones(1), group_index_S=torch.tensor([0, 0])
        ... ).advantages_S
        tensor([ 0.5000, -0.5000])
    """

    group: ClassVar[str] = "advantages"

    scale_rewards: ScaleRewards = "group"
    baseline: Baseline = "mean"
    multi_objective_aggregation: Aggregation = "sum_then_normalize"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalizes_each_reward and (self.baseline != "mean" or self.scale_rewards != "group"):
            raise ValueError(
                "advantages.multi_objective_aggregation is 'normalize_then_sum', which normalises each reward by its "
                "group's mean and deviation: leave baseline and scale_rewards at their defaults"
            )

    @property
    def normalizes_each_reward(self) -> bool:
        """Whether rewards are normalised before they are summed."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    def __call__(
        self, rewards_SK: Tensor, *, scores_S: Tensor, weights_K: Tensor, group_index_S: Tensor
    ) -> GroupAdvantages:
        """Computes the advantages of completions.

        Args:
            rewards_SK: outcome rewards of the global batch, NaN where a function could not score.
            scores_S: their weighted sums, less penalties.
            weights_K: weight of each function.
            group_index_S: prompt of each completion, from 0 on.
        """
        num_groups = int(group_index_S.max()) + 1 if len(group_index_S) else 0
        if self.normalizes_each_reward and len(weights_K):
            return gdpo_advantages(rewards_SK, weights_K=weights_K, group_index_S=group_index_S, num_groups=num_groups)
        return group_advantages(
            scores_S,
            group_index_S=group_index_S,
            num_groups=num_groups,
            scale_rewards=self.scale_rewards,
            baseline=self.baseline,
        )


def gae(
    rewards_N: Tensor,
    *,
    values_N: Tensor,
    sequence_index_N: Tensor,
    num_sequences: int,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> AdvantagesAndReturns:
    """Computes generalised advantage estimates within each sequence.

    Paper: High-Dimensional Continuous Control Using GAE (Schulman et al., 2016, arXiv:1506.02438), eqs. 11 and 16:
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}, with V and A 0 after the last token; the
    return is A_t + V_t.

    Args:
        rewards_N: (N,).
        values_N: the critic's value of the state before each token, (N,).
        sequence_index_N: sequence of each token, those of a sequence in their order, (N,).
        num_sequences: S.
        gamma: discount, in [0, 1].
        gae_lambda: in [0, 1]; 0 trusts the critic, 1 the rewards.

    Returns:
        Advantages and returns without gradient, (N,) each.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> zeros = torch.zeros(2, dtype=torch.long)
        >>> gae(torch.tensor([0.0, 1.0]), values_N=torch.tensor([0.5, 0.5]), sequence_index_N=zeros, num_sequences=1)
        AdvantagesAndReturns(advantages_N=tensor([0.4750, 0.5000]), returns_N=tensor([0.9750, 1.0000]))
    """
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is outside [0, 1]: gamma 1.0 and gae_lambda 0.95 are usual")
    rewards_N, values_N = rewards_N.detach(), values_N.detach()
    lengths_S = torch.bincount(sequence_index_N, minlength=num_sequences)
    longest = int(lengths_S.max()) if num_sequences else 0

    # A dense (T + 1, S) layout runs the recursion over all sequences at once; the last row is the 0 after the end.
    order_N = sequence_index_N.argsort(stable=True)
    sequence_N = sequence_index_N[order_N]
    starts_S = lengths_S.cumsum(0) - lengths_S
    step_N = torch.arange(len(order_N), device=order_N.device) - starts_S[sequence_N]
    values_TS = values_N.new_zeros(longest + 1, num_sequences)
    values_TS[step_N, sequence_N] = values_N[order_N]
    delta_TS = torch.zeros_like(values_TS)
    delta_TS[step_N, sequence_N] = rewards_N[order_N].to(values_N) - values_N[order_N]
    delta_TS[:-1] += gamma * values_TS[1:]
    for step in range(longest - 1, -1, -1):
        delta_TS[step] += gamma * gae_lambda * delta_TS[step + 1]

    advantages_N = torch.empty_like(values_N)
    advantages_N[order_N] = delta_TS[step_N, sequence_N]
    return AdvantagesAndReturns(advantages_N, advantages_N + values_N)


def moment_sums(values_N: Tensor, *, weights_N: Tensor | None = None) -> Tensor:
    """Computes the sums from which ``whiten`` takes mean and variance, after a sum over ranks.

    Args:
        values_N: (N,).
        weights_N: how often each counts, at least 0, (N,); ``None`` for once.

    Returns:
        Count, sum and sum of squares, (3,) in fp64.

    Example:
        >>> moment_sums(torch.tensor([1.0, 2.0, 9.0]), weights_N=torch.tensor([1.0, 2.0, 0.0])).tolist()
        [3.0, 5.0, 9.0]
    """
    values = values_N.detach().double()
    weights = torch.ones_like(values) if weights_N is None else weights_N.to(values)
    values = torch.where(weights > 0, values, torch.zeros_like(values))
    return torch.stack([weights.sum(), (weights * values).sum(), (weights * values.square()).sum()])


def whiten(values_N: Tensor, *, sums: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales values to variance 1 and, by default, shifts them to mean 0.

    Paper: Ziegler et al., 2019, arXiv:1909.08593: (x - mean) / sqrt(var + 1e-8), with the sample variance.

    Args:
        values_N: (N,), any part of the batch.
        sums: ``moment_sums`` of all parts of the global batch, added up, (3,).
        shift_mean: subtract the mean; rewards usually keep theirs.

    Returns:
        Values (N,) without gradient.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0])
        >>> whiten(values, sums=moment_sums(values))
        tensor([-1.,  0.,  1.])
    """
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    values = values_N.detach().double()
    centred = (values - mean) * (variance + 1e-8).rsqrt()
    return (centred if shift_mean else centred + mean).to(values_N.dtype)
