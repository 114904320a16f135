"""Parts of PPO, each an option group: clipped ratio, value function, advantages and whitening, adaptive KL penalty.

Shapes: N sampled tokens of all sequences, flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..distributed.collectives import sum_vector_over_ranks
from ..losses.kl import kl_per_token
from ..losses.value import value_clipped, value_loss
from ..utils.option_groups import OptionGroup
from ..utils.validation import check_not_negative, check_positive
from .advantages import AdvantagesAndReturns, gae, moment_sums, whiten
from .clipped_loss import ClippedLoss
from .reward_shaping import KLController
from .shared_tokens import SharedTokens


@dataclass(frozen=True, kw_only=True)
class PPOLoss(ClippedLoss):
    """The clipped policy-gradient loss of PPO (Schulman et al., 2017, arXiv:1707.06347), a mean over tokens.

    A loss of one's own is a subclass that overrides ``per_token``, as for ``PolicyLoss``.

    Args:
        epsilon: lower clipping range of the ratio, in (0, 1).
        epsilon_high: upper clipping range, above 0; by default ``epsilon``.
        dual_clip: bound of the loss where the advantage is negative (Ye et al., 2020, arXiv:1912.09729), above 1;
            ``None`` for none.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> one, index = torch.ones(1), torch.tensor([0])
        >>> PPOLoss()(0.3 * one, old_logprobs_N=0 * one, advantages_N=one, sequence_index_N=index, num_sequences=1)
        tensor([-1.2000])
    """


@dataclass(frozen=True, kw_only=True)
class ValueFunction(OptionGroup):
    """The critic: its model and head, its learning rate, and its loss.

    Args:
        model: folder or id of the critic's initial model, with a backbone of its own: an exported reward model (its
            head is loaded), or any language model; ``None``: a head on the policy's backbone.
        head: ``linear`` or ``mlp``, if no head is loaded; initialised to 0.
        lr_ratio: learning rate of the critic's own weights relative to the policy's, above 0.
        warmup_iterations: iterations in which only the critic's own weights learn, at least 0.
        coef: weight of the critic's loss, at least 0.
        cliprange: clipping range of values around the old ones (Engstrom et al., 2020, arXiv:2005.12729), above 0;
            ``None`` for no clipping.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> one = torch.ones(1)
        >>> ValueFunction(cliprange=None).loss(0.5 * one, old_values_N=0 * one, returns_N=one)
        tensor([0.1250])
    """

    group: ClassVar[str] = "value"

    model: str | None = None
    head: Literal["linear", "mlp"] = "linear"
    lr_ratio: float = 1.0
    warmup_iterations: int = 0
    coef: float = 0.1
    cliprange: float | None = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("value.lr_ratio", self.lr_ratio, "1.0 gives the critic the policy's learning rate")
        check_not_negative("value.warmup_iterations", self.warmup_iterations, "0 trains both from the start")
        check_not_negative("value.coef", self.coef, "0.1 is usual")
        if self.cliprange is not None:
            check_positive("value.cliprange", self.cliprange, "0.2 is usual")

    def loss(self, values_N: Tensor, *, old_values_N: Tensor, returns_N: Tensor) -> Tensor:
        """Computes the clipped squared error of every value, ``(N,)``, without ``coef``."""
        return value_loss(values_N, old_values_N=old_values_N, returns_N=returns_N, cliprange=self.cliprange)

    def clipped(self, values_N: Tensor, *, old_values_N: Tensor, returns_N: Tensor) -> Tensor:
        """Marks by 1 the values whose loss is that of the clipped value, ``(N,)``."""
        return value_clipped(values_N, old_values_N=old_values_N, returns_N=returns_N, cliprange=self.cliprange)


@dataclass(frozen=True, kw_only=True)
class GAE(OptionGroup):
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438), and whitening over the global batch.

    ``rl.advantages`` documents both.

    Args:
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: 0 trusts the critic, 1 the rewards.
        whiten_rewards: scale the rewards of tokens to variance 1.
        whiten_advantages: normalise advantages to mean 0 and variance 1.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> zeros, rewards = torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 1.0])
        >>> GAE(whiten_advantages=False)(rewards, values_N=rewards / 2, sequence_index_N=zeros, num_sequences=1)
        AdvantagesAndReturns(advantages_N=tensor([0.9750, 0.5000]), returns_N=tensor([0.9750, 1.0000]))
    """

    group: ClassVar[str] = "gae"

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, usual in (("gamma", self.gamma, 1.0), ("lam", self.lam, 0.95)):
            if not 0 <= value <= 1:
                raise ValueError(f"gae.{name}={value} is outside [0, 1]: {usual} is usual")

    def __call__(
        self, rewards_N: Tensor, *, values_N: Tensor, shared: SharedTokens | None = None, **sequences: Any
    ) -> AdvantagesAndReturns:
        r"""Computes advantages and returns of this rank's tokens; every rank calls it.

        Of a search tree, they are those along each path from the prompt to the end of a completion, averaged over the
        paths through a token. Where branches c with :math:`n_c` draws continue a branch, its last token has

        .. math:: A_t = \delta_t + \gamma \lambda \, \sum_c n_c A_{t+1}^c \big/ \sum_c n_c

        so that, with as many draws as were decided before they were made, it estimates what the policy would reach
        from there, however often the search went on below each of them. All statistics count a token once for each
        draw.

        Args:
            rewards_N: (N,).
            values_N: the critic's values of the states before the tokens, (N,).
            shared: which tokens are shared by several completions; ``None`` for none.
            sequences: ``sequence_index_N`` and ``num_sequences``.
        """
        shares_N = None if shared is None else shared.shares_N
        if self.whiten_rewards:
            sums = sum_vector_over_ranks(moment_sums(rewards_N, weights_N=shares_N))
            rewards_N = whiten(rewards_N, sums=sums, shift_mean=False)

        # Returns are the critic's targets, so only advantages are whitened after this.
        found = gae(rewards_N, values_N=values_N, gamma=self.gamma, gae_lambda=self.lam, **sequences)
        if shared is not None:
            found = AdvantagesAndReturns(shared.mean(found.advantages_N), shared.mean(found.returns_N))
        if not self.whiten_advantages:
            return found
        sums = sum_vector_over_ranks(moment_sums(found.advantages_N, weights_N=shares_N))
        return AdvantagesAndReturns(whiten(found.advantages_N, sums=sums), found.returns_N)


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(OptionGroup):
    """The divergence from the reference in the rewards of tokens, and how its weight ``kl_coef`` adapts.

    Paper: Ziegler et al., 2019, arXiv:1909.08593; ``rl.reward_shaping.KLController`` gives the formula.

    Args:
        estimator: ``k1`` or ``k3``, see ``losses.kl.kl_per_token``.
        target: target divergence per completion, to which ``kl_coef`` adapts, above 0; ``None`` keeps it fixed.
        horizon: completions over which it adapts, at least 1.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> AdaptiveKL(target=6.0).controller(0.1).coef
        0.1
    """

    group: ClassVar[str] = "kl"

    estimator: Literal["k1", "k3"] = "k1"
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            check_positive("kl.target", self.target, "6.0 is usual, null keeps the weight")
        check_positive("kl.horizon", self.horizon, "10000 is usual")

    def controller(self, coef: float) -> KLController:
        """Makes the controller of the weight."""
        return KLController(coef, target=self.target, horizon=self.horizon)

    def per_token(self, logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
        """Estimates the divergence at every token, ``(N,)``."""
        return kl_per_token(logprobs_N, ref_logprobs_N=ref_logprobs_N, estimator=self.estimator)
