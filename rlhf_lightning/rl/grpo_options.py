"""Options of GRPO, checked on construction, and the token losses that they define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from ..losses.kl import KL_ESTIMATORS, KLEstimator, kl_per_token
from ..losses.off_policy import (
    EngineCorrection,
    engine_correction_weights,
    entropy_bonus_loss,
    off_policy_mask,
    top_entropy_threshold,
)
from ..losses.policy_gradient import (
    ClipStatistics,
    ImportanceLevel,
    PolicyLossType,
    clip_statistics,
    default_importance_level,
    importance_ratio,
    policy_gradient_loss,
)
from ..utils.validation import check_choice, check_not_negative
from .advantages import BASELINES, SCALE_REWARDS, Baseline, ScaleRewards

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

_PER_TOKEN: Final = ("dapo", "bnpo", "cispo")  # divided by tokens; the other loss types by completions
_EMPTY: Final = torch.zeros(0)
_NO_INDEX: Final = torch.zeros(0, dtype=torch.long)


class TokenLosses(NamedTuple):
    """Losses per token, (N,) each, and clipping per sequence."""

    loss_N: Tensor
    entropy_loss_N: Tensor
    kl_N: Tensor | None
    clipped: ClipStatistics


@dataclass(frozen=True)
class GRPOOptions:
    """Options of GRPO's loss and advantages; ``GRPOModule`` documents each.

    Raises:
        ValueError: an option out of range, or two that exclude each other.
    """

    loss_type: PolicyLossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: ImportanceLevel | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_in_reward: bool = False
    use_bias_correction_kl: bool = True
    scale_rewards: ScaleRewards = "group"
    baseline: Baseline = "mean"
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    mask_truncated_completions: bool = False
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    importance_sampling_correction: EngineCorrection | None = None
    importance_sampling_min: float | None = None
    importance_sampling_max: float | None = 3.0
    off_policy_mask_threshold: float | None = None
    dynamic_sampling: int = 0

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("scale_rewards", self.scale_rewards, SCALE_REWARDS)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice(
            "multi_objective_aggregation",
            self.multi_objective_aggregation,
            ("sum_then_normalize", "normalize_then_sum"),
        )
        check_not_negative("beta", self.beta, "0 needs no reference; 0.04 is the paper's")
        if isinstance(self.dynamic_sampling, bool) or self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling is {self.dynamic_sampling}; it must be at least 0 (0 switches it off)")
        if self.beta and self.kl_estimator == "k1" and not (self.kl_in_reward or self.use_bias_correction_kl):
            raise ValueError(
                "kl_estimator is 'k1', whose gradient in the loss is 0 on average: use 'k3', or "
                "use_bias_correction_kl=true, or kl_in_reward=true"
            )
        if self.kl_in_reward and not self.beta:
            raise ValueError("kl_in_reward is true but beta is 0: give the divergence a weight, such as beta=0.04")
        gdpo = self.multi_objective_aggregation == "normalize_then_sum"
        if gdpo and (self.kl_in_reward or self.baseline != "mean" or self.scale_rewards != "group"):
            raise ValueError(
                "multi_objective_aggregation is 'normalize_then_sum', which normalises each reward by its group's mean "
                "and deviation: leave kl_in_reward, baseline and scale_rewards at their defaults"
            )

        # The losses check their own options: call them with no tokens.
        nothing = {"sequence_index_N": _NO_INDEX, "num_sequences": 0}
        self._policy_loss(_EMPTY, None, _EMPTY, **nothing)
        top_entropy_threshold(_EMPTY, top_fraction=self.top_entropy_quantile)
        self.correction(_EMPTY, _EMPTY, **nothing)
        self._stays(_EMPTY, _EMPTY, _EMPTY, **nothing)

    @property
    def level(self) -> ImportanceLevel:
        """The level of importance ratios: the given one, else the loss type's default."""
        return self.importance_sampling_level or default_importance_level(self.loss_type)

    @property
    def normalizer(self) -> Literal["tokens", "completions"]:
        """The total that the loss is divided by."""
        return "tokens" if self.loss_type in _PER_TOKEN else "completions"

    def correction(self, old_N: Tensor, engine_N: Tensor, **sequences: Any) -> Tensor | None:
        """Computes importance weights for a sampling distribution other than the trained one; ``None`` if off."""
        if self.importance_sampling_correction is None:
            return None
        return engine_correction_weights(
            old_N,
            engine_logprobs_N=engine_N,
            mode=self.importance_sampling_correction,
            minimum=self.importance_sampling_min,
            maximum=self.importance_sampling_max,
            **sequences,
        )

    def token_losses(
        self, logprobs_N: Tensor, entropy_N: Tensor, fixed: dict[str, Tensor | None], **sequences: Any
    ) -> TokenLosses:
        """Computes the loss of every token.

        Args:
            logprobs_N: log-probs under the policy, with gradient.
            entropy_N: entropy of the policy, with gradient where ``entropy_coef`` is not 0.
            fixed: ``advantages``, and where they are needed ``old_logprobs``, ``ref_logprobs``,
                ``sampling_logprobs``, ``weights``; (N,) each.
            sequences: ``sequence_index_N`` and ``num_sequences``.
        """
        old_N, advantages_N = fixed.get("old_logprobs"), fixed["advantages"]
        assert advantages_N is not None
        loss_N = self._policy_loss(logprobs_N, old_N, advantages_N, **sequences)
        weights_N = fixed.get("weights")
        if weights_N is not None:
            loss_N = loss_N * weights_N
        stays_N = self._stays(logprobs_N, fixed.get("sampling_logprobs"), advantages_N, **sequences)
        if stays_N is not None:
            loss_N = loss_N * stays_N
        ratio_N = importance_ratio(logprobs_N, old_logprobs_N=old_N, level=self.level, **sequences)
        ref_N, kl_N = fixed.get("ref_logprobs"), None
        if ref_N is not None:
            kl_N = kl_per_token(logprobs_N, ref_logprobs_N=ref_N, estimator=self.kl_estimator)
            if self.beta and not self.kl_in_reward:
                loss_N = loss_N + self.beta * self._penalty(kl_N, logprobs_N, old_N, **sequences)
        clipped = clip_statistics(
            ratio_N,
            advantages_N=advantages_N,
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            per_sequence=self.level == "sequence",
            **sequences,
        )
        return TokenLosses(loss_N, entropy_bonus_loss(entropy_N, coef=self.entropy_coef), kl_N, clipped)

    def _penalty(self, kl_N: Tensor, logprobs_N: Tensor, old_N: Tensor | None, **sequences: Any) -> Tensor:
        """Weights the KL estimates by the importance ratio where the bias correction is on.

        The ratio is per token, whatever level the policy loss uses: only the token's own ratio makes the gradient of
        its estimate unbiased. A mean over the sequence would give it 1/L of its own gradient, and shares of the others.
        """
        if not self.use_bias_correction_kl:
            return kl_N
        return kl_N * importance_ratio(logprobs_N, old_logprobs_N=old_N, level="token", **sequences)

    def _policy_loss(self, logprobs_N: Tensor, old_N: Tensor | None, advantages_N: Tensor, **sequences: Any) -> Tensor:
        return policy_gradient_loss(
            logprobs_N,
            old_logprobs_N=old_N,
            advantages_N=advantages_N,
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            dual_clip=self.dual_clip,
            importance_sampling_level=self.importance_sampling_level,
            sapo_temperature_positive=self.sapo_temperature_pos,
            sapo_temperature_negative=self.sapo_temperature_neg,
            **sequences,
        )

    def _stays(
        self, logprobs_N: Tensor, sampling_N: Tensor | None, advantages_N: Tensor, **sequences: Any
    ) -> Tensor | None:
        if self.off_policy_mask_threshold is None or sampling_N is None:
            return None
        return off_policy_mask(
            logprobs_N,
            sampling_logprobs_N=sampling_N,
            advantages_N=advantages_N,
            threshold=self.off_policy_mask_threshold,
            **sequences,
        )
