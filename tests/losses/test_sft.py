"""Supervised losses against full distributions in plain Python."""

from __future__ import annotations

import math
import re

import pytest
import torch

from rlhf_lightning.losses.sft import dft, nll, sft_loss, smooth, validate_sft_loss


def test_smoothing_is_the_cross_entropy_with_the_mixed_target() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets, epsilon = [2, 0, 4, 1], 0.15
    logprobs_NV = logits.log_softmax(-1)
    losses = sft_loss(
        logprobs_NV[torch.arange(4), targets], mean_logprobs_N=logprobs_NV.mean(-1), label_smoothing=epsilon
    )
    expected, gradient = [], []
    for row, target in zip(logits.tolist(), targets, strict=True):
        total = sum(math.exp(value) for value in row)
        wanted = [epsilon / 5 + (1 - epsilon) * (v == target) for v in range(5)]
        expected.append(-sum(q * (value - math.log(total)) for q, value in zip(wanted, row, strict=True)))
        # The derivative of a cross-entropy by its logits: what is predicted less what is wanted.
        gradient.append([math.exp(value) / total - q for q, value in zip(wanted, row, strict=True)])
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64))


def test_nll_and_smoothing_by_hand() -> None:
    logprobs = torch.tensor([-0.5, -2.0])
    assert nll(logprobs).tolist() == [0.5, 2.0]
    assert sft_loss(logprobs).tolist() == [0.5, 2.0]
    assert smooth(torch.tensor([0.5]), torch.tensor([-4.5]), 0.25).item() == 0.75 * 0.5 + 0.25 * 4.5
    assert torch.equal(sft_loss(logprobs, mean_logprobs_N=torch.full((2,), float("nan"))), nll(logprobs))


def test_dft_has_the_gradient_of_minus_the_probability() -> None:
    logprobs = torch.tensor([math.log(0.5), math.log(0.01), -200.0], dtype=torch.float64, requires_grad=True)
    losses = sft_loss(logprobs, loss_type="dft")
    assert losses.tolist() == pytest.approx([0.5 * math.log(2), 0.01 * math.log(100), 200 * math.exp(-200)])
    losses.sum().backward()
    expected = torch.autograd.grad(-logprobs.exp().sum(), logprobs)[0]
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-12, atol=0)
    assert torch.equal(losses, dft(logprobs))


def test_extreme_logprobs_stay_finite() -> None:
    logprobs = torch.tensor([-1e4, 0.0], requires_grad=True)
    for loss_type in ("nll", "dft"):
        losses = sft_loss(logprobs, loss_type=loss_type)
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "nl"}, "loss_type is 'nl'; it must be one of nll, dft; did you mean 'nll'?"),
        (
            {"loss_type": "nll", "label_smoothing": 1.0},
            "label_smoothing=1.0 is outside [0, 1): 0.1 is usual, 0 is off",
        ),
        (
            {"loss_type": "dft", "label_smoothing": 0.1},
            "label_smoothing=0.1 has no meaning for loss_type 'dft': set it to 0 or use 'nll'",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_sft_loss(**options)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sft_loss(torch.zeros(2), **options)


def test_smoothing_refuses_a_missing_or_misshapen_mean() -> None:
    message = "label_smoothing=0.1 needs mean_logprobs_N, the mean log-prob over the vocabulary: pass it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sft_loss(torch.zeros(2), label_smoothing=0.1)
    message = (
        "logprobs_N has shape (2,) and mean_logprobs_N (2, 1): give all of logprobs_N, mean_logprobs_N the shape (N,)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sft_loss(torch.zeros(2), mean_logprobs_N=torch.zeros(2, 1), label_smoothing=0.1)
