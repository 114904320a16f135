"""Reference-free preference losses: SimPO, AlphaPO, CPO and ORPO, two values per pair.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

from torch import Tensor

from ..utils.validation import check_choice, check_label_smoothing, check_not_negative, check_positive, check_same_shape
from . import _stable

SimPOLossType = Literal["simpo", "alphapo", "cpo", "cpo_hinge", "cpo_ipo", "orpo"]

LOSS_TYPES: Final[tuple[SimPOLossType, ...]] = get_args(SimPOLossType)
# Divisors of the sums of the two returned terms over the global batch.
NORMALIZERS: Final[Mapping[str, Literal["pairs", "chosen_tokens"]]] = MappingProxyType(
    {"preference": "pairs", "nll": "chosen_tokens"}
)
# The weight of the second term in each paper.
NLL_WEIGHTS: Final[Mapping[str, float]] = MappingProxyType(
    {name: 0.0 if name in ("simpo", "alphapo") else 1.0 for name in LOSS_TYPES}
)
# Losses that label_smoothing changes.
SMOOTHED: Final = frozenset({"simpo", "alphapo", "cpo"})


def _check_arguments(loss_type: str, beta: float, gamma: float, alpha: float, label_smoothing: float) -> None:
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_positive("beta", beta, "2.0 is usual" if loss_type in ("simpo", "alphapo") else "0.1 is usual")
    check_not_negative("gamma", gamma, "1.0 is usual")
    check_label_smoothing(label_smoothing)
    if not -10 <= alpha <= 10:
        raise ValueError(f"alpha={alpha} is outside [-10, 10]: 0 is SimPO, 0.25 is usual")


def validate_simpo_loss(
    loss_type: str,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
    nll_weight: float | None = None,
) -> None:
    """Checks the arguments that a config sets.

    Args:
        loss_type: one of ``LOSS_TYPES``.
        beta: above 0.
        gamma: at least 0.
        alpha: in [-10, 10].
        label_smoothing: in [0, 0.5); 0 if the loss does not read it.
        nll_weight: at least 0; ``None`` is the paper's, ``NLL_WEIGHTS``.

    Raises:
        ValueError: what is wrong, what is allowed, and what to write.

    Example:
        >>> validate_simpo_loss("simpo", beta=2.0, gamma=1.0)
    """
    _check_arguments(loss_type, beta, gamma, alpha, label_smoothing)
    if label_smoothing > 0 and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing} changes nothing in loss_type {loss_type!r}: "
            f"set it to 0, or use one of {', '.join(sorted(SMOOTHED))}"
        )
    if nll_weight is not None:
        check_not_negative("nll_weight", nll_weight, f"{NLL_WEIGHTS[loss_type]} is usual")


def alphapo_reward(mean_logps: Tensor, alpha: float) -> Tensor:
    """Computes the reward of AlphaPO, divided by beta, from a mean log-prob per token.

    Paper: AlphaPO (Gupta et al., 2025, arXiv:2501.03884): (1 - p^-alpha) / alpha with log p the mean log-prob;
    alpha -> 0 is log p, the reward of SimPO. Above p^-alpha = e^30 the power is continued by its tangent.

    Args:
        mean_logps: mean log-prob per token, any shape.
        alpha: any number; above 0 penalises unlikely completions more than SimPO, below 0 less.

    Returns:
        Rewards of the shape of ``mean_logps``.

    Example:
        >>> import torch
        >>> alphapo_reward(torch.tensor([0.25]).log(), alpha=0.5)
        tensor([-2.])
    """
    return mean_logps if alpha == 0 else -_stable.bounded_expm1(-alpha * mean_logps) / alpha


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    loss_type: SimPOLossType = "simpo",
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes the preference term and the negative log-likelihood of the chosen completion, for each pair.

    With a = log p / |y| the mean and s = log p the sum of the chosen (c) and rejected (r) completion's log-probs, S the
    logistic function, e = ``label_smoothing``, and f(m) = -(1-e) log S(m) - e log S(-m)::

        simpo      f(beta (a_c - a_r) - gamma)                           SimPO 2405.14734
        alphapo    f(beta (g(a_c) - g(a_r)) - gamma), g = alphapo_reward    AlphaPO 2501.03884
        cpo        f(beta (s_c - s_r)), with the nll                     CPO 2401.08417
        cpo_hinge  max(0, 1 - beta (s_c - s_r)), with the nll            (the hinge of SLiC)
        cpo_ipo    (a_c - a_r - 1/(2 beta))^2, with the nll              (the square of IPO)
        orpo       -beta log S(logit(e^a_c) - logit(e^a_r)), with the nll      ORPO 2403.07691; beta is its lambda

    Departure: some implementations of ORPO take the nll of prompt and completion; here the prompt is context.

    Args:
        chosen_logps: sum of log-probs over the chosen completion, (P,).
        rejected_logps: (P,).
        chosen_lengths: tokens of the chosen completion, (P,), at least 1.
        rejected_lengths: (P,).
        loss_type: one of ``LOSS_TYPES``.
        beta: above 0; the papers use 2 to 10 for ``simpo`` and ``alphapo``, 0.1 for the others.
        gamma: at least 0, the target margin of ``simpo`` and ``alphapo``, after the multiplication with beta.
        alpha: in [-10, 10], of ``alphapo``; 0 is ``simpo``.
        label_smoothing: in [0, 0.5), the probability that a label is flipped; read by ``SMOOTHED`` only.

    Returns:
        Two tensors (P,), unreduced. Divide the sum of the preference term over the global batch by the number of
        pairs; divide that of the second, the chosen completion's sum of -log p, by the number of chosen tokens and
        weight it (``NLL_WEIGHTS``).

    Raises:
        ValueError: a shape that differs, or an argument out of range.

    Example:
        >>> import torch
        >>> length = torch.tensor([2])
        >>> simpo_loss(torch.tensor([-2.0]), torch.tensor([-4.0]), chosen_lengths=length, rejected_lengths=length)
        (tensor([0.3133]), tensor([2.]))
    """
    _check_arguments(loss_type, beta, gamma, alpha, label_smoothing)
    check_same_shape(
        "P",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )

    mean_chosen, mean_rejected = (
        chosen_logps / chosen_lengths.clamp(min=1),
        rejected_logps / rejected_lengths.clamp(min=1),
    )
    margin = beta * (chosen_logps - rejected_logps)

    if loss_type == "simpo":
        preference = _stable.logistic(beta * (mean_chosen - mean_rejected) - gamma, label_smoothing)
    elif loss_type == "alphapo":
        difference = alphapo_reward(mean_chosen, alpha) - alphapo_reward(mean_rejected, alpha)
        preference = _stable.logistic(beta * difference - gamma, label_smoothing)
    elif loss_type == "cpo":
        preference = _stable.logistic(margin, label_smoothing)
    elif loss_type == "cpo_hinge":
        preference = (1 - margin).relu()
    elif loss_type == "cpo_ipo":
        preference = (mean_chosen - mean_rejected - 1 / (2 * beta)).square()
    else:
        # ORPO: log-odds of the mean probabilities per token.
        log_odds = mean_chosen - _stable.log1mexp(mean_chosen) - mean_rejected + _stable.log1mexp(mean_rejected)
        preference = beta * _stable.logistic(log_odds, 0.0)
    return preference, -chosen_logps
