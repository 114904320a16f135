"""Options of the losses of outcome reward models, with their checks.

Shapes: E rows, M members of an ensemble, K attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from torch import Tensor

from ..utils.validation import check_choice, check_not_negative, check_positive
from .reward import bradley_terry_loss, centering_penalty, magnitude_penalty, rao_kupper_loss, rating_loss

RewardLossType = Literal["bradley_terry", "mse", "huber"]

LOSS_TYPES: Final[tuple[RewardLossType, ...]] = get_args(RewardLossType)


@dataclass(frozen=True)
class RewardLoss:
    """The loss of an outcome reward model, on pairs or on ratings.

    Args:
        loss_type: ``bradley_terry`` learns from pairs, ``mse`` and ``huber`` from ratings.
        label_smoothing: probability that a pair's label is flipped, in [0, 0.5).
        margin: required difference of rewards of pairs without a margin; any finite number.
        center_rewards_coefficient: weight of (r_c + r_r)^2, at least 0; 0.01 is usual.
        l2_coefficient: weight of r_c^2 + r_r^2, at least 0.
        tie_threshold: threshold, above 0, of Rao and Kupper's model of ties.
        huber_delta: error at which ``huber`` turns from quadratic to linear, above 0.

    Raises:
        ValueError: a value out of range, or one without effect.

    Example:
        >>> import torch
        >>> loss = RewardLoss(margin=1.0)
        >>> loss.of_pairs(torch.tensor([[2.0]]), torch.tensor([[1.0]]), margin_E=torch.tensor([loss.margin]))
        tensor([[0.6931]])
    """

    loss_type: RewardLossType = "bradley_terry"
    label_smoothing: float = 0.0
    margin: float = 0.0
    center_rewards_coefficient: float = 0.0
    l2_coefficient: float = 0.0
    tie_threshold: float | None = None
    huber_delta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        smoothing, margin = self.label_smoothing, self.margin
        if isinstance(smoothing, bool) or not 0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing is {smoothing!r}; it must be in [0, 0.5) (0 is off, 0.1 is usual)")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"margin is {margin!r}; it must be a finite number (0 is off, 1 is usual)")
        check_not_negative("center_rewards_coefficient", self.center_rewards_coefficient, "0 is off, 0.01 is usual")
        check_not_negative("l2_coefficient", self.l2_coefficient, "0 is off, 0.001 is usual")
        check_positive("huber_delta", self.huber_delta, "1 is usual")

        # Options of the pair losses would silently do nothing elsewhere.
        if not self.compares_pairs:
            pairs = ("label_smoothing", "margin", "center_rewards_coefficient", "l2_coefficient", "tie_threshold")
            for name in pairs:
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name}={value} changes nothing in loss_type {self.loss_type!r}: use 'bradley_terry'"
                    )

        # The model of ties (Rao and Kupper) defines neither margins nor flipped labels.
        if self.tie_threshold is not None:
            check_positive("tie_threshold", self.tie_threshold, "0.5 is usual; null is a model without ties")
            for name in ("label_smoothing", "margin"):
                if value := getattr(self, name):
                    raise ValueError(f"{name}={value} changes nothing with tie_threshold: leave one of them out")

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss is one of pairs, not of ratings."""
        return self.loss_type == "bradley_terry"

    def check_rows(self, average_over: str, attributes: Sequence[str] | None) -> None:
        """Checks options of a module against the kind of rows that the loss learns from.

        Args:
            average_over: ``pairs`` or ``prompts``; the latter only for pairs.
            attributes: names of the columns of ratings; needed by the losses of ratings.

        Raises:
            ValueError: an option that does not fit.
        """
        check_choice("average_over", average_over, ("pairs", "prompts"))
        if average_over == "prompts" and not self.compares_pairs:
            raise ValueError(
                f"average_over is 'prompts' with loss_type {self.loss_type!r}, which has no pairs: use "
                "'bradley_terry', or average_over='pairs'"
            )
        if not attributes and not self.compares_pairs:
            raise ValueError(
                f"loss_type is {self.loss_type!r} without attributes: name the columns of ratings, such as "
                "['helpfulness']"
            )

    def of_pairs(
        self, chosen_EM: Tensor, rejected_EM: Tensor, *, margin_E: Tensor, tie_E: Tensor | None = None
    ) -> Tensor:
        """Computes the losses of pairs, ``(E, M)``.

        Args:
            chosen_EM: rewards of the chosen completions.
            rejected_EM: rewards of the rejected completions.
            margin_E: required differences; not read with ``tie_threshold``.
            tie_E: whether a pair is a tie; read only with ``tie_threshold``.
        """
        if self.tie_threshold is not None:
            assert tie_E is not None
            losses = rao_kupper_loss(chosen_EM, rejected_EM, tie_P=tie_E, threshold=self.tie_threshold)
        else:
            margin = margin_E.to(chosen_EM.dtype)
            losses = bradley_terry_loss(chosen_EM, rejected_EM, margin=margin, label_smoothing=self.label_smoothing)
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * centering_penalty(chosen_EM, rejected_EM)
        if self.l2_coefficient:
            losses = losses + self.l2_coefficient * magnitude_penalty(chosen_EM, rejected_EM)
        return losses

    def of_ratings(self, rewards_EMK: Tensor, ratings_EK: Tensor) -> Tensor:
        """Computes the losses of ratings, summed over the attributes: ``(E, M)``; a missing rating (NaN) costs 0."""
        ratings = ratings_EK.to(rewards_EMK.dtype)[:, None].expand_as(rewards_EMK)
        kind: Any = self.loss_type
        return rating_loss(rewards_EMK, ratings, loss_type=kind, huber_delta=self.huber_delta).sum(dim=-1)
