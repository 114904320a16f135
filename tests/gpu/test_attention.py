"""Both registered attentions on the device, against softmax over the dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_lightning.sequences import Example, Segment, pack
from rlhf_lightning.sequences.flex_attention import flex_tree_attention
from rlhf_lightning.sequences.tree_attention import TreeGeometry, tree_attention
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
@pytest.mark.parametrize("attention", [tree_attention, flex_tree_attention])
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(None, None, False), (5, None, True), (None, 1.5, False)]
)
@pytest.mark.parametrize("scale", [1, 40])
def test_forward_and_gradient(
    scale: int, window: int | None, softcap: float | None, with_sinks: bool, attention: Any, device: torch.device
) -> None:
    if device.type == "cpu" and scale > 1:
        pytest.skip("long trees are for GPUs: several blocks of 128 tokens")
    tree = on(device, scale)
    size = len(tree.subtree_end)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    backward = not (attention is flex_tree_attention and device.type == "cpu")  # torch has none there
    leaves = [draw(1, heads, size, SIZE).requires_grad_(backward) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    sinks = draw(HEADS) if with_sinks else None
    slope = draw(1, size, HEADS, SIZE)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sinks64 = None if sinks is None else sinks.double()
    expected = dense(*exact, dense_mask(tree, window).to(device), softcap, sinks64)
    options = {"scaling": 0.3, "tree": tree, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    with torch.set_grad_enabled(backward):
        found, _ = attention(nn.Module(), *leaves, None, **options)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-4
    if backward:
        pulled = torch.autograd.grad((found * slope).sum(), leaves)
        for a, b in zip(pulled, torch.autograd.grad((expected * slope).sum(), exact), strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3
