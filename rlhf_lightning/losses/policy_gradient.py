"""The clipped policy-gradient losses of GRPO and PPO, one value per sampled token, and their aggregation weights.

Shapes: N sampled tokens of all sequences, flat and in any order; S sequences. ``sequence_index_N`` is the sequence of
each token. A sequence may have no tokens; all tokens of a sequence must be in the same call wherever a ratio or a mask
is per sequence.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..utils.validation import check_choice, check_positive, check_same_shape
from ._stable import bounded_exp

PolicyLossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "gspo", "luspo"]
ImportanceLevel = Literal["token", "sequence", "sequence_token"]

LOSS_TYPES: Final[tuple[PolicyLossType, ...]] = get_args(PolicyLossType)
IMPORTANCE_LEVELS: Final[tuple[ImportanceLevel, ...]] = get_args(ImportanceLevel)
# ScaleRL's recommendation (arXiv:2510.13786), a bound of the ratio itself and not of its distance from 1.
_CISPO_MAX_RATIO: Final = 5.0


class ClipStatistics(NamedTuple):
    """Counts per sequence, (S,): units clipped below and above, and all units; to be summed."""

    low_S: Tensor
    high_S: Tensor
    count_S: Tensor


def sequence_sum(values_N: Tensor, *, sequence_index_N: Tensor, num_sequences: int) -> Tensor:
    """Sums a per-token quantity within each sequence.

    Args:
        values_N: (N,).
        sequence_index_N: sequence of each token, 0 to ``num_sequences - 1``, (N,).
        num_sequences: S.

    Returns:
        Sums (S,), 0 for a sequence without tokens.

    Example:
        >>> sequence_sum(torch.tensor([1.0, 2.0, 3.0]), sequence_index_N=torch.tensor([0, 0, 2]), num_sequences=3)
        tensor([3., 0., 3.])
    """
    return values_N.new_zeros(num_sequences).index_add(0, sequence_index_N, values_N)


def sequence_mean(values_N: Tensor, *, sequence_index_N: Tensor, num_sequences: int) -> Tensor:
    """Averages a per-token quantity within each sequence.

    Args:
        values_N: (N,).
        sequence_index_N: sequence of each token, 0 to ``num_sequences - 1``, (N,).
        num_sequences: S.

    Returns:
        Means (S,), 0 for a sequence without tokens.

    Example:
        >>> sequence_mean(torch.tensor([1.0, 2.0, 3.0]), sequence_index_N=torch.tensor([0, 0, 2]), num_sequences=3)
        tensor([1.5000, 0.0000, 3.0000])
    """
    totals_S = sequence_sum(values_N, sequence_index_N=sequence_index_N, num_sequences=num_sequences)
    # Not bincount, which synchronises with the device.
    lengths_S = sequence_sum(
        torch.ones_like(values_N), sequence_index_N=sequence_index_N, num_sequences=num_sequences
    ).clamp(min=1)
    return totals_S / lengths_S


def default_importance_level(loss_type: PolicyLossType) -> ImportanceLevel:
    """Returns the level of the importance ratio that the loss's paper uses.

    Args:
        loss_type: one of ``LOSS_TYPES``.

    Returns:
        ``sequence`` for gspo and luspo, ``token`` for the rest.

    Example:
        >>> default_importance_level("gspo")
        'sequence'
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    return "sequence" if loss_type in ("gspo", "luspo") else "token"


def importance_ratio(
    logprobs_N: Tensor,
    *,
    old_logprobs_N: Tensor | None,
    sequence_index_N: Tensor,
    num_sequences: int,
    level: ImportanceLevel = "token",
) -> Tensor:
    """Computes the ratio of the policy to the one that sampled, with its gradient, one value per token.

    Papers: PPO (Schulman et al., 2017, arXiv:1707.06347) for ``token``: p_t / p_old_t. GSPO (Zheng et al., 2025,
    arXiv:2507.18071), eq. 7, for ``sequence``: s = exp(mean_t log(p_t / p_old_t)), the same for all tokens of a
    sequence; eq. 14 for ``sequence_token``: sg[s] p_t / sg[p_t], the value of s with the gradient of each token, for
    advantages that differ within a sequence. Departure: above e^30 the ratio grows linearly, so that it is finite.

    Args:
        logprobs_N: the policy's log-probability of each sampled token, (N,).
        old_logprobs_N: those of the policy before the update, (N,); ``None`` where it has not moved yet.
        sequence_index_N: sequence of each token, (N,).
        num_sequences: S.
        level: one of ``IMPORTANCE_LEVELS``.

    Returns:
        Ratios (N,).

    Raises:
        ValueError: for a level that does not exist.

    Example:
        >>> logprobs = torch.tensor([0.4, 0.9]).log()
        >>> zeros = torch.zeros(2, dtype=torch.long)
        >>> importance_ratio(
        ...     logprobs, old_logprobs_N=torch.tensor([0.1, 0.9]).log(), sequence_index_N=zeros, num_sequences=1,
        ...     level="sequence",
        ... )
        tensor([2., 2.])
    """
    check_choice("importance_sampling_level", level, IMPORTANCE_LEVELS)
    check_same_shape("N", logprobs_N=logprobs_N, old_logprobs_N=old_logprobs_N, sequence_index_N=sequence_index_N)
    log_ratio_N = logprobs_N - (logprobs_N if old_logprobs_N is None else old_logprobs_N).detach()
    if level == "token":
        return bounded_exp(log_ratio_N)
    mean_S = sequence_mean(log_ratio_N, sequence_index_N=sequence_index_N, num_sequences=num_sequences)
    if level == "sequence":
        return bounded_exp(mean_S)[sequence_index_N]
    return bounded_exp(mean_S.detach()[sequence_index_N] + logprobs_N - logprobs_N.detach())


def _clip_bounds(loss_type: PolicyLossType, epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """Returns the lowest and highest ratio that still has a gradient in the direction of the advantage."""
    if loss_type == "sapo":
        return 0.0, math.inf
    if loss_type == "cispo":
        maximum = _CISPO_MAX_RATIO if epsilon_high is None else epsilon_high
        if maximum < 1:
            raise ValueError(f"epsilon_high={maximum} is below 1: for cispo it bounds the ratio itself, 5.0 is usual")
        return 0.0, maximum
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} is outside (0, 1): the ratio is clipped at 1 - epsilon, 0.2 is usual")
    high = epsilon if epsilon_high is None else epsilon_high
    check_positive("epsilon_high", high, "0.28 is usual")
    return 1 - epsilon, 1 + high


def _clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, bounds: tuple[float, float], delta: float | None, dual_clip: float | None
) -> Tensor:
    low, high = bounds
    if delta is not None and not delta > high:
        raise ValueError(f"delta={delta} is not above 1 + epsilon_high = {high:g}: it caps ratios beyond the clipping")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} is not above 1: it bounds ratios where A < 0, 3.0 is usual")
    capped_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    surrogate_N = torch.minimum(capped_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    if dual_clip is not None:
        floored_N = torch.maximum(surrogate_N, dual_clip * advantages_N)
        surrogate_N = torch.where(advantages_N < 0, floored_N, surrogate_N)
    return surrogate_N


def policy_gradient_loss(
    logprobs_N: Tensor,
    *,
    old_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    sequence_index_N: Tensor,
    num_sequences: int,
    loss_type: PolicyLossType = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    importance_sampling_level: ImportanceLevel | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tensor:
    """Computes a policy-gradient loss, one value per token, to be summed with ``aggregation_weights``.

    With r the importance ratio and A the advantage:

    - ``grpo`` (arXiv:2402.03300), ``dr_grpo`` (arXiv:2503.20783), ``dapo`` (arXiv:2503.14476), ``bnpo``: the clipped
      surrogate of PPO (arXiv:1707.06347), -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A). They differ in their
      aggregation weights. PPO itself is ``dapo`` with an advantage per token.
    - ``gspo`` (arXiv:2507.18071), ``luspo`` (arXiv:2602.05261): the same with r of the sequence. The paper of gspo uses
      epsilon 3e-4 and epsilon_high 4e-4, as the mean over tokens keeps r close to 1.
    - ``cispo`` (arXiv:2506.13585): -sg[min(r, epsilon_high)] A log p: a weight is bounded and no token is dropped.
    - ``sapo`` (arXiv:2511.20347): -(4 / tau) sigmoid(tau (r - 1)) A with tau by the sign of A: a soft gate.

    ``delta`` (two-sided clipping, INTELLECT-2, arXiv:2505.07291) replaces the first r by min(r, delta); ``dual_clip``
    (Ye et al., 2020, arXiv:1912.09729) keeps the loss below -c A where A < 0. Where both are allowed they do the same.

    Departures: ratios above e^30 are continued linearly, so that no log-ratio gives an infinite loss; cispo has no
    lower bound, which its authors disabled too.

    Args:
        logprobs_N: the policy's log-probability of each sampled token, (N,).
        old_logprobs_N: those of the policy before the update, (N,); ``None`` where it has not moved yet.
        advantages_N: advantage of each token, (N,); of sequences: ``advantages_S[sequence_index_N]``.
        sequence_index_N: sequence of each token, (N,).
        num_sequences: S.
        loss_type: one of ``LOSS_TYPES``.
        epsilon: in (0, 1); not used by cispo and sapo.
        epsilon_high: above 0, ``None`` for the same as ``epsilon``; for cispo the bound of r itself, at least 1, by
            default 5.
        delta: above 1 + epsilon_high; only for the clipped surrogates.
        dual_clip: above 1; only for the clipped surrogates.
        importance_sampling_level: one of ``IMPORTANCE_LEVELS``; ``None`` is ``default_importance_level``.
        sapo_temperature_pos: tau for A > 0, above 0.
        sapo_temperature_neg: tau for A <= 0, above 0.

    Returns:
        Losses (N,).

    Raises:
        ValueError: for a name or number that is not allowed.

    Example:
        >>> new, old = torch.tensor([0.9, 0.5]).log(), torch.tensor([0.6, 0.5]).log()
        >>> policy_gradient_loss(
        ...     new, old_logprobs_N=old, advantages_N=torch.tensor([1.0, -1.0]), sequence_index_N=torch.tensor([0, 1]),
        ...     num_sequences=2, epsilon_high=0.28,
        ... )
        tensor([-1.2800,  1.0000])
    """
    level = default_importance_level(loss_type) if importance_sampling_level is None else importance_sampling_level
    if loss_type == "gspo" and level == "token":
        raise ValueError("importance_sampling_level='token' makes gspo what grpo is: use loss_type='grpo'")
    check_same_shape("N", logprobs_N=logprobs_N, advantages_N=advantages_N)
    bounds = _clip_bounds(loss_type, epsilon, epsilon_high)
    if loss_type in ("cispo", "sapo") and (delta is not None or dual_clip is not None):
        raise ValueError(f"loss_type={loss_type!r} has no clipped surrogate for delta or dual_clip to bound: use None")

    ratio_N = importance_ratio(
        logprobs_N,
        old_logprobs_N=old_logprobs_N,
        sequence_index_N=sequence_index_N,
        num_sequences=num_sequences,
        level=level,
    )

    # cispo weights log p by a constant ratio, so that no token loses its gradient.
    if loss_type == "cispo":
        return -ratio_N.detach().clamp(max=bounds[1]) * advantages_N * logprobs_N
    if loss_type == "sapo":
        check_positive("sapo_temperature_pos", sapo_temperature_pos, "1.0 is usual")
        check_positive("sapo_temperature_neg", sapo_temperature_neg, "1.05 is usual")
        positive_N = 4 / sapo_temperature_pos * torch.sigmoid(sapo_temperature_pos * (ratio_N - 1))
        negative_N = 4 / sapo_temperature_neg * torch.sigmoid(sapo_temperature_neg * (ratio_N - 1))
        return -torch.where(advantages_N > 0, positive_N, negative_N) * advantages_N
    return -_clipped_surrogate(ratio_N, advantages_N, bounds, delta, dual_clip)


def aggregation_weights(
    loss_type: PolicyLossType,
    lengths_S: Tensor,
    *,
    total_sequences: int,
    total_tokens: int,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Computes the weight of each sequence's tokens with which the global batch's loss is the weighted sum.

    ======================  ==========================================================  ==============================
    loss type               loss of the batch                                           weight of a token of sequence i
    ======================  ==========================================================  ==============================
    grpo, gspo, sapo        mean over sequences of the mean over their tokens           1 / (sequences * length_i)
    dapo, bnpo, cispo       mean over all tokens                                        1 / tokens
    dr_grpo                 sum over tokens by a constant length, mean over sequences   1 / (sequences * max length)
    luspo                   sum over tokens, mean over sequences                        1 / sequences
    ======================  ==========================================================  ==============================

    The totals are those of the global batch, over all micro-batches and ranks, so that a split cannot change the loss.
    Implementations of ``bnpo`` divide by the tokens of the local batch instead; here it is another name for ``dapo``.

    Args:
        loss_type: one of ``LOSS_TYPES``.
        lengths_S: tokens that count in each sequence, (S,); 0 where a sequence is excluded from the loss, but still
            counts as one of the sequences.
        total_sequences: sequences of the global batch.
        total_tokens: tokens of the global batch that count.
        max_completion_length: the constant of dr_grpo, above 0.
        dtype: of the weights.

    Returns:
        Weights (S,).

    Raises:
        ValueError: for a name or number that is not allowed.

    Example:
        >>> aggregation_weights("grpo", torch.tensor([1, 4]), total_sequences=2, total_tokens=5)
        tensor([0.5000, 0.1250])
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if total_sequences < len(lengths_S):
        raise ValueError(
            f"total_sequences={total_sequences} is less than the {len(lengths_S)} given: use the global batch's number"
        )
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(f"max_completion_length={max_completion_length} is not 1 or more: dr_grpo divides by it")

    counts_S = lengths_S.to(dtype)
    one_S = torch.ones_like(counts_S)
    if loss_type in ("grpo", "gspo", "sapo"):
        weights_S = one_S / (total_sequences * counts_S.clamp(min=1))
    elif loss_type in ("dapo", "bnpo", "cispo"):
        weights_S = one_S / max(total_tokens, 1)
    elif max_completion_length is not None and loss_type == "dr_grpo":
        weights_S = one_S / (total_sequences * max_completion_length)
    else:
        weights_S = one_S / total_sequences
    return torch.where(counts_S > 0, weights_S, torch.zeros_like(weights_S))


def clip_statistics(
    ratio_N: Tensor,
    *,
    advantages_N: Tensor,
    sequence_index_N: Tensor,
    num_sequences: int,
    loss_type: PolicyLossType = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    per_sequence: bool = False,
) -> ClipStatistics:
    """Counts clipped ratios: too low where A < 0, too high where A > 0.

    Args:
        ratio_N: from ``importance_ratio``, (N,).
        advantages_N: (N,).
        sequence_index_N: sequence of each token, (N,).
        num_sequences: S.
        loss_type: one of ``LOSS_TYPES``; sapo clips nothing, cispo clips above at either sign of A.
        epsilon: as for ``policy_gradient_loss``.
        epsilon_high: as for ``policy_gradient_loss``.
        per_sequence: count a sequence once instead of per token, for a ratio that all its tokens share.

    Returns:
        Sums per sequence, (S,) each: their totals over the global batch give the mean ratios, their quotients per
        sequence the smallest and the largest. ``count_S`` is 0 for a sequence without tokens.

    Example:
        >>> zeros = torch.zeros(2, dtype=torch.long)
        >>> clip_statistics(
        ...     torch.tensor([1.5, 0.9]), advantages_N=torch.ones(2), sequence_index_N=zeros, num_sequences=1
        ... )
        ClipStatistics(low_S=tensor([0.]), high_S=tensor([1.]), count_S=tensor([2.]))
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    low, high = _clip_bounds(loss_type, epsilon, epsilon_high)
    ratio_N = ratio_N.detach()
    low_N = (ratio_N < low) & (advantages_N < 0)
    high_N = (ratio_N > high) & (advantages_N != 0 if loss_type == "cispo" else advantages_N > 0)

    sums = [
        sequence_sum(flags_N.to(ratio_N.dtype), sequence_index_N=sequence_index_N, num_sequences=num_sequences)
        for flags_N in (low_N, high_N, torch.ones_like(low_N))
    ]
    if per_sequence:
        lengths_S = sums[2].clamp(min=1)
        sums = [total_S / lengths_S for total_S in sums]
    return ClipStatistics(*sums)
