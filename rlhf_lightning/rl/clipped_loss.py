"""The interface of policy losses, also of one's own, and the clipping that GRPO's and PPO's share.

Shapes: N sampled tokens of all sequences, flat; S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..losses.policy_gradient import (
    ClipStatistics,
    ImportanceLevel,
    clip_statistics,
    importance_ratio,
    policy_gradient_loss,
)
from ..utils.option_groups import OptionGroup
from ..utils.validation import check_finite


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(OptionGroup):
    """A loss per sampled token: the clipped surrogate, and the metrics of its clipping.

    ``losses.policy_gradient`` has the formula. A loss of one's own is a subclass of ``PolicyLoss`` or ``PPOLoss`` that
    overrides ``per_token``: a frozen dataclass whose fields are its options; one without options of its own needs no
    decorator. It is named by ``class_path`` in YAML and on the command line, or given as an object.

    Args:
        epsilon: lower clipping range of the ratio, in (0, 1).
        epsilon_high: upper clipping range, above 0; by default ``epsilon``.
        dual_clip: bound of the loss where the advantage is negative, above 1; ``None`` for none.

    Raises:
        ValueError: an option out of range, or without effect.

    Example:
        >>> from rlhf_lightning.rl import PolicyLoss
        >>> @dataclass(frozen=True, kw_only=True)
        ... class PolicyGradient(PolicyLoss):
        ...     scale: float = 1.0
        ...
        ...     def per_token(self, logprobs_N, *, advantages_N, **_):
        ...         return -self.scale * advantages_N * logprobs_N
        >>> half, index = torch.tensor([0.5]).log(), torch.tensor([0])
        >>> loss = PolicyGradient(scale=2.0)
        >>> loss(half, old_logprobs_N=None, advantages_N=torch.ones(1), sequence_index_N=index, num_sequences=1)
        tensor([1.3863])
    """

    group: ClassVar[str] = "loss"

    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # The function checks its own options: call it without tokens, and not what a subclass overrides.
        none, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        with self.naming_group():
            ClippedLoss.per_token(
                self, none, old_logprobs_N=none, advantages_N=none, sequence_index_N=index, num_sequences=0
            )

    @property
    def level(self) -> ImportanceLevel:
        """The level of importance ratios."""
        return "token"

    def function_options(self) -> dict[str, Any]:
        """Returns the options of ``losses.policy_gradient.policy_gradient_loss`` that are set here."""
        return {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high, "dual_clip": self.dual_clip}

    def clip_options(self) -> dict[str, Any]:
        """Returns the options of ``losses.policy_gradient.clip_statistics`` that are set here."""
        return {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}

    def per_token(
        self,
        logprobs_N: Tensor,
        *,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        sequence_index_N: Tensor,
        num_sequences: int,
    ) -> Tensor:
        """Computes the loss of every token.

        Args:
            logprobs_N: log-probability of each sampled token under the policy, with gradient, (N,).
            old_logprobs_N: under the policy that sampled; equal in value to ``logprobs_N`` before its first update.
            advantages_N: (N,).
            sequence_index_N: (N,).
            num_sequences: S.

        Returns:
            Losses (N,), finite and with gradient. Their sum is weighted by the method.
        """
        return policy_gradient_loss(
            logprobs_N,
            old_logprobs_N=old_logprobs_N,
            advantages_N=advantages_N,
            sequence_index_N=sequence_index_N,
            num_sequences=num_sequences,
            **self.function_options(),
        )

    def __call__(
        self,
        logprobs_N: Tensor,
        *,
        old_logprobs_N: Tensor | None,
        advantages_N: Tensor,
        sequence_index_N: Tensor,
        num_sequences: int,
    ) -> Tensor:
        """Computes the loss of every token, and checks the values of a loss of one's own.

        Args:
            logprobs_N: as for ``per_token``.
            old_logprobs_N: as for ``per_token``; ``None`` where the policy has not moved yet.
            advantages_N: as for ``per_token``.
            sequence_index_N: as for ``per_token``.
            num_sequences: as for ``per_token``.

        Returns:
            Losses (N,).

        Raises:
            ValueError: an own loss returns something else than one finite number per token.
        """
        loss_N = self.per_token(
            logprobs_N,
            old_logprobs_N=logprobs_N.detach() if old_logprobs_N is None else old_logprobs_N,
            advantages_N=advantages_N,
            sequence_index_N=sequence_index_N,
            num_sequences=num_sequences,
        )
        if not type(self).per_token.__module__.startswith(f"{__package__}."):
            check_finite(f"{type(self).__name__}.per_token", loss_N, like=logprobs_N, each="sampled token")
        return loss_N

    def clipped(
        self, logprobs_N: Tensor, *, old_logprobs_N: Tensor | None, advantages_N: Tensor, **sequences: Any
    ) -> ClipStatistics:
        """Counts clipped ratios per sequence, of tokens or of whole sequences as ``level`` says."""
        ratio_N = importance_ratio(logprobs_N, old_logprobs_N=old_logprobs_N, level=self.level, **sequences)
        return clip_statistics(
            ratio_N,
            advantages_N=advantages_N,
            per_sequence=self.level == "sequence",
            **self.clip_options(),
            **sequences,
        )
