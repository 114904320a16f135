"""The critic's loss against a loop, and explained variance against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_lightning.losses.value import explained_variance, explained_variance_sums, value_clipped, value_loss


def naive(values: list[float], old: list[float], returns: list[float], cliprange: float | None) -> list[float]:
    losses = []
    for v, o, r in zip(values, old, returns, strict=True):
        loss = (v - r) ** 2
        if cliprange is not None:
            clipped = min(max(v, o - cliprange), o + cliprange)
            loss = max(loss, (clipped - r) ** 2)
        losses.append(loss / 2)
    return losses


def draw(seed: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(n, generator=generator, dtype=torch.float64)
    values = old + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return values, old, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("cliprange", [None, 0.05, 0.2, 10.0])
def test_loss_and_clipped_share_against_a_loop(cliprange: float | None) -> None:
    values, old, returns = draw(0)
    got = value_loss(values, old_values_N=old, returns_N=returns, cliprange=cliprange)
    want = naive(values.tolist(), old.tolist(), returns.tolist(), cliprange)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    unclipped = naive(values.tolist(), old.tolist(), returns.tolist(), None)
    clipped = value_clipped(values, old_values_N=old, returns_N=returns, cliprange=cliprange)
    assert clipped.tolist() == [a > b for a, b in zip(want, unclipped, strict=True)]
    assert (clipped.sum() > 0) == (cliprange in (0.05, 0.2))


def test_gradient_is_the_error_or_nothing() -> None:
    values = torch.tensor([0.1, 0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(4, dtype=torch.float64)
    returns = torch.tensor([1.0, 1.0, 0.2, 0.3], dtype=torch.float64)
    # Within the range; moved towards the return beyond it: no gradient; overshot the return; moved away from it.
    loss = value_loss(values, old_values_N=old, returns_N=returns, cliprange=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([-0.9, 0.0, 0.3, -0.8], dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, old_values_N=old, returns_N=returns, cliprange=0.2), (values,)
    )


class TestExplainedVariance:
    def test_sums_over_any_split_give_numpys_answer(self) -> None:
        values, _, returns = draw(1)
        parts = [
            explained_variance_sums(v, returns_N=r) for v, r in zip(values.split(7), returns.split(7), strict=True)
        ]
        got = explained_variance(torch.stack(parts).sum(dim=0))
        want = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
        assert got.item() == pytest.approx(want, rel=1e-12)

    def test_precise_where_the_mean_dwarfs_the_variance(self) -> None:
        generator = torch.Generator().manual_seed(2)
        returns = 1000 + torch.randn(500, generator=generator)
        values = returns + 0.5 * torch.randn(500, generator=generator)
        wide = (returns.double(), values.double())
        want = 1 - np.var((wide[0] - wide[1]).numpy()) / np.var(wide[0].numpy())
        got = explained_variance(explained_variance_sums(values, returns_N=returns))
        assert got.item() == pytest.approx(want, rel=1e-8)

    def test_landmarks(self) -> None:
        returns = torch.tensor([1.0, 2.0, 3.0])
        for values, want in ((returns, 1.0), (torch.full((3,), 7.0), 0.0), (-returns, -3.0)):
            assert explained_variance(explained_variance_sums(values, returns_N=returns)).item() == pytest.approx(want)

    @pytest.mark.parametrize("returns", [torch.full((5,), 0.1), torch.zeros(3), torch.zeros(0)])
    def test_nan_without_variance(self, returns: torch.Tensor) -> None:
        assert explained_variance(explained_variance_sums(returns + 1, returns_N=returns)).isnan()


def test_refuses_a_range_of_zero_and_unequal_shapes() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"^cliprange is 0\.0; it must be above 0 \(0\.2 is usual\)$"):
        value_loss(one, old_values_N=one, returns_N=one, cliprange=0.0)
    with pytest.raises(ValueError, match="shape"):
        value_loss(torch.ones(2), old_values_N=one, returns_N=torch.ones(2))
