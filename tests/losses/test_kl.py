"""The KL estimators against 50-digit arithmetic, and their expected gradients against exact divergences."""

from __future__ import annotations

import re
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses._stable import bounded_exp
from rlhf_lightning.losses.kl import KL_ESTIMATORS, kl_per_token

getcontext().prec = 50


def exact(estimator: str, log_ratio: float) -> Decimal:
    r = Decimal(log_ratio)
    return {"k1": r, "k2": r * r / 2, "k3": (-r).exp() - 1 + r}[estimator]


def log_ratios() -> list[float]:
    magnitudes = [1e-12, 1e-9, 1e-6, 1e-3, 0.01, 0.1, 0.3, 0.4999, 0.5, 0.5001, 0.7, 1.0, 3.0, 10.0, 25.0]
    return [sign * magnitude for magnitude in magnitudes for sign in (1.0, -1.0)]


class TestValues:
    @pytest.mark.parametrize("estimator", KL_ESTIMATORS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
    def test_full_relative_precision_at_every_size(self, estimator: str, dtype: torch.dtype, tolerance: float) -> None:
        r = torch.tensor(log_ratios(), dtype=dtype)
        got = kl_per_token(r, ref_logprobs_N=torch.zeros_like(r), estimator=estimator)
        for value, log_ratio in zip(got.tolist(), r.tolist(), strict=True):
            want = exact(estimator, log_ratio)
            assert abs(Decimal(value) - want) <= Decimal(tolerance) * abs(want), log_ratio

    def test_by_hand(self) -> None:
        policy, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        # r = ln 2; k3 = 1/2 - 1 + ln 2
        for estimator, want in (("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)):
            got = kl_per_token(policy, ref_logprobs_N=ref, estimator=estimator)
            torch.testing.assert_close(got, torch.tensor([want]))

    def test_k3_is_never_negative(self) -> None:
        r = torch.linspace(-2e-3, 2e-3, 4001)
        assert (kl_per_token(r, ref_logprobs_N=torch.zeros_like(r)) >= 0).all()

    def test_ratio_multiplies_the_value(self) -> None:
        r = torch.tensor([0.5, -0.7], dtype=torch.float64)
        ratio = torch.tensor([2.0, 0.5], dtype=torch.float64)
        for estimator in KL_ESTIMATORS:
            got = kl_per_token(r, ref_logprobs_N=0 * r, estimator=estimator, importance_ratio_N=ratio)
            want = [float(exact(estimator, x)) * w for x, w in zip(r.tolist(), ratio.tolist(), strict=True)]
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


class TestGradients:
    def expected_gradient(self, logits: Tensor, ref: Tensor, estimator: str, corrected: bool) -> Tensor:
        """E over the policy's own samples of the gradient of the estimate, summed over the whole vocabulary."""
        logprobs = logits.log_softmax(0)
        ratio = (logprobs - logprobs.detach()).exp() if corrected else None
        kl = kl_per_token(logprobs, ref_logprobs_N=ref, estimator=estimator, importance_ratio_N=ratio)
        (gradient,) = torch.autograd.grad((logprobs.detach().exp() * kl).sum(), logits)
        return gradient

    @pytest.mark.parametrize(
        ("estimator", "corrected", "target"),
        [
            ("k1", False, "nothing"),
            ("k1", True, "reverse"),
            ("k2", False, "reverse"),
            ("k2", True, "square"),
            ("k3", False, "forward"),
            ("k3", True, "reverse"),
        ],
    )
    def test_table_of_expected_gradients(self, estimator: str, corrected: bool, target: str) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
        ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
        logprobs = logits.log_softmax(0)
        divergence = {
            "nothing": 0 * logits.sum(),
            "reverse": (logprobs.exp() * (logprobs - ref)).sum(),
            "forward": (ref.exp() * (ref - logprobs)).sum(),
            "square": (logprobs.exp() * (logprobs - ref).square() / 2).sum(),
        }[target]
        (want,) = torch.autograd.grad(divergence, logits)
        got = self.expected_gradient(logits, ref, estimator, corrected)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("estimator", KL_ESTIMATORS)
    def test_gradcheck_on_both_sides_of_the_series(self, estimator: str) -> None:
        r = torch.tensor([-3.0, -0.6, -0.4, -1e-3, 0.2, 0.49, 0.51, 4.0], dtype=torch.float64, requires_grad=True)
        ratio = torch.linspace(0.5, 2, 8, dtype=torch.float64, requires_grad=True)

        def function(r: Tensor, ratio: Tensor) -> Tensor:
            return kl_per_token(r, ref_logprobs_N=0 * r.detach(), estimator=estimator, importance_ratio_N=ratio)

        assert torch.autograd.gradcheck(function, (r, ratio))

    @pytest.mark.parametrize("estimator", KL_ESTIMATORS)
    def test_extreme_log_ratios_stay_finite(self, estimator: str) -> None:
        r = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], requires_grad=True)
        kl = kl_per_token(r, ref_logprobs_N=torch.zeros(5), estimator=estimator)
        (gradient,) = torch.autograd.grad(kl.sum(), r)
        assert kl.isfinite().all()
        assert gradient.isfinite().all()
        if estimator == "k3":
            assert gradient[0] < -1e12  # pulls back as strongly as at the bound, where a clamp would have let go
            assert gradient[2] == 0
            torch.testing.assert_close(gradient[3:], torch.ones(2))


def test_bounded_exp_is_exp_up_to_its_bound_and_a_line_beyond() -> None:
    x = torch.tensor([-800.0, -1.0, 0.0, 29.0, 30.0, 31.0, 32.0], dtype=torch.float64)
    got = bounded_exp(x)
    torch.testing.assert_close(got[:5], x[:5].exp())
    torch.testing.assert_close(got[6] - got[5], got[4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "k4"}, r"kl estimator is 'k4'; it must be one of k1, k2, k3"),
        ({"ref_logprobs_N": torch.zeros(1)}, r"ref_logprobs_N has shape \(1,\)|logprobs_N has shape"),
    ],
)
def test_refusals_are_one_line(arguments: dict[str, object], message: str) -> None:
    call = {"ref_logprobs_N": torch.zeros(3), **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        kl_per_token(torch.zeros(3), **call)
    assert not re.search(r"\n", str(caught.value))
