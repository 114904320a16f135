"""Masks and weights of sampled tokens for a policy-gradient loss when they are not exactly on policy.

Shapes: N sampled tokens of all sequences, flat and in any order; S sequences. All tokens of a sequence must be in the
same call.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from ..utils.validation import check_choice, check_positive, check_same_shape
from ._stable import bounded_exp
from .policy_gradient import sequence_mean, sequence_sum

EngineCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# Entropies that differ by less than this many roundings of their dtype are equal.
_ROUNDINGS: Final = 64

ENGINE_CORRECTIONS: Final[tuple[EngineCorrection, ...]] = get_args(EngineCorrection)


def engine_correction_weights(
    trainer_logprobs_N: Tensor,
    *,
    engine_logprobs_N: Tensor,
    sequence_index_N: Tensor,
    num_sequences: int,
    mode: EngineCorrection = "sequence_mask",
    minimum: float | None = None,
    maximum: float | None = 3.0,
) -> Tensor:
    """Computes weights that correct for sampling from an engine whose probabilities differ from the trainer's.

    Papers: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al., 2025) for ``truncate``:
    clip(w, minimum, maximum); IcePop (Ling Team, 2025) for ``mask``: w where it lies within the bounds, else 0. w is
    p_trainer / p_engine of the token, or their product over the sequence. The weight is a constant that multiplies the
    loss of a token. A token whose engine log-probability is NaN has the ratio 1.

    Args:
        trainer_logprobs_N: log-probabilities by the trainer, with the same weights as the engine's, (N,).
        engine_logprobs_N: log-probabilities that the engine reported, (N,).
        sequence_index_N: sequence of each token, (N,).
        num_sequences: S.
        mode: one of ``ENGINE_CORRECTIONS``.
        minimum: lower bound of w, at least 0; ``None`` for none.
        maximum: upper bound of w, above the lower one; ``None`` for none.

    Returns:
        Weights (N,) without gradient.

    Raises:
        ValueError: for a mode or bounds that are not allowed.

    Example:
        >>> engine_correction_weights(
        ...     torch.tensor([0.8, 0.1]).log(), engine_logprobs_N=torch.tensor([0.2, 0.1]).log(),
        ...     sequence_index_N=torch.tensor([0, 1]), num_sequences=2, mode="token_truncate",
        ... )
        tensor([3., 1.])
    """
    check_choice("engine correction", mode, ENGINE_CORRECTIONS)
    check_same_shape(
        "N",
        trainer_logprobs_N=trainer_logprobs_N,
        engine_logprobs_N=engine_logprobs_N,
        sequence_index_N=sequence_index_N,
    )
    low = 0.0 if minimum is None else minimum
    high = math.inf if maximum is None else maximum
    if not 0 <= low < high:
        raise ValueError(f"minimum={minimum} and maximum={maximum} bound no weight: use 0 <= minimum < maximum")

    # A constant: the correction reweights the gradient and must not have one.
    level, action = mode.split("_")
    log_ratio_N = (trainer_logprobs_N - engine_logprobs_N).detach().nan_to_num(nan=0.0)
    if level == "sequence":
        totals_S = sequence_sum(log_ratio_N, sequence_index_N=sequence_index_N, num_sequences=num_sequences)
        log_ratio_N = totals_S[sequence_index_N]
    weights_N = bounded_exp(log_ratio_N)
    if action == "truncate":
        return weights_N.clamp(low, high)
    return torch.where((weights_N >= low) & (weights_N <= high), weights_N, torch.zeros_like(weights_N))


def off_policy_mask(
    logprobs_N: Tensor,
    *,
    sampling_logprobs_N: Tensor,
    advantages_N: Tensor,
    sequence_index_N: Tensor,
    num_sequences: int,
    threshold: float,
) -> Tensor:
    """Masks tokens with a negative advantage in sequences from which the policy has moved away.

    Paper: DeepSeek-V3.2 (2025, arXiv:2512.02556), eq. 9: drop where A < 0 and mean_t log(p_sampled / p) > threshold.
    A token whose sampling log-probability is NaN counts as unmoved.

    Args:
        logprobs_N: the policy's log-probability of each sampled token, (N,).
        sampling_logprobs_N: log-probabilities under which the tokens were drawn, the engine's if reported, (N,).
        advantages_N: (N,).
        sequence_index_N: sequence of each token, (N,).
        num_sequences: S.
        threshold: above 0; 0.5 is usual.

    Returns:
        Mask (N,), true where a token is kept.

    Raises:
        ValueError: for a threshold of 0 or below.

    Example:
        >>> off_policy_mask(
        ...     torch.tensor([-3.0, -3.0]), sampling_logprobs_N=torch.tensor([-1.0, -1.0]),
        ...     advantages_N=torch.tensor([1.0, -1.0]), sequence_index_N=torch.tensor([0, 1]), num_sequences=2,
        ...     threshold=0.5,
        ... )
        tensor([ True, False])
    """
    check_positive("threshold", threshold, "0.5 is usual")
    check_same_shape(
        "N",
        logprobs_N=logprobs_N,
        sampling_logprobs_N=sampling_logprobs_N,
        advantages_N=advantages_N,
        sequence_index_N=sequence_index_N,
    )
    moved_N = (sampling_logprobs_N - logprobs_N).detach().nan_to_num(nan=0.0)
    moved_S = sequence_mean(moved_N, sequence_index_N=sequence_index_N, num_sequences=num_sequences)
    return (advantages_N >= 0) | (moved_S <= threshold)[sequence_index_N]


def top_entropy_threshold(entropies_N: Tensor, *, top_fraction: float) -> Tensor:
    """Computes the entropy that a token must reach to be among the given share of the most uncertain ones.

    Paper: Beyond the 80/20 Rule (Wang et al., 2025, arXiv:2506.01939): only the top 20 % of the tokens by entropy carry
    the policy gradient. The threshold is the (1 - top_fraction) quantile, with linear interpolation.

    Args:
        entropies_N: entropies of all tokens of the global batch, gathered over ranks, in any order, (N,).
        top_fraction: share of tokens to keep, in (0, 1].

    Returns:
        A scalar; minus infinity without tokens.

    Raises:
        ValueError: for a share outside (0, 1].

    Example:
        >>> top_entropy_threshold(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), top_fraction=0.25)
        tensor(0.4000)
    """
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction={top_fraction} is outside (0, 1]: 0.2 is usual, 1.0 keeps all tokens")
    if entropies_N.numel() == 0:
        return entropies_N.new_full((), -math.inf)
    # torch.quantile refuses more than 16 million values.
    ordered_N = entropies_N.detach().sort().values
    position = (1 - top_fraction) * (len(ordered_N) - 1)
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered_N) - 1)
    return torch.lerp(ordered_N[lower], ordered_N[upper], position - lower)


def top_entropy_mask(entropies_N: Tensor, *, threshold: Tensor) -> Tensor:
    """Marks the tokens whose entropy reaches the threshold of the global batch, up to the rounding of a forward pass.

    Equal completions have equal entropies only up to rounding: they are kept or dropped together.

    Args:
        entropies_N: (N,), of any part of the batch.
        threshold: from ``top_entropy_threshold``, a scalar.

    Returns:
        Mask (N,), true where a token is kept.

    Example:
        >>> top_entropy_mask(torch.tensor([0.1, 0.5]), threshold=torch.tensor(0.4))
        tensor([False,  True])
    """
    rounding = _ROUNDINGS * torch.finfo(entropies_N.dtype).eps * threshold.abs().nan_to_num(posinf=0.0)
    return entropies_N.detach() >= threshold - rounding


def entropy_bonus_loss(entropies_N: Tensor, *, coef: float, mask_N: Tensor | None = None) -> Tensor:
    """Computes the negative entropy bonus, one value per token.

    Paper: Asynchronous Methods for Deep Reinforcement Learning (Mnih et al., 2016, arXiv:1602.01783): -coef H. Divide
    by the number of tokens of the global batch that the mask keeps, for every loss type, so that a coefficient has the
    same meaning for all of them.

    Args:
        entropies_N: entropy of the policy at each token, with its gradient, (N,).
        coef: weight of the bonus; below 0 it is a penalty.
        mask_N: tokens that the bonus acts on, (N,); ``None`` for all.

    Returns:
        Losses (N,), 0 outside the mask.

    Example:
        >>> entropy_bonus_loss(torch.tensor([1.0, 2.0]), coef=0.1)
        tensor([-0.1000, -0.2000])
    """
    loss_N = -coef * entropies_N
    return loss_N if mask_N is None else torch.where(mask_N, loss_N, torch.zeros_like(loss_N))
