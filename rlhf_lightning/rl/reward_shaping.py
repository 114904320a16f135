"""Shaping of completion scores before advantages: penalties, the KL penalty in the reward, and its controller.

Shapes: S sequences, N sampled tokens of all sequences, flat; tokens of different sequences may be interleaved, those of
one sequence are in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def missing_eos_penalty(scores_S: Tensor, *, has_eos_S: Tensor, penalty: float) -> Tensor:
    """Subtracts a fixed penalty from the score of every completion that did not end before the length limit.

    Args:
        scores_S: (S,).
        has_eos_S: whether the completion ended before the limit, (S,).
        penalty: at least 0.

    Returns:
        Scores (S,).

    Raises:
        ValueError: for a penalty below 0.

    Example:
        >>> missing_eos_penalty(torch.tensor([1.0, 1.0]), has_eos_S=torch.tensor([True, False]), penalty=0.5)
        tensor([1.0000, 0.5000])
    """
    if not penalty >= 0:
        raise ValueError(f"missing_eos_penalty={penalty} is below 0: it is subtracted, use 1.0 to take 1 away")
    return torch.where(has_eos_S.bool(), scores_S, scores_S - penalty)


def kl_penalised_scores(scores_S: Tensor, *, kl_N: Tensor, coef: float, sequence_index_N: Tensor) -> Tensor:
    """Subtracts the divergence of a whole completion from its score: score - coef * sum_t kl_t.

    Paper: Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019, arXiv:1909.08593), section 2.

    Args:
        scores_S: (S,).
        kl_N: divergence from the reference at each token, (N,).
        coef: weight of the divergence, at least 0.
        sequence_index_N: sequence of each token, (N,).

    Returns:
        Scores (S,) without gradient.

    Example:
        >>> kl_penalised_scores(
        ...     torch.tensor([1.0]), kl_N=torch.tensor([0.5, 1.5]), coef=0.1, sequence_index_N=torch.tensor([0, 0])
        ... )
        tensor([0.8000])
    """
    return scores_S.index_add(0, sequence_index_N, kl_N.detach().to(scores_S), alpha=-coef)


def _last_tokens(sequence_index_N: Tensor, num_sequences: int) -> Tensor:
    """Returns the flat index of each sequence's last token, -1 for an empty sequence."""
    start_S = torch.full((num_sequences,), -1, dtype=torch.long, device=sequence_index_N.device)
    position_N = torch.arange(len(sequence_index_N), device=sequence_index_N.device)
    return start_S.scatter_reduce(0, sequence_index_N, position_N, "amax")


def token_rewards(
    scores_S: Tensor, *, sequence_index_N: Tensor, kl_N: Tensor | None = None, kl_coef: float = 0.0
) -> Tensor:
    """Computes token rewards: the completion's score on its last token, minus the divergence of each token.

    Paper: Ziegler et al., 2019, arXiv:1909.08593; Learning to Summarize (Stiennon et al., 2020, arXiv:2009.01325):
    r_t = -kl_coef * kl_t, plus the score at the last sampled token, padding or not.

    Args:
        scores_S: (S,).
        sequence_index_N: sequence of each token, those of a sequence in their order, (N,).
        kl_N: divergence from the reference at each token, (N,); ``None`` for none.
        kl_coef: weight of the divergence, at least 0.

    Returns:
        Rewards (N,) without gradient.

    Raises:
        ValueError: the score of a non-empty sequence is NaN.

    Example:
        >>> scores, sequences = torch.tensor([2.0, 3.0]), torch.tensor([0, 0, 1])
        >>> token_rewards(scores, sequence_index_N=sequences, kl_N=torch.ones(3), kl_coef=0.1)
        tensor([-0.1000,  1.9000,  2.9000])
    """
    last_S = _last_tokens(sequence_index_N, len(scores_S))
    present_S = last_S >= 0
    if bool((scores_S.isnan() & present_S).any()):
        row = int((scores_S.isnan() & present_S).nonzero()[0])
        raise ValueError(f"the score of sequence {row} is nan: leave samples that cannot be scored out before this")
    rewards_N = scores_S.new_zeros(len(sequence_index_N))
    if kl_N is not None:
        rewards_N -= kl_coef * kl_N.detach().to(scores_S)
    return rewards_N.index_add(0, last_S[present_S], scores_S.detach()[present_S])


class KLController:
    """The weight of the KL penalty: fixed, or adapted so that the divergence stays near a target.

    Paper: Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019, arXiv:1909.08593), section 2.2:
    coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon).

    Args:
        coef: initial weight, at least 0.
        target: target divergence per completion, above 0; ``None`` keeps the weight fixed.
        horizon: number of samples over which a deviation by the clipping bound of 20 % changes the weight by as much.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> controller = KLController(0.1, target=6.0, horizon=1000)
        >>> round(controller.update(12.0, num_samples=100), 6)
        0.102
    """

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        if not 0 <= coef < math.inf:
            raise ValueError(f"kl_coef={coef} is not a finite number of at least 0: 0.05 is usual")
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"kl_target={target} is not a finite number above 0: 6.0 is usual, null keeps the weight")
        if horizon < 1:
            raise ValueError(f"kl_horizon={horizon} is not 1 or more: 10000 is usual")
        self.coef = float(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, *, num_samples: int) -> float:
        """Adapts the weight to a measured divergence.

        Args:
            kl: mean divergence per completion over the global batch.
            num_samples: number of completions of the global batch.

        Returns:
            The new weight.

        Raises:
            ValueError: the divergence is not finite.
        """
        if self.target is None:
            return self.coef
        if not math.isfinite(kl):
            raise ValueError(f"the measured KL divergence is {kl}: the policy has diverged, lower the learning rate")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_samples / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """Returns the weight."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores the weight."""
        self.coef = float(state["coef"])
