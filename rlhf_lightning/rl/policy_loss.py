"""The loss of GRPO in parts, each an option group: policy gradient, KL penalty, off-policy correction, entropy bonus.

``EntropyBonus`` is PPO's as well; the other parts of its loss are in ``ppo_loss``.

Shapes: N sampled tokens of all sequences, flat; S sequences. ``sequence_index_N`` is the sequence of each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from ..losses.kl import KLEstimator, kl_per_token
from ..losses.off_policy import (
    EngineCorrection,
    engine_correction_weights,
    entropy_bonus_loss,
    off_policy_mask,
    top_entropy_mask,
    top_entropy_threshold,
)
from ..losses.policy_gradient import (
    ImportanceLevel,
    PolicyLossType,
    aggregation_weights,
    default_importance_level,
    importance_ratio,
)
from ..utils.option_groups import OptionGroup
from ..utils.validation import check_count, check_positive
from .clipped_loss import ClippedLoss

ReplayPriority = Literal["uniform", "hard_negative", "frontier"]

_PER_TOKEN: Final = ("dapo", "bnpo", "cispo")  # divided by tokens; the other loss types by completions


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ClippedLoss):
    """The policy-gradient loss of GRPO: the form of the token losses, their clipping and their aggregation.

    ``losses.policy_gradient`` documents formula, paper and departures of every ``loss_type`` and option.

    Args:
        loss_type: form of the token losses and of their aggregation; a loss of one's own takes the aggregation and the
            clipping metrics of this type.
        epsilon: lower clipping range, in (0, 1).
        epsilon_high: upper clipping range, above 0; by default ``epsilon``. For ``cispo`` the bound of the ratio
            itself, at least 1, by default 5.
        delta: bound of the ratio where the advantage is negative (two-sided clipping), above 1 + ``epsilon_high``.
        dual_clip: bound of the loss where the advantage is negative, above 1.
        importance_sampling_level: ``token``, ``sequence`` or ``sequence_token``; by default the loss type's own.
        sapo_temperature_pos: of ``sapo``, for positive advantages, above 0.
        sapo_temperature_neg: of ``sapo``, for negative advantages, above 0.
        mask_truncated_completions: exclude completions truncated by the length limit from the loss.

    Raises:
        ValueError: an option out of range, or without effect on the loss type.

    Example:
        >>> PolicyLoss(loss_type="gspo", epsilon=3e-4, epsilon_high=4e-4).level
        'sequence'
    """

    loss_type: PolicyLossType = "dapo"
    delta: float | None = None
    importance_sampling_level: ImportanceLevel | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    mask_truncated_completions: bool = False

    @property
    def level(self) -> ImportanceLevel:
        """The level of importance ratios: the given one, else the loss type's default."""
        return self.importance_sampling_level or default_importance_level(self.loss_type)

    @property
    def normalizer(self) -> Literal["tokens", "completions"]:
        """The total that the sum of the weighted losses is divided by."""
        return "tokens" if self.loss_type in _PER_TOKEN else "completions"

    def relative_weights(self, lengths_S: Tensor, *, max_completion_length: int, dtype: torch.dtype) -> Tensor:
        """Computes the weights of tokens, by sequence, for a sum that is then divided by the ``normalizer``: ``(S,)``.

        Args:
            lengths_S: tokens in the loss.
            max_completion_length: the constant of ``dr_grpo``.
            dtype: of the weights.
        """
        # Any one number as both totals: multiplied by it, what is left is to divide by the normalizer.
        total = len(lengths_S)
        return total * aggregation_weights(
            self.loss_type,
            lengths_S,
            total_sequences=total,
            total_tokens=total,
            max_completion_length=max_completion_length,
            dtype=dtype,
        )

    def function_options(self) -> dict[str, Any]:
        """Returns all options of ``losses.policy_gradient.policy_gradient_loss``."""
        return super().function_options() | {
            "loss_type": self.loss_type,
            "delta": self.delta,
            "importance_sampling_level": self.importance_sampling_level,
            "sapo_temperature_pos": self.sapo_temperature_pos,
            "sapo_temperature_neg": self.sapo_temperature_neg,
        }

    def clip_options(self) -> dict[str, Any]:
        """Returns the options of ``losses.policy_gradient.clip_statistics``."""
        return super().clip_options() | {"loss_type": self.loss_type}


@dataclass(frozen=True, kw_only=True)
class KLPenalty(OptionGroup):
    """How the divergence of the policy from the reference is estimated, and where it is applied with weight ``beta``.

    ``losses.kl.kl_per_token`` documents the estimators.

    Args:
        estimator: ``k1``, ``k2`` or ``k3``.
        in_reward: subtract the divergence of a completion from its reward instead of adding it to the loss.
        bias_correction: weight the estimate in the loss by the importance ratio, so that its gradient is unbiased
            (DeepSeek-V3.2, 2025, arXiv:2512.02556, eq. 7).

    Example:
        >>> KLPenalty(estimator="k1").per_token(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])
    """

    group: ClassVar[str] = "kl"

    estimator: KLEstimator = "k3"
    in_reward: bool = False
    bias_correction: bool = True

    def check(self, beta: float) -> None:
        """Checks the options against the weight of the divergence.

        Raises:
            ValueError: an option without effect, or an estimate whose gradient is 0 on average.
        """
        if beta and self.estimator == "k1" and not (self.in_reward or self.bias_correction):
            raise ValueError(
                "kl.estimator is 'k1', whose gradient in the loss is 0 on average: use 'k3', or "
                "kl.bias_correction=true, or kl.in_reward=true"
            )
        if self.in_reward and not beta:
            raise ValueError("kl.in_reward is true but beta is 0: give the divergence a weight, such as beta=0.04")

    def per_token(self, logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
        """Estimates the divergence at every token, ``(N,)``."""
        return kl_per_token(logprobs_N, ref_logprobs_N=ref_logprobs_N, estimator=self.estimator)

    def loss(self, kl_N: Tensor, logprobs_N: Tensor, *, old_logprobs_N: Tensor | None, **sequences: Any) -> Tensor:
        """Weights estimates by the importance ratio where the bias correction is on, ``(N,)``.

        The ratio is per token, whatever level the policy loss uses: only the token's own ratio makes the gradient of
        its estimate unbiased. A mean over the sequence would give it 1/L of its own gradient, and shares of the others.
        """
        if not self.bias_correction:
            return kl_N
        return kl_N * importance_ratio(logprobs_N, old_logprobs_N=old_logprobs_N, level="token", **sequences)


@dataclass(frozen=True, kw_only=True)
class ImportanceWeights(OptionGroup):
    """Weights the losses of tokens by the ratio of the policy to the distribution that samples were drawn from.

    Filters, another precision or older weights make the two differ. The weights are constants: those of the policy
    before its first update.

    Papers: Yao et al., 2025, and IcePop (Ling Team, 2025). ``losses.off_policy`` documents them.

    Args:
        correction: bound (``truncate``) or drop (``mask``) the importance weights of a token or a sequence:
            ``token_truncate``, ``token_mask``, ``sequence_truncate`` or ``sequence_mask``; ``None`` is off.
        min: lower bound of the weights, at least 0; ``None`` for none.
        max: upper bound of the weights, above ``min``; ``None`` for none.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> index = torch.tensor([0, 1])
        >>> ImportanceWeights(correction="token_mask", max=2.0).weights(
        ...     torch.tensor([0.8, 0.1]).log(), torch.tensor([0.2, 0.1]).log(), sequence_index_N=index, num_sequences=2
        ... )
        tensor([0., 1.])
    """

    group: ClassVar[str] = "off_policy"

    correction: EngineCorrection | None = None
    min: float | None = None
    max: float | None = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= (self.min or 0.0) < (float("inf") if self.max is None else self.max):
            raise ValueError(
                f"off_policy.min={self.min} and off_policy.max={self.max} bound no weight: use 0 <= min < max"
            )

    def weights(self, old_logprobs_N: Tensor, sampling_logprobs_N: Tensor, **sequences: Any) -> Tensor:
        """Computes constant weights of the token losses, ``(N,)``; needs a ``correction``."""
        assert self.correction is not None
        return engine_correction_weights(
            old_logprobs_N,
            engine_logprobs_N=sampling_logprobs_N,
            mode=self.correction,
            minimum=self.min,
            maximum=self.max,
            **sequences,
        )


@dataclass(frozen=True, kw_only=True)
class OffPolicyCorrection(ImportanceWeights):
    """Corrects for a sampling distribution that is not the trained one: filters, other precision, older weights.

    With a replay buffer completions of earlier iterations come back, with the log-probs that they were drawn with and
    the advantages that they had: in each iteration as many as ``replay_share`` of the new ones, if there are so
    many. They count as new ones do, and need a ``correction``.

    Paper: DeepSeek-V3.2 (2025, arXiv:2512.02556), eq. 9, for the mask; see ``ImportanceWeights`` for the weights.

    Args:
        correction: bound (``truncate``) or drop (``mask``) the importance weights of a token or a sequence:
            ``token_truncate``, ``token_mask``, ``sequence_truncate`` or ``sequence_mask``; ``None`` is off.
        min: lower bound of the weights, at least 0; ``None`` for none.
        max: upper bound of the weights, above ``min``; ``None`` for none.
        mask_threshold: drop completions with a negative advantage from which the policy has moved by more than this,
            above 0; ``None`` keeps them.
        replay_capacity: completions in the buffer, at least 1, those of the highest priority being kept longest;
            0 is off.
        replay_share: replayed completions for each new one, above 0.
        replay_priority: ``uniform``; ``hard_negative``: bad ones that were likely; ``frontier``: those of prompts at
            which the policy succeeds now and then (``rl.replay_buffer.replay_priority``). They are drawn in proportion.
        replay_max_age: iterations after which a completion leaves, at least 1; ``None`` for no limit.

    Raises:
        ValueError: an option out of range, or replay without a correction.

    Example:
        >>> one, index = torch.ones(1), torch.tensor([0])
        >>> OffPolicyCorrection(mask_threshold=0.5).keeps(
        ...     -2 * one, sampling_logprobs_N=-one, advantages_N=-one, sequence_index_N=index, num_sequences=1
        ... )
        tensor([False])
    """

    mask_threshold: float | None = None
    replay_capacity: int = 0
    replay_share: float = 0.25
    replay_priority: ReplayPriority = "uniform"
    replay_max_age: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_threshold is not None:
            check_positive("off_policy.mask_threshold", self.mask_threshold, "0.5 is usual")
        if self.replay_capacity:
            check_count("off_policy.replay_capacity", self.replay_capacity, "0 is off")
            if self.correction is None:
                raise ValueError(
                    f"off_policy.replay_capacity is {self.replay_capacity} without off_policy.correction, so that old "
                    "completions would count as if they were drawn today: use correction=token_truncate"
                )
        check_positive("off_policy.replay_share", self.replay_share, "0.25 is usual")
        if self.replay_max_age is not None:
            check_count("off_policy.replay_max_age", self.replay_max_age, "null is no limit")

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether log-probabilities under the sampling distribution are used."""
        return self.correction is not None or self.mask_threshold is not None

    def keeps(
        self, logprobs_N: Tensor, *, sampling_logprobs_N: Tensor, advantages_N: Tensor, **sequences: Any
    ) -> Tensor:
        """Marks the tokens of completions that the policy has not moved away from, ``(N,)``; needs the threshold."""
        assert self.mask_threshold is not None
        return off_policy_mask(
            logprobs_N,
            sampling_logprobs_N=sampling_logprobs_N,
            advantages_N=advantages_N,
            threshold=self.mask_threshold,
            **sequences,
        )


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(OptionGroup):
    """An entropy bonus in the loss: -coef H (Mnih et al., 2016, arXiv:1602.01783), a mean over tokens.

    Args:
        coef: weight of the bonus; below 0 a penalty.

    Example:
        >>> EntropyBonus(coef=0.1).loss(torch.tensor([1.0, 2.0]))
        tensor([-0.1000, -0.2000])
    """

    group: ClassVar[str] = "entropy"

    coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.coef) < float("inf"):
            raise ValueError(f"entropy.coef is {self.coef!r}; it must be finite (0 is off, 0.001 is usual)")

    def loss(self, entropies_N: Tensor) -> Tensor:
        """Computes the negative bonus of every token, ``(N,)``."""
        return entropy_bonus_loss(entropies_N, coef=self.coef)


@dataclass(frozen=True, kw_only=True)
class TokenEntropy(EntropyBonus):
    """An entropy bonus, and the choice of tokens by their entropy (Wang et al., 2025, arXiv:2506.01939).

    Args:
        coef: weight of the bonus; below 0 a penalty.
        top_quantile: share of tokens, the most uncertain ones, that carry the policy gradient, in (0, 1].

    Raises:
        ValueError: an option out of range.

    Example:
        >>> entropies = torch.tensor([0.1, 0.2, 0.3, 0.4])
        >>> TokenEntropy(top_quantile=0.5).is_uncertain(entropies, all_entropies_N=entropies)
        tensor([False, False,  True,  True])
    """

    top_quantile: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_quantile <= 1:
            raise ValueError(
                f"entropy.top_quantile={self.top_quantile} is outside (0, 1]: 0.2 is usual, 1.0 keeps all tokens"
            )

    def is_uncertain(self, entropies_N: Tensor, *, all_entropies_N: Tensor) -> Tensor:
        """Marks the tokens that are among the most uncertain ones of the global batch, ``(N,)``."""
        threshold = top_entropy_threshold(all_entropies_N, top_fraction=self.top_quantile)
        return top_entropy_mask(entropies_N, threshold=threshold)
