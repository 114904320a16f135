"""The losses of the DPO family: their names, a function of pairs for each, and what sets them apart, in one table.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.imports import dotted_path
from ..utils.validation import check_choice
from . import _stable

PreferenceLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
Normalizer = Literal["pairs", "chosen_tokens"]


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """Inputs of the losses: P pairs of a chosen and a rejected completion, and scalar options.

    A loss of one's own is a function of this object to one loss per pair, (P,)::

        def squared_hinge(pairs):
            return (1 - pairs.margin).relu().square()

    It is called on any part of a batch, and the sum of its values is divided by the pairs of the global batch. A
    function whose loss of a pair depends on the other pairs has an attribute ``couples_pairs = True`` and is called on
    the global batch; one that sums over tokens has ``divided_by = "chosen_tokens"``, those of the global batch::

        def above_the_mean(pairs):
            return (1 - (pairs.margin - pairs.margin.detach().mean())).relu()


        above_the_mean.couples_pairs = True

    Attributes:
        chosen_logps: sum of the policy's log-probs over the chosen completion, with gradient, (P,).
        rejected_logps: likewise, (P,).
        ref_chosen_logps: sum of the reference's log-probs, (P,).
        ref_rejected_logps: likewise, (P,).
        chosen_scores: log-ratio of policy and reference, or its f-divergence's counterpart, (P,).
        rejected_scores: likewise, (P,).
        chosen_lengths: tokens of the chosen completion, (P,).
        rejected_lengths: likewise, (P,).
        sft_logps: sum of the policy's log-probs over the chosen completion, never reweighted, (P,).
        beta: above 0.
        label_smoothing: in [0, 0.5).
        discopop_tau: above 0.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    sft_logps: Tensor
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def chosen_logratios(self) -> Tensor:
        """Log-ratios of policy and reference of the chosen completions, (P,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratios of policy and reference of the rejected completions, (P,)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_rewards(self) -> Tensor:
        """Implicit rewards of the chosen completions, beta times the log-ratios, whatever the f-divergence, (P,)."""
        return self.beta * self.chosen_logratios

    @property
    def rejected_rewards(self) -> Tensor:
        """Implicit rewards of the rejected completions, likewise, (P,)."""
        return self.beta * self.rejected_logratios

    @property
    def margin(self) -> Tensor:
        """Difference of the implicit rewards, (P,): beta times that of the scores, which follow the f-divergence."""
        return self.beta * (self.chosen_scores - self.rejected_scores)

    @property
    def mean_score_difference(self) -> Tensor:
        """Difference of the scores per token, (P,)."""
        chosen = self.chosen_scores / self.chosen_lengths.clamp(min=1)
        return chosen - self.rejected_scores / self.rejected_lengths.clamp(min=1)


def _sigmoid(pairs: PreferencePairs) -> Tensor:
    return _stable.logistic(pairs.margin, pairs.label_smoothing)


def _sigmoid_norm(pairs: PreferencePairs) -> Tensor:
    return _stable.logistic(pairs.beta * pairs.mean_score_difference, pairs.label_smoothing)


def _hinge(pairs: PreferencePairs) -> Tensor:
    return (1 - pairs.margin).relu()


def _ipo(pairs: PreferencePairs) -> Tensor:
    return (pairs.mean_score_difference - 1 / (2 * pairs.beta)).square()


def _exo_pair(pairs: PreferencePairs) -> Tensor:
    margin, epsilon = pairs.margin, pairs.label_smoothing
    chosen = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-epsilon))
    return chosen + (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(epsilon))


def _nca_pair(pairs: PreferencePairs) -> Tensor:
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(pairs: PreferencePairs) -> Tensor:
    margin, epsilon = pairs.margin, pairs.label_smoothing
    return (epsilon * F.logsigmoid(-margin) - (1 - epsilon) * F.logsigmoid(margin)) / (1 - 2 * epsilon)


def _bco_pair(pairs: PreferencePairs) -> Tensor:
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    delta = 0.5 * (chosen + rejected).detach().mean()
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def _sppo_hard(pairs: PreferencePairs) -> Tensor:
    target = 0.5 / pairs.beta
    return (pairs.chosen_logratios - target).square() + (pairs.rejected_logratios + target).square()


def _match_by_rank(values: Tensor, others: Tensor) -> Tensor:
    """Returns for each value the one of ``others`` with the same rank; ties rank by position."""
    order = torch.sort(values.detach(), stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return torch.sort(others, stable=True).values[rank]


def _aot(pairs: PreferencePairs) -> Tensor:
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return _stable.logistic(pairs.beta * (policy - _match_by_rank(policy, reference)), pairs.label_smoothing)


def _aot_unpaired(pairs: PreferencePairs) -> Tensor:
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    return _stable.logistic(chosen - _match_by_rank(chosen, rejected), pairs.label_smoothing)


def _apo_zero(pairs: PreferencePairs) -> Tensor:
    return (-pairs.chosen_rewards).sigmoid() + pairs.rejected_rewards.sigmoid()


def _apo_down(pairs: PreferencePairs) -> Tensor:
    return pairs.chosen_rewards.sigmoid() + (pairs.rejected_rewards - pairs.chosen_rewards).sigmoid()


def _discopop(pairs: PreferencePairs) -> Tensor:
    margin = pairs.margin
    gate = margin / pairs.discopop_tau
    logistic = -F.logsigmoid(margin) * (-gate).sigmoid()
    # exp(-margin) may overflow where its gate is zero: multiply in the exponent.
    return logistic + _stable.bounded_exp(F.logsigmoid(gate) - margin)


def _sft(pairs: PreferencePairs) -> Tensor:
    return -pairs.sft_logps


@dataclass(frozen=True, slots=True)
class PreferenceLossSpec:
    """A loss of the DPO family, and what else depends on which loss it is.

    Attributes:
        function: from ``PreferencePairs`` to one loss per pair, (P,).
        couples_pairs: whether a pair's loss depends on the other pairs, so that it is computed on the global batch.
        sorts_pairs: whether it sorts chosen and rejected completions apart, so that weights of pairs mean nothing.
        divided_by: divisor of the sum of the loss over the global batch; WPO weights losses of pairs alone.
        smoothed: whether ``label_smoothing`` changes it.
        f_divergence: whether f-divergences other than the reverse KL are defined for it: it reads only the difference
            of the two implicit rewards, or no reward.
    """

    function: Callable[[PreferencePairs], Tensor]
    couples_pairs: bool = False
    sorts_pairs: bool = False
    divided_by: Normalizer = "pairs"
    smoothed: bool = False
    f_divergence: bool = False


LOSSES: Final[Mapping[str, PreferenceLossSpec]] = MappingProxyType(
    {
        "sigmoid": PreferenceLossSpec(_sigmoid, smoothed=True, f_divergence=True),
        "hinge": PreferenceLossSpec(_hinge, f_divergence=True),
        "ipo": PreferenceLossSpec(_ipo, f_divergence=True),
        "exo_pair": PreferenceLossSpec(_exo_pair, smoothed=True, f_divergence=True),
        "nca_pair": PreferenceLossSpec(_nca_pair),
        "robust": PreferenceLossSpec(_robust, smoothed=True, f_divergence=True),
        "bco_pair": PreferenceLossSpec(_bco_pair, couples_pairs=True),
        "sppo_hard": PreferenceLossSpec(_sppo_hard),
        "aot": PreferenceLossSpec(_aot, couples_pairs=True, sorts_pairs=True, smoothed=True),
        "aot_unpaired": PreferenceLossSpec(_aot_unpaired, couples_pairs=True, sorts_pairs=True, smoothed=True),
        "apo_zero": PreferenceLossSpec(_apo_zero),
        "apo_down": PreferenceLossSpec(_apo_down),
        "discopop": PreferenceLossSpec(_discopop, f_divergence=True),
        "sft": PreferenceLossSpec(_sft, divided_by="chosen_tokens", f_divergence=True),
        "sigmoid_norm": PreferenceLossSpec(_sigmoid_norm, smoothed=True, f_divergence=True),
    }
)


def loss_spec(loss_type: str | Callable[..., Any]) -> PreferenceLossSpec:
    """Looks a loss up by its name, or reads the attributes of a function of one's own.

    Raises:
        ValueError: there is no loss of that name, or an attribute has another value than allowed.

    Example:
        >>> loss_spec("sft").divided_by
        'chosen_tokens'
        >>> loss_spec(lambda pairs: -pairs.margin).couples_pairs
        False
    """
    if isinstance(loss_type, str):
        check_choice("loss_type", loss_type, LOSSES)
        return LOSSES[loss_type]
    couples: Any = getattr(loss_type, "couples_pairs", False)
    divided_by: Any = getattr(loss_type, "divided_by", "pairs")
    if not isinstance(couples, bool):
        raise ValueError(f"{dotted_path(loss_type)}.couples_pairs is {couples!r}; it must be True or False")
    check_choice(f"{dotted_path(loss_type)}.divided_by", divided_by, ("pairs", "chosen_tokens"))
    return PreferenceLossSpec(loss_type, couples_pairs=couples, divided_by=divided_by)
