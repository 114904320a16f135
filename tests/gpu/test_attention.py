"""The registered attention's kernels on the device, against softmax over the dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_lightning.sequences import (
    ATTENTION_KERNELS,
    AttentionKernel,
    Example,
    Segment,
    TreeGeometry,
    pack,
    tree_attention,
)
from tests.helpers import dense_mask

HEADS, KV_HEADS, SIZE = 4, 2, 16


def forest(scale: int) -> TreeGeometry:
    def segment(count: int, *children: Segment) -> Segment:
        return Segment([1] * (scale * count), children=children)

    trees = [segment(6, segment(7), segment(4, segment(3), segment(2, segment(5)))), segment(9), segment(1)]
    return pack([Example(f"rows:{n}", tree) for n, tree in enumerate(trees)]).geometry


def on(device: torch.device, scale: int) -> TreeGeometry:
    tree = forest(scale)
    return TreeGeometry(tree.segments, device)


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weight = scores.exp() * visible
    total = weight.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return ((weight / total) @ v).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(None, None, False), (5, None, True), (None, 1.5, False)]
)
@pytest.mark.parametrize("scale", [1, 40])
def test_forward_and_gradient(
    scale: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    kernel: AttentionKernel,
    device: torch.device,
) -> None:
    if device.type == "cpu" and scale > 1:
        pytest.skip("long trees are for GPUs: several blocks of 128 tokens")
    tree = on(device, scale)
    size = len(tree.subtree_end)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    backward = not (kernel == "flex" and device.type == "cpu")  # torch has none there
    leaves = [draw(1, heads, size, SIZE).requires_grad_(backward) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    sinks = draw(HEADS) if with_sinks else None
    slope = draw(1, size, HEADS, SIZE)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sinks64 = None if sinks is None else sinks.double()
    expected = dense(*exact, dense_mask(tree, window).to(device), softcap, sinks64)
    options: dict[str, Any] = {"scaling": 0.3, "tree": tree, "sliding_window": window, "softcap": softcap}
    options |= {"s_aux": sinks, "kernel": kernel}
    with torch.set_grad_enabled(backward):
        found, _ = tree_attention(nn.Module(), *leaves, None, **options)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-4
    if backward:
        pulled = torch.autograd.grad((found * slope).sum(), leaves)
        for a, b in zip(pulled, torch.autograd.grad((expected * slope).sum(), exact), strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scale", [1, 40])
def test_half_precision_is_that_of_the_cascade(scale: int, window: int | None, device: torch.device) -> None:
    """On CUDA the cascade runs torch's flash attention."""
    if device.type == "cpu" and scale > 1:
        pytest.skip("long trees are for GPUs: several blocks of 128 tokens")
    tree = on(device, scale)
    size = len(tree.subtree_end)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, size, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    leaves = [each.to(device, torch.bfloat16).requires_grad_() for each in drawn]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(*exact, dense_mask(tree, window).to(device), None, None)
    options: dict[str, Any] = {"scaling": 0.3, "tree": tree, "sliding_window": window, "kernel": "cascade"}
    found, _ = tree_attention(nn.Module(), *leaves, None, **options)
    assert "cascade" in type(found.grad_fn.next_functions[0][0]).__name__.lower()  # type: ignore[union-attr]
    slope = torch.randn(found.shape, generator=generator).to(device)
    pulled = torch.autograd.grad((found * slope).sum(), leaves)
    wanted = torch.autograd.grad((expected * slope).sum(), exact)
    for a, b in [(found, expected), *zip(pulled, wanted, strict=True)]:
        assert float((a - b).detach().norm() / b.detach().norm()) < 2e-2
