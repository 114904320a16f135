"""Losses of outcome reward models, one value per pair, per completion, or per rated attribute.

Shapes: P pairs, B completions, K attributes or ensemble members.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.validation import check_choice, check_label_smoothing, check_positive
from . import _stable

RatingLossType = Literal["mse", "huber"]

RATING_LOSS_TYPES: Final[tuple[RatingLossType, ...]] = get_args(RatingLossType)


def _check_shapes(chosen_rewards: Tensor, rejected_rewards: Tensor, **per_pair: Tensor | float | None) -> None:
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.ndim not in (1, 2):
        shapes = f"chosen_rewards has shape {tuple(chosen_rewards.shape)} and rejected_rewards"
        raise ValueError(f"{shapes} {tuple(rejected_rewards.shape)}: give both the shape (P,) or (P, K)")
    for name, value in per_pair.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != chosen_rewards.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} for {len(chosen_rewards)} pairs: give one value per pair, (P,)"
            )


def _per_pair(value: Tensor, like: Tensor) -> Tensor:
    """Makes (P,) broadcast against (P,) or (P, K)."""
    return value.unsqueeze(-1) if value.ndim == 1 and like.ndim == 2 else value


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the negative log-likelihood that the chosen completion wins, under the Bradley-Terry model.

    Papers: Ouyang et al., 2022 (arXiv:2203.02155), eq. 1; the margin of Llama 2 (Touvron et al., 2023,
    arXiv:2307.09288), eq. 2. With d = r_c - r_r - margin and e = ``label_smoothing``: -(1-e) log S(d) - e log S(-d).

    Args:
        chosen_rewards: (P,), or (P, K) for K members of an ensemble, each with its own loss.
        rejected_rewards: the same shape.
        margin: required reward difference: one number, or one per pair, (P,).
        label_smoothing: in [0, 0.5), the probability that a label is flipped.

    Returns:
        Losses of the shape of the rewards, unreduced: divide their sum over the global batch by the number of pairs.

    Raises:
        ValueError: shapes that do not match, or an argument out of range.

    Example:
        >>> bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor([0.3133, 0.6931])
    """
    check_label_smoothing(label_smoothing)
    _check_shapes(chosen_rewards, rejected_rewards, margin=margin)
    if isinstance(margin, Tensor):
        margin = _per_pair(margin, chosen_rewards)
    elif not math.isfinite(margin):
        raise ValueError(f"margin={margin} is not a finite number: 0 is off, 1 is usual")
    return _stable.logistic(chosen_rewards - rejected_rewards - margin, label_smoothing)


def rao_kupper_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, *, tie_P: Tensor, threshold: float) -> Tensor:
    """Computes the negative log-likelihood of a win or a tie, under Rao and Kupper's extension of Bradley-Terry.

    Paper: Rao and Kupper, 1967, "Ties in paired-comparison experiments"; for language models, Liu et al., 2024
    (arXiv:2410.05328). With d = r_c - r_r and t = ``threshold``, the log of their theta::

        P(chosen wins) = S(d - t)      P(tie) = S(d + t) - S(d - t) = S(t + d) S(t - d) (1 - e^-2t)

    Preferred to Davidson's model because a win's loss is then that of Bradley-Terry with margin t: the threshold is
    the difference that a win has to exceed. A tie's loss pulls both rewards together; as t -> 0 ties become
    impossible.

    Args:
        chosen_rewards: (P,), or (P, K).
        rejected_rewards: the same shape; for a tie the order does not matter.
        tie_P: whether the pair is a tie, (P,), bool.
        threshold: above 0.

    Returns:
        Losses of the shape of the rewards, unreduced: divide their sum over the global batch by the number of pairs.

    Raises:
        ValueError: shapes that do not match, ties that are not bool, or an argument out of range.

    Example:
        >>> rewards = torch.zeros(2)
        >>> rao_kupper_loss(rewards, rewards, tie_P=torch.tensor([False, True]), threshold=math.log(2))
        tensor([1.0986, 1.0986])
    """
    check_positive("threshold", threshold, "0.5 is usual")
    _check_shapes(chosen_rewards, rejected_rewards, tie_P=tie_P)
    if tie_P.dtype != torch.bool:
        raise ValueError(f"tie_P has dtype {tie_P.dtype}: give bool, True for a tie")
    difference = chosen_rewards - rejected_rewards
    win = -F.logsigmoid(difference - threshold)
    tie = -F.logsigmoid(threshold + difference) - F.logsigmoid(threshold - difference)
    return torch.where(_per_pair(tie_P, difference), tie - math.log(-math.expm1(-2 * threshold)), win)


def centering_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Computes (r_c + r_r)^2 per pair, which fixes the constant that comparisons leave free.

    Paper: Helping or Herding? (Eisenstein et al., 2023, arXiv:2312.09244). A coefficient of 0.01 is usual.

    Args:
        chosen_rewards: (P,), or (P, K).
        rejected_rewards: the same shape.

    Returns:
        Penalties of the shape of the rewards, unreduced, to be weighted and divided by the number of pairs.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> centering_penalty(torch.tensor([2.0]), torch.tensor([-1.0]))
        tensor([1.])
    """
    _check_shapes(chosen_rewards, rejected_rewards)
    return (chosen_rewards + rejected_rewards).square()


def magnitude_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Computes r_c^2 + r_r^2 per pair, which keeps rewards small as well as centred.

    Args:
        chosen_rewards: (P,), or (P, K).
        rejected_rewards: the same shape.

    Returns:
        Penalties of the shape of the rewards, unreduced, to be weighted and divided by the number of pairs.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> magnitude_penalty(torch.tensor([2.0]), torch.tensor([-1.0]))
        tensor([5.])
    """
    _check_shapes(chosen_rewards, rejected_rewards)
    return chosen_rewards.square() + rejected_rewards.square()


def rating_mask(ratings_BK: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """Marks the ratings that count: not NaN, and not excluded by the mask if there is one.

    Args:
        ratings_BK: (B, K), or any shape; NaN is a missing attribute.
        mask_BK: the same shape, 1 = counts.

    Returns:
        Bool of the shape of the ratings; divide a sum of losses over the global batch by its sum.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> rating_mask(torch.tensor([[1.0, float("nan")]]))
        tensor([[ True, False]])
    """
    present_BK = ~ratings_BK.isnan()
    if mask_BK is None:
        return present_BK
    if mask_BK.shape != ratings_BK.shape:
        shapes = f"mask_BK has shape {tuple(mask_BK.shape)} and ratings_BK {tuple(ratings_BK.shape)}"
        raise ValueError(f"{shapes}: give one mask value per rating")
    return present_BK & mask_BK.bool()


def rating_loss(
    rewards_BK: Tensor,
    ratings_BK: Tensor,
    *,
    mask_BK: Tensor | None = None,
    loss_type: RatingLossType = "mse",
    huber_delta: float = 1.0,
) -> Tensor:
    """Computes the regression loss of each attribute's reward on its rating; missing ratings are ignored.

    Papers: HelpSteer2 (Wang et al., 2024, arXiv:2406.08673) for regression on attributes; Huber, 1964. With
    d = reward - rating::

        mse    d^2
        huber  d^2 / 2 where |d| <= delta, delta (|d| - delta / 2) elsewhere

    Args:
        rewards_BK: (B, K), or any shape.
        ratings_BK: the same shape; NaN where an attribute was not rated.
        mask_BK: the same shape, 1 = counts.
        loss_type: ``mse`` or ``huber``.
        huber_delta: above 0.

    Returns:
        Losses of the shape of the rewards, unreduced, 0 (without gradient) where no rating counts: divide their sum
        over the global batch by the number of ratings that count (``rating_mask``).

    Raises:
        ValueError: shapes that differ, or an argument out of range.

    Example:
        >>> rating_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, float("nan")]]))
        tensor([[4., 0.]])
    """
    check_choice("loss_type", loss_type, RATING_LOSS_TYPES)
    check_positive("huber_delta", huber_delta, "1.0 is usual")
    if rewards_BK.shape != ratings_BK.shape:
        shapes = f"rewards_BK has shape {tuple(rewards_BK.shape)} and ratings_BK {tuple(ratings_BK.shape)}"
        raise ValueError(f"{shapes}: give one rating (or NaN) per reward")
    counts_BK = rating_mask(ratings_BK, mask_BK)
    difference_BK = torch.where(counts_BK, rewards_BK - ratings_BK.nan_to_num(), 0.0)
    if loss_type == "mse":
        return difference_BK.square()
    return F.huber_loss(difference_BK, torch.zeros_like(difference_BK), reduction="none", delta=huber_delta)
