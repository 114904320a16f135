"""Reference-free preference losses against scalar formulas, hand-derived numbers and numerical derivatives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses._stable import log1mexp
from rlhf_lightning.losses.simpo import (
    LOSS_TYPES,
    NLL_WEIGHTS,
    NORMALIZERS,
    SMOOTHED,
    alphapo_reward,
    simpo_loss,
    validate_simpo_loss,
)

BETA, GAMMA, ALPHA, EPSILON = 0.7, 0.4, 0.3, 0.2


def log_loss(x: float, epsilon: float = 0.0) -> float:
    return (1 - epsilon) * math.log(1 + math.exp(-x)) + epsilon * math.log(1 + math.exp(x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


# From the sums (s, t) and the means (a, b) of the chosen and the rejected completion's log-probs.
SCALAR: dict[str, Callable[[float, float, float, float], float]] = {
    "simpo": lambda s, t, a, b: log_loss(BETA * a - BETA * b - GAMMA, EPSILON),
    "alphapo": lambda s, t, a, b: log_loss(
        BETA / ALPHA * (math.exp(b) ** -ALPHA - math.exp(a) ** -ALPHA) - GAMMA, EPSILON
    ),
    "cpo": lambda s, t, a, b: log_loss(BETA * (s - t), EPSILON),
    "cpo_hinge": lambda s, t, a, b: max(0.0, 1 - BETA * (s - t)),
    "cpo_ipo": lambda s, t, a, b: (a - b - 1 / (2 * BETA)) ** 2,
    "orpo": lambda s, t, a, b: BETA * log_loss(math.log(odds(a) / odds(b))),
}
LENGTHS = {"chosen_lengths": torch.tensor([3, 1, 4, 2]), "rejected_lengths": torch.tensor([2, 2, 5, 1])}


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(-4 * torch.rand(2, 4, generator=generator, dtype=torch.float64) - 0.1)


def loss_of(loss_type: str, chosen: Tensor, rejected: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    smoothing = EPSILON if loss_type in SMOOTHED else 0.0
    defaults = {"beta": BETA, "gamma": GAMMA, "alpha": ALPHA, "label_smoothing": smoothing} | LENGTHS
    return simpo_loss(chosen, rejected, loss_type=loss_type, **(defaults | options))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_is_that_of_the_scalar_formula(loss_type: str) -> None:
    chosen, rejected = draw()
    preference, nll = loss_of(loss_type, chosen, rejected)
    rows = zip(chosen.tolist(), rejected.tolist(), *(length.tolist() for length in LENGTHS.values()), strict=True)
    expected = [SCALAR[loss_type](s, t, s / m, t / n) for s, t, m, n in rows]
    torch.testing.assert_close(preference, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(nll, -chosen)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_is_the_numerical_derivative(loss_type: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in draw()]
    torch.autograd.gradcheck(lambda *logps: loss_of(loss_type, *logps), leaves)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("simpo", math.log(1 + math.exp(GAMMA))),
        ("alphapo", math.log(1 + math.exp(GAMMA))),
        ("cpo", math.log(2)),
        ("cpo_hinge", 1.0),
        ("cpo_ipo", 1 / (4 * BETA**2)),
        ("orpo", BETA * math.log(2)),
    ],
)
def test_value_where_both_completions_are_equally_likely(loss_type: str, expected: float) -> None:
    logps = torch.full((4,), -2.0, dtype=torch.float64)
    preference, _ = loss_of(loss_type, logps, logps, rejected_lengths=LENGTHS["chosen_lengths"], label_smoothing=0.0)
    assert preference.tolist() == pytest.approx([expected] * 4, rel=1e-12)


def test_alphapo_with_alpha_0_is_simpo_and_approaches_it() -> None:
    pair = draw()
    simpo, _ = loss_of("simpo", *pair)
    assert torch.equal(loss_of("alphapo", *pair, alpha=0.0)[0], simpo)
    torch.testing.assert_close(loss_of("alphapo", *pair, alpha=1e-7)[0], simpo, rtol=1e-6, atol=0)


def test_alphapo_rewards_by_hand() -> None:
    # p = 1/4: (1 - 4^a) / a.
    logps = torch.tensor([0.25], dtype=torch.float64).log()
    for alpha, expected in ((0.5, -2.0), (1.0, -3.0), (-0.5, -1.0), (-1.0, -0.75)):
        assert alphapo_reward(logps, alpha).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_margins_stay_finite_in_fp32(loss_type: str) -> None:
    values = torch.tensor([-1e4, -100.0, -1.0, -1e-6, 0.0])
    chosen, rejected = (column.clone().requires_grad_() for column in torch.cartesian_prod(values, values).T)
    ones = torch.ones(len(chosen))
    preference, nll = loss_of(loss_type, chosen, rejected, chosen_lengths=ones, rejected_lengths=ones)
    (preference.sum() + nll.sum()).backward()
    for tensor in (preference, nll, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()


def test_log1mexp_is_accurate_from_end_to_end() -> None:
    x = -torch.logspace(-6, 1.9, 50, dtype=torch.float64)
    # In fp64, log(1 - e^x) by way of expm1 and of log1p is exact to rounding on its own side of -log 2.
    expected = [math.log(-math.expm1(v)) if v > -0.6931 else math.log1p(-math.exp(v)) for v in x.tolist()]
    expected_fp32 = [
        math.log(-math.expm1(v)) if v > -0.6931 else math.log1p(-math.exp(v)) for v in x.float().double().tolist()
    ]
    torch.testing.assert_close(log1mexp(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(log1mexp(x.float()), torch.tensor(expected_fp32), rtol=2e-6, atol=0)
    torch.autograd.gradcheck(log1mexp, -torch.tensor([0.1, 0.69, 0.7, 3.0], dtype=torch.float64).requires_grad_())


def test_normalizers_and_the_papers_weights_of_the_likelihood() -> None:
    assert dict(NORMALIZERS) == {"preference": "pairs", "nll": "chosen_tokens"}
    papers = {"simpo": 0.0, "alphapo": 0.0, "cpo": 1.0, "cpo_hinge": 1.0, "cpo_ipo": 1.0, "orpo": 1.0}
    assert dict(NLL_WEIGHTS) == papers


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_smoothing_changes_the_losses_said_to_read_it(loss_type: str) -> None:
    plain, smoothed = (loss_of(loss_type, *draw(), label_smoothing=epsilon)[0] for epsilon in (0.0, 0.1))
    assert torch.equal(plain, smoothed) == (loss_type not in SMOOTHED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "sinpo"},
            "loss_type is 'sinpo'; it must be one of simpo, alphapo, cpo, cpo_hinge, cpo_ipo, orpo; "
            "did you mean 'simpo'?",
        ),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0 (2.0 is usual)"),
        ({"loss_type": "cpo", "beta": -1.0}, "beta is -1.0; it must be above 0 (0.1 is usual)"),
        ({"gamma": -0.5}, "gamma is -0.5; it must be at least 0 (1.0 is usual)"),
        ({"alpha": 11.0}, "alpha=11.0 is outside [-10, 10]: 0 is SimPO, 0.25 is usual"),
        (
            {"label_smoothing": -0.1},
            "label_smoothing is -0.1; it must be in [0, 0.5) (0 is off; else the rate of wrong labels)",
        ),
        (
            {"loss_type": "orpo", "label_smoothing": 0.1},
            "label_smoothing=0.1 changes nothing in loss_type 'orpo': set it to 0, or use one of alphapo, cpo, simpo",
        ),
        ({"nll_weight": -1.0}, "nll_weight is -1.0; it must be at least 0 (0.0 is usual)"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_simpo_loss(**({"loss_type": "simpo"} | options))


def test_the_loss_itself_refuses_what_it_cannot_compute() -> None:
    chosen, rejected = draw()
    with pytest.raises(ValueError, match=r"^beta is 0; it must be above 0 \(2\.0 is usual\)$"):
        loss_of("simpo", chosen, rejected, beta=0)
    message = (
        "chosen_logps has shape (4,) and rejected_logps (3,): give all of chosen_logps, rejected_logps, "
        "chosen_lengths, rejected_lengths the shape (P,)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss_of("simpo", chosen, rejected[:3])
