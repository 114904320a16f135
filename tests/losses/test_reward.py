"""Outcome reward losses against probabilities in plain Python, loops, and torch's own functions."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses.reward import (
    bradley_terry_loss,
    centering_penalty,
    magnitude_penalty,
    rao_kupper_loss,
    rating_loss,
    rating_mask,
)
from rlhf_lightning.losses.reward_options import RewardLoss, RewardLossType

NAN = float("nan")


def draw(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return list(2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def win(d: float) -> float:
    return math.exp(d) / (1 + math.exp(d))


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("margin", [0.0, 0.7, torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)])
def test_bradley_terry_is_minus_the_log_of_the_probability_to_win(
    shape: tuple[int, ...], margin: float | Tensor
) -> None:
    chosen, rejected = draw(*shape)
    losses = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=0.1)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape)).tolist():
        wanted = margin[index[0]].item() if isinstance(margin, Tensor) else margin
        p = win(chosen[tuple(index)].item() - rejected[tuple(index)].item() - wanted)
        assert losses[tuple(index)].item() == pytest.approx(-0.9 * math.log(p) - 0.1 * math.log(1 - p))


def test_bradley_terry_by_hand() -> None:
    chosen = torch.tensor([math.log(3), 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = bradley_terry_loss(chosen, rejected)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.25, -0.5])
    assert rejected.grad.tolist() == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_rao_kupper_is_minus_the_log_of_its_probabilities(shape: tuple[int, ...]) -> None:
    chosen, rejected = draw(*shape)
    tie, threshold = torch.tensor([True, False, True, False]), 0.6
    theta = math.exp(threshold)
    losses = rao_kupper_loss(chosen, rejected, tie_P=tie, threshold=threshold)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape)).tolist():
        p, q = math.exp(chosen[tuple(index)].item()), math.exp(rejected[tuple(index)].item())
        won, lost = p / (p + theta * q), q / (q + theta * p)
        drawn = p * q * (theta**2 - 1) / ((p + theta * q) * (q + theta * p))
        assert won + lost + drawn == pytest.approx(1)
        assert losses[tuple(index)].item() == pytest.approx(-math.log(drawn if tie[index[0]] else won))


def test_rao_kupper_pulls_ties_together_and_treats_a_win_as_a_margin() -> None:
    chosen, rejected = (tensor.requires_grad_() for tensor in draw(4))
    no_tie, all_ties = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    wins = rao_kupper_loss(chosen, rejected, tie_P=no_tie, threshold=0.6)
    torch.testing.assert_close(wins, bradley_terry_loss(chosen, rejected, margin=0.6))
    rao_kupper_loss(chosen, rejected, tie_P=all_ties, threshold=0.6).sum().backward()
    assert torch.equal(chosen.grad.sign(), (chosen - rejected).detach().sign())
    either_order = (
        rao_kupper_loss(*pair, tie_P=all_ties, threshold=0.6) for pair in ((chosen, rejected), (rejected, chosen))
    )
    torch.testing.assert_close(*either_order)


def test_gradients_are_the_numerical_derivatives() -> None:
    leaves = [tensor.requires_grad_() for tensor in draw(3, 2)]
    tie, margin = torch.tensor([True, False, True]), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    ratings = torch.tensor([[1.0, NAN], [0.5, 4.0], [NAN, NAN]], dtype=torch.float64)
    torch.autograd.gradcheck(lambda c, r: bradley_terry_loss(c, r, margin=margin, label_smoothing=0.2), leaves)
    torch.autograd.gradcheck(lambda c, r: rao_kupper_loss(c, r, tie_P=tie, threshold=0.4), leaves)
    torch.autograd.gradcheck(centering_penalty, leaves)
    torch.autograd.gradcheck(magnitude_penalty, leaves)
    torch.autograd.gradcheck(lambda c: rating_loss(c, ratings, loss_type="huber", huber_delta=0.7), leaves[:1])


def test_penalties_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-0.5, -3.0])
    assert centering_penalty(chosen, rejected).tolist() == [2.25, 16.0]
    assert magnitude_penalty(chosen, rejected).tolist() == [4.25, 10.0]


def test_extreme_rewards_stay_finite_in_fp32() -> None:
    difference = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    losses = bradley_terry_loss(difference, torch.zeros(3), label_smoothing=0.1)
    assert losses.tolist() == pytest.approx([1e3, 9e3, math.log(2)])
    for tie in (True, False):
        losses = losses + rao_kupper_loss(difference, torch.zeros(3), tie_P=torch.tensor([tie] * 3), threshold=1e-4)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert difference.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", ["mse", "huber"])
def test_ratings_that_are_missing_cost_nothing(loss_type: str) -> None:
    rewards, ratings = (
        torch.tensor([[3.0, 1.0, 0.0], [0.5, -1.0, 2.0]]),
        torch.tensor([[1.0, NAN, 0.5], [0.0, NAN, 2.0]]),
    )
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    rewards.requires_grad_()
    losses = rating_loss(rewards, ratings, mask_BK=mask, loss_type=loss_type, huber_delta=1.5)
    expected = torch.zeros(2, 3)
    for b, k in ((0, 0), (0, 2), (1, 2)):
        d = abs(rewards[b, k].item() - ratings[b, k].item())
        expected[b, k] = d**2 if loss_type == "mse" else d**2 / 2 if d <= 1.5 else 1.5 * (d - 0.75)
    torch.testing.assert_close(losses.detach(), expected)
    losses.sum().backward()
    assert rewards.grad.isfinite().all()
    assert rewards.grad[[0, 1, 1], [1, 0, 1]].tolist() == [0.0] * 3
    assert rating_mask(ratings, mask).tolist() == [[True, False, True], [False, False, True]]


def test_a_reward_that_is_not_finite_shows_where_it_counts_and_only_there() -> None:
    rewards = torch.tensor([[NAN, NAN]], requires_grad=True)
    losses = rating_loss(rewards, torch.tensor([[1.0, NAN]]))
    assert losses.isnan().tolist() == [[True, False]]


REWARDS = torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bradley_terry_loss(REWARDS, REWARDS[:1]),
            "chosen_rewards has shape (2,) and rejected_rewards (1,): give both the shape (P,) or (P, K)",
        ),
        (
            lambda: centering_penalty(torch.tensor(0.0), torch.tensor(0.0)),
            "chosen_rewards has shape () and rejected_rewards (): give both the shape (P,) or (P, K)",
        ),
        (
            lambda: magnitude_penalty(REWARDS, REWARDS[:, None]),
            "chosen_rewards has shape (2,) and rejected_rewards (2, 1): give both the shape (P,) or (P, K)",
        ),
        (
            lambda: bradley_terry_loss(REWARDS, REWARDS, margin=torch.zeros(2, 1)),
            "margin has shape (2, 1) for 2 pairs: give one value per pair, (P,)",
        ),
        (
            lambda: bradley_terry_loss(REWARDS, REWARDS, margin=NAN),
            "margin=nan is not a finite number: 0 is off, 1 is usual",
        ),
        (
            lambda: bradley_terry_loss(REWARDS, REWARDS, label_smoothing=0.6),
            "label_smoothing is 0.6; it must be in [0, 0.5) (0 is off; else the rate of wrong labels)",
        ),
        (
            lambda: rao_kupper_loss(REWARDS, REWARDS, tie_P=torch.zeros(2), threshold=0.5),
            "tie_P has dtype torch.float32: give bool, True for a tie",
        ),
        (
            lambda: rao_kupper_loss(REWARDS, REWARDS, tie_P=torch.zeros(2, dtype=torch.bool), threshold=0.0),
            "threshold is 0.0; it must be above 0 (0.5 is usual)",
        ),
        (
            lambda: rating_loss(REWARDS, REWARDS, loss_type="hubert"),
            "loss_type is 'hubert'; it must be one of mse, huber; did you mean 'huber'?",
        ),
        (
            lambda: rating_loss(REWARDS, REWARDS, huber_delta=-1.0),
            "huber_delta is -1.0; it must be above 0 (1.0 is usual)",
        ),
        (
            lambda: rating_loss(REWARDS, REWARDS[:, None]),
            "rewards_BK has shape (2,) and ratings_BK (2, 1): give one rating (or NaN) per reward",
        ),
        (
            lambda: rating_mask(REWARDS, REWARDS[:1]),
            "mask_BK has shape (1,) and ratings_BK (2,): give one mask value per rating",
        ),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# The loss with its options.


def test_a_loss_of_pairs_adds_what_its_options_say() -> None:
    (chosen, rejected), margin = draw(3, 2), torch.tensor([0.5, 0.0, -1.0])
    loss = RewardLoss(label_smoothing=0.1, center_rewards_coefficient=0.3, l2_coefficient=0.2)
    found = loss.of_pairs(chosen, rejected, margin_E=margin)
    for e, m in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        c, r = float(chosen[e, m]), float(rejected[e, m])
        p = win(c - r - float(margin[e]))
        expected = -0.9 * math.log(p) - 0.1 * math.log(1 - p) + 0.3 * (c + r) ** 2 + 0.2 * (c * c + r * r)
        assert float(found[e, m]) == pytest.approx(expected, rel=1e-9)


def test_a_loss_with_ties_reads_no_margin() -> None:
    chosen, rejected = draw(4, 2)
    tie = torch.tensor([True, False, True, False])
    found = RewardLoss(tie_threshold=0.4).of_pairs(chosen, rejected, margin_E=torch.full((4,), NAN), tie_E=tie)
    for e, m in torch.cartesian_prod(torch.arange(4), torch.arange(2)).tolist():
        d = float(chosen[e, m] - rejected[e, m])
        better, worse = win(d - 0.4), win(-d - 0.4)
        expected = -math.log(1 - better - worse if tie[e] else better)
        assert float(found[e, m]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss_type", ["mse", "huber"])
def test_a_loss_of_ratings_is_the_sum_over_attributes_that_are_rated(loss_type: RewardLossType) -> None:
    rewards, ratings = draw(3, 2, 2)[0], torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, 2.0]], dtype=torch.float64)
    found = RewardLoss(loss_type=loss_type, huber_delta=0.7).of_ratings(rewards, ratings)
    for e, m in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        expected = 0.0
        for k in range(2):
            error = abs(float(rewards[e, m, k] - ratings[e, k]))
            huber = error**2 / 2 if error <= 0.7 else 0.7 * (error - 0.35)
            expected += 0.0 if math.isnan(error) else error**2 if loss_type == "mse" else huber
        assert float(found[e, m]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "bt"}, "loss_type is 'bt'; it must be one of bradley_terry, mse, huber"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be in [0, 0.5)"),
        ({"margin": math.inf}, "margin is inf; it must be a finite number"),
        ({"l2_coefficient": -1.0}, "l2_coefficient is -1.0; it must be at least 0"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0; it must be above 0"),
        ({"loss_type": "huber", "tie_threshold": 0.5}, "tie_threshold=0.5 changes nothing in loss_type 'huber'"),
        ({"tie_threshold": 0.5, "margin": 1.0}, "margin=1.0 changes nothing with tie_threshold"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardLoss(**options)
