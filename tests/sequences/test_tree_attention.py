"""The attention's kernels against softmax on the dense mask, the definition of a packed forest's geometry."""

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
from rlhf_lightning.sequences.tree_attention import _folded
from tests.helpers import dense_mask

HEADS, KV_HEADS, SIZE = 4, 2, 8


def geometry() -> TreeGeometry:
    def leaf(count: int) -> Segment:
        return Segment([1] * count)

    inner = Segment([1] * 4, children=(leaf(3), Segment([1] * 2, children=(leaf(5), leaf(1)))))
    trees = [Segment([1] * 6, children=(leaf(7), inner, leaf(2))), leaf(9), leaf(1), leaf(8)]
    return pack([Example(f"rows:{n}", tree) for n, tree in enumerate(trees)]).geometry


def naive(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None, sinks: Tensor | None, scale: float
) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weight = scores.exp() * visible
    total = weight.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return ((weight / total) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention(window: int | None, softcap: float | None, with_sinks: bool, kernel: AttentionKernel) -> None:
    tree = geometry()
    size = len(tree.subtree_end)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if kernel != "flex" else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = draw(1, HEADS, size, SIZE), draw(1, KV_HEADS, size, SIZE), draw(1, KV_HEADS, size, SIZE)
    sinks = draw(HEADS) if with_sinks else None
    options = {"scaling": 0.3, "tree": tree, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    options["kernel"] = kernel
    expected = naive(q, k, v, dense_mask(tree, window), softcap, sinks, 0.3)
    if kernel == "flex":  # no backward pass on the CPU
        with torch.no_grad():
            found, _ = tree_attention(nn.Module(), q, k, v, None, **options)
        assert torch.allclose(found, expected, atol=1e-5)
        return
    for leaf in (q, k, v):
        leaf.requires_grad_()
    expected = naive(q, k, v, dense_mask(tree, window), softcap, sinks, 0.3)
    found, _ = tree_attention(nn.Module(), q, k, v, None, **options)
    assert torch.allclose(found, expected, atol=1e-12)
    slope = torch.randn(found.shape, generator=generator, dtype=dtype)
    for a, b in zip(
        torch.autograd.grad((found * slope).sum(), (q, k, v)),
        torch.autograd.grad((expected * slope).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-11)


def test_depth_counts_along_the_path() -> None:
    tree = Segment([1, 2], children=(Segment([3]), Segment([4], children=(Segment([5, 6]),))))
    batch = pack([Example("rows:0", tree), Example("rows:1", Segment([7, 8]))])
    assert batch.geometry.depth.tolist() == batch.position_ids.tolist() == [0, 1, 2, 2, 3, 4, 0, 1]


def test_dropout_zero_and_one_forward_without_a_tree() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, HEADS, 5, SIZE, generator=generator) for _ in range(3))
    for kernel in ATTENTION_KERNELS:
        found, weights = tree_attention(nn.Module(), q, k, v, None, kernel=kernel)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        assert torch.allclose(found, expected, atol=1e-6)
        assert weights is None


def test_cudnn_plans_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would plan every new shape; the setting of other models is kept."""
    seen: list[bool] = []

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    tree = geometry()
    states = torch.zeros(1, HEADS, len(tree.subtree_end), SIZE)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            tree_attention(nn.Module(), states, states, states, None, tree=tree, kernel="blocks")
            tree_attention(nn.Module(), states, states, states, None)
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask_heads", [None, 1, 6])
def test_folded_queries_are_those_over_repeated_keys(
    length: int, with_sinks: bool, softcap: float | None, mask_heads: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((2, 6, length, 8), generator=generator, dtype=torch.float64)
    key, value = torch.randn((2, 2, 2, 11, 8), generator=generator, dtype=torch.float64)
    sinks = torch.randn(6, generator=generator, dtype=torch.float64) if with_sinks else None
    mask = None
    if mask_heads is not None:
        mask = torch.rand((2, mask_heads, length, 11), generator=generator) < 0.7
        mask[..., 0] = True
    found = _folded(query, key, value, mask, 0.3, softcap, sinks)

    scores = torch.einsum("nhqd,nhcd->nhqc", query, key.repeat_interleave(3, dim=1)) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    expected = torch.einsum("nhqc,nhcd->nhqd", weights / total, value.repeat_interleave(3, dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
