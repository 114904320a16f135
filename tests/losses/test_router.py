"""The load-balancing loss against numbers derived by hand and against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_lightning.losses.router import load_balancing_loss, router_sums


def test_by_hand() -> None:
    # Two tokens of one router with probabilities (3/4, 1/4) and (1/5, 4/5), where the second counts three times:
    # f = (1/4, 3/4), P = ((3/4 + 3/5) / 4, (1/4 + 12/5) / 4) = (27/80, 53/80), L = 2 (27/320 + 159/320).
    logits = torch.tensor([[3.0, 1.0], [1.0, 4.0]], dtype=torch.float64).log()
    sums = router_sums([logits], torch.tensor([1, 3]), top_k=1)
    assert sums.choices_E.tolist() == [1.0, 3.0]
    assert float(load_balancing_loss(sums)) == pytest.approx(2 * (27 + 159) / 320, abs=1e-12)


@pytest.mark.parametrize(("used", "expected"), [("alike", 2.0), ("two alone", 6.0)])
def test_bounds(used: str, expected: float) -> None:
    """K where all six experts are used alike, E where the same two always are."""
    first = torch.arange(6) if used == "alike" else torch.zeros(6, dtype=torch.long)
    logits = torch.full((6, 6), -40.0).scatter(1, torch.stack([first, (first + 1) % 6], dim=1), 40.0)
    sums = router_sums([logits, logits], torch.ones(6), top_k=2)
    assert float(load_balancing_loss(sums)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_has_the_same_loss_and_gradient(top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(3, 4 * 7, 5, generator=generator).requires_grad_()
    mask = torch.rand(4, 7, generator=generator) < 0.7
    expected = load_balancing_loss_func(tuple(logits), 5, top_k, mask.long())
    (expected_slopes,) = torch.autograd.grad(expected, logits)
    loss = load_balancing_loss(router_sums(logits, mask.flatten(), top_k=top_k))
    (slopes,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes, expected_slopes)


def test_a_weight_is_a_number_of_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, counts = torch.randn(9, 4, generator=generator).double(), torch.arange(9) % 4
    weighted = load_balancing_loss(router_sums([logits], counts, top_k=2))
    repeated = load_balancing_loss(router_sums([logits.repeat_interleave(counts, dim=0)], torch.ones(12), top_k=2))
    torch.testing.assert_close(weighted, repeated, rtol=1e-12, atol=0)


def test_shares_of_parts_add_up_to_the_loss_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(2, 11, 4, generator=generator).double().requires_grad_(), torch.arange(11) % 3
    whole = router_sums(logits, weights, top_k=2)
    expected = load_balancing_loss(whole)
    parts = [router_sums(logits[:, a:b], weights[a:b], top_k=2) for a, b in ((0, 1), (1, 6), (6, 11))]
    total = parts[0] + parts[1] + parts[2]
    shares = sum(load_balancing_loss(part, total) for part in parts)
    assert isinstance(shares, torch.Tensor)
    torch.testing.assert_close(shares, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(shares, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0], rtol=1e-12, atol=1e-15)
    # The mean of the parts' own losses, as of micro-batches that know nothing of one another, is something else.
    own = torch.stack([load_balancing_loss(part) for part in parts[1:]]).mean()
    assert abs(float((own - expected).detach())) > 1e-3


def test_counts_are_exact_beyond_what_fp32_can_tell_apart() -> None:
    sums = router_sums([torch.tensor([[1.0, 0.0]]).expand(3, 2)], torch.tensor([2.0**25, 1.0, 1.0]), top_k=1)
    assert sums.choices_E.tolist() == [2.0**25 + 2, 0.0]
    assert float(sums.weight) == 2.0**25 + 2


def test_no_router_has_no_loss() -> None:
    with pytest.raises(ValueError, match="at least one"):
        router_sums([], torch.ones(3), top_k=1)
