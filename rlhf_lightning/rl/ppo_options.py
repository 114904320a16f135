"""Options of PPO, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..losses.policy_gradient import policy_gradient_loss
from ..losses.value import value_loss
from ..models.reward_head import HEAD_KINDS
from ..utils.validation import check_choice, check_not_negative, check_positive
from .advantages import gae


@dataclass(frozen=True)
class PPOOptions:
    """Options of PPO's losses and advantages; ``PPOModule`` documents each.

    Raises:
        ValueError: an option out of range.
    """

    value_head: Literal["linear", "mlp"] = "linear"
    value_lr_ratio: float = 1.0
    value_warmup_iterations: int = 0
    vf_coef: float = 0.1
    cliprange_value: float | None = 0.2
    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_estimator: Literal["k1", "k3"] = "k1"
    missing_eos_penalty: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        check_choice("value_head", self.value_head, HEAD_KINDS)
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        check_positive("value_lr_ratio", self.value_lr_ratio, "1.0 gives the critic the policy's learning rate")
        check_not_negative("value_warmup_iterations", self.value_warmup_iterations, "0 trains both from the start")
        check_not_negative("vf_coef", self.vf_coef, "0.1 is usual")
        if self.missing_eos_penalty is not None:
            check_not_negative("missing_eos_penalty", self.missing_eos_penalty, "it is subtracted; 1.0 is usual")

        # The losses check their own options: call them with no tokens.
        empty, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        sequences: dict[str, Any] = {"sequence_index_N": index, "num_sequences": 0}
        policy_gradient_loss(
            empty, old_logprobs_N=None, advantages_N=empty, dual_clip=self.dual_clip, **self.clipping, **sequences
        )
        value_loss(empty, old_values_N=empty, returns_N=empty, cliprange=self.cliprange_value)
        gae(empty, values_N=empty, gamma=self.gamma, gae_lambda=self.gae_lambda, **sequences)

    @property
    def clipping(self) -> dict[str, Any]:
        """Clipping bounds of the importance ratio."""
        return {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
