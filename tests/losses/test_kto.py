"""Unpaired losses against scalar formulas, hand-derived numbers and numerical derivatives."""

from __future__ import annotations

import math
import re

import pytest
import torch

from rlhf_lightning.losses.kto import COUPLED, LOSS_TYPES, kto_kl, kto_loss, validate_kto_loss

WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
LABELS = torch.tensor([True, False, True, False])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_is_the_papers_utility_taken_from_its_maximum(loss_type: str, dtype: torch.dtype) -> None:
    logps = torch.tensor([-3.0, -4.0, -9.0, -2.5], dtype=dtype)
    reference = torch.tensor([-5.0, -4.5, -8.0, -7.0], dtype=dtype)
    kl, expected = 0.8, []
    for ratio, label in zip((logps - reference).tolist(), LABELS.tolist(), strict=True):
        point = kl if loss_type == "kto" else 0.0
        weight = 1.3 if label else 0.6
        value = weight * sigmoid(0.2 * (ratio - point if label else point - ratio))
        expected.append(weight - value)
    losses = kto_loss(logps, reference, label_B=LABELS, kl=kl, beta=0.2, loss_type=loss_type, **WEIGHTS)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=dtype))
    assert losses.dtype == dtype


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_is_the_numerical_derivative(loss_type: str) -> None:
    logps = torch.tensor([-3.0, -4.0, -9.0, -2.5], dtype=torch.float64, requires_grad=True)
    reference = logps.detach() + torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    options = {"label_B": LABELS, "kl": 0.8, "beta": 0.7, "loss_type": loss_type} | WEIGHTS
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, reference, **options), logps)


def test_gradient_by_hand() -> None:
    # At ratio = kl, S is 1/2 and its slope 1/4: -beta w / 4 for a good completion, beta w / 4 for a bad one.
    logps = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([True, False])
    kl = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses = kto_loss(logps, logps.detach() - 2, label_B=label, kl=kl, beta=0.4, **WEIGHTS)
    assert losses.tolist() == pytest.approx([0.65, 0.3])
    losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-0.4 * 1.3 / 4, 0.4 * 0.6 / 4])
    assert kl.grad is None


def test_kl_is_the_mean_log_ratio_not_below_zero_and_without_gradient() -> None:
    policy = torch.tensor([-3.0, -5.0, -4.0], requires_grad=True)
    kl = kto_kl(policy, torch.tensor([-5.0, -6.0, -4.0]))
    assert kl.item() == 1.0
    assert not kl.requires_grad
    assert kto_kl(policy, torch.tensor([-1.0, -1.0, -1.0])).item() == 0.0
    assert kto_kl(policy, policy).item() == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_ratios_saturate(loss_type: str) -> None:
    logps = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    losses = kto_loss(logps, torch.zeros(4), label_B=LABELS, kl=0.0, beta=1.0, loss_type=loss_type)
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    losses.sum().backward()
    assert logps.grad.tolist() == [0.0] * 4


def test_only_kto_reads_the_kl() -> None:
    zeros = torch.zeros(2)
    label = torch.tensor([True, False])
    read = {
        name
        for name in LOSS_TYPES
        if not torch.equal(*(kto_loss(zeros, zeros, label_B=label, kl=kl, loss_type=name) for kl in (0.0, 1.0)))
    }
    assert read == COUPLED
    assert kto_loss(zeros, zeros, label_B=label, loss_type="apo_zero_unpaired").tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kot"}, "loss_type is 'kot'; it must be one of kto, apo_zero_unpaired; did you mean 'kto'?"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0 (0.1 is usual)"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0; it must be at least 0 (1.0 is usual)"),
        (
            {"undesirable_weight": float("inf")},
            "undesirable_weight is inf; it must be at least 0 and finite (1.0 is usual)",
        ),
        (
            {"desirable_weight": 0.0, "undesirable_weight": 0.0},
            "desirable_weight=0 and undesirable_weight=0 leave nothing to learn: set one above 0, usually 1",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_kto_loss(**({"loss_type": "kto"} | options))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_loss(torch.zeros(1), torch.zeros(1), label_B=torch.tensor([True]), kl=0.0, **options)


def test_the_loss_itself_refuses_what_it_cannot_compute() -> None:
    zeros, label = torch.zeros(2), torch.tensor([True, False])
    message = "loss_type 'kto' needs kl, got None: pass kto_kl(...), or use 'apo_zero_unpaired'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_loss(zeros, zeros, label_B=label)
    message = "label_B has dtype torch.int64: give bool, True for a desirable completion"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_loss(zeros, zeros, label_B=label.long(), kl=0.0)
    message = "logps_B has shape (2,) and label_B (1,): give all of logps_B, ref_logps_B, label_B the shape (B,)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_loss(zeros, zeros, label_B=label[:1], kl=0.0)
    message = "kl_logps_M is empty: a batch without mismatched pairs has no KL estimate; pass an earlier one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_kl(zeros[:0], zeros[:0])
    message = "kl_logps_M has shape (2,) and ref_kl_logps_M (1,): give all of kl_logps_M, ref_kl_logps_M the shape (M,)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_kl(zeros, zeros[:1])
