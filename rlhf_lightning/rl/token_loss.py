"""The interface of policy losses, also of one's own: one value per sampled token.

Shapes: N sampled tokens of all sequences, flat; S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..utils.option_groups import OptionGroup
from ..utils.validation import check_finite


@dataclass(frozen=True, kw_only=True)
class TokenLoss(OptionGroup):
    """A loss per sampled token. A loss of one's own is a subclass that overrides ``per_token``.

    A subclass is a frozen dataclass whose fields are its options; one without options of its own needs no decorator.
    It is named by ``class_path`` in YAML and on the command line, or given as an object.

    Example:
        >>> from rlhf_lightning.rl import PolicyLoss
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Reinforce(PolicyLoss):
        ...     scale: float = 1.0
        ...
        ...     def per_token(self, logprobs_N, *, advantages_N, **_):
        ...         return -self.scale * advantages_N * logprobs_N
        >>> half, index = torch.tensor([0.5]).log(), torch.tensor([0])
        >>> loss = Reinforce(scale=2.0)
        >>> loss(half, old_logprobs_N=None, advantages_N=torch.ones(1), sequence_index_N=index, num_sequences=1)
        tensor([1.3863])
    """

    group: ClassVar[str] = "loss"

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
        raise TypeError(f"{type(self).__name__} must define per_token")

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
