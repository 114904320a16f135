"""The cascade against softmax over the dense mask in fp64: values, gradients, how kernels are called, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.sequences import Example, Segment, TreeGeometry, pack, tree_attention
from rlhf_lightning.sequences import cascade as operator
from rlhf_lightning.sequences.cascade import cascade
from tests.helpers import dense_mask

SIZE = 8
SCALE = 0.3


def draw_forest(seed: int, depth: int = 5, longest: int = 6) -> TreeGeometry:
    """A forest of three trees, down to ``depth`` levels, with segments of 1 to ``longest`` tokens."""
    rng = np.random.default_rng(seed)

    def draw_tree(levels: int) -> Segment:
        number = int(rng.integers(2, 4)) if levels > 1 and rng.random() < 0.6 else 0
        children = [draw_tree(levels - 1) for _ in range(number)]
        return Segment(rng.integers(1, 99, size=int(rng.integers(1, longest + 1))), children=children)

    return pack([Example(f"rows:{n}", draw_tree(depth)) for n in range(3)]).geometry


def chain(depth: int) -> Segment:
    """A tree of ``depth`` levels: every segment on the way down has a sibling."""
    children = (Segment([8] * depth), chain(depth - 1)) if depth > 1 else ()
    return Segment([depth] * (1 + depth % 3), children=children)


def forest(*trees: Segment) -> TreeGeometry:
    return pack([Example(f"rows:{n}", tree) for n, tree in enumerate(trees)]).geometry


FORESTS: dict[str, Callable[[], TreeGeometry]] = {
    "one-token": lambda: forest(Segment([1])),
    "one-sequence": lambda: forest(Segment([1] * 7)),
    "sequences": lambda: forest(Segment([1] * 3), Segment([2]), Segment([3] * 5)),
    "segments-of-one-token": lambda: forest(Segment([1], children=(Segment([2]), Segment([3]))), Segment([4])),
    "pair-between-sequences": lambda: forest(
        Segment([1] * 4), Segment([2] * 5, children=(Segment([3] * 2), Segment([4] * 6))), Segment([5] * 3)
    ),
    "group": lambda: forest(Segment([1] * 9, children=[Segment([2 + n] * (1 + n)) for n in range(8)])),
    # Two rows of one prompt: their common beginning is laid out once.
    "shared-prefix": lambda: forest(
        Segment([1, 2, 3], children=(Segment([4]), Segment([5, 6]))), Segment([1, 2, 3], children=(Segment([7] * 4),))
    ),
    **{f"depth-{depth}": lambda depth=depth: forest(chain(depth), Segment([9] * 4)) for depth in (2, 3, 4, 5)},
    **{f"drawn-{seed}": lambda seed=seed: draw_forest(seed) for seed in range(6)},
}


def states(tree: TreeGeometry, heads: int = 4, kv_heads: int = 2, **options: Any) -> list[Tensor]:
    """Queries, keys and values of a forest."""
    generator = torch.Generator().manual_seed(0)
    size, options = len(tree.subtree_end), {"dtype": torch.float64, **options}
    return [torch.randn(size, each, SIZE, generator=generator, **options) for each in (heads, kv_heads, kv_heads)]


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over a dense mask."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value), scores.logsumexp(dim=-1)


def check(tree: TreeGeometry, window: int | None, heads: int = 4, kv_heads: int = 2) -> None:
    given = [each.requires_grad_() for each in states(tree, heads, kv_heads)]
    slope = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, lse = cascade(*given, *tree.stretches(window), SCALE)
    expected, expected_lse = dense(*given, dense_mask(tree, window))
    assert not lse.requires_grad
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)
    assert torch.allclose(lse, expected_lse, rtol=0, atol=1e-10)
    found = torch.autograd.grad(out, given, slope)
    for one, other in zip(found, torch.autograd.grad(expected, given, slope), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("name", FORESTS)
def test_is_softmax_over_the_dense_mask(name: str, window: int | None) -> None:
    check(FORESTS[name](), window)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_heads_are_grouped(heads: tuple[int, int], window: int | None) -> None:
    check(FORESTS["depth-3"](), window, *heads)


@pytest.mark.slow
def test_many_forests() -> None:
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        tree = draw_forest(seed + 50, depth=int(rng.integers(1, 7)), longest=int(rng.integers(1, 12)))
        check(tree, None if seed % 2 else int(rng.integers(1, 20)))


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_finite_differences(window: int | None) -> None:
    tree = forest(Segment([1] * 2, children=(Segment([2]), Segment([3] * 2))), Segment([4] * 2))
    given = [each[..., :2].contiguous().requires_grad_() for each in states(tree, heads=2, kv_heads=1)]
    assert torch.autograd.gradcheck(lambda *each: cascade(*each, *tree.stretches(window), SCALE)[0], given)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_well_formed(window: int | None, dtype: torch.dtype) -> None:
    tree = FORESTS["depth-3"]()
    given = [each.requires_grad_() for each in states(tree, dtype=dtype)]
    given[0] = given[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # strides of some layers
    found = torch.library.opcheck(cascade, (*given, *tree.stretches(window), SCALE))
    assert set(found.values()) == {"SUCCESS"}


def test_nothing_is_differentiated_where_nothing_needs_a_gradient() -> None:
    tree = FORESTS["group"]()
    query, key, value = states(tree)
    assert not cascade(query, key, value, *tree.stretches(None), SCALE)[0].requires_grad
    out, _ = cascade(query, key, value.requires_grad_(), *tree.stretches(None), SCALE)
    expected, _ = dense(query, key, value, dense_mask(tree))
    [found], [wanted] = (torch.autograd.grad(each.square().sum(), [value]) for each in (out, expected))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 4])
def test_half_precision_is_rounding_away(window: int | None) -> None:
    tree = draw_forest(3)
    given = [each.requires_grad_() for each in states(tree, dtype=torch.bfloat16)]
    exact = [each.detach().double().requires_grad_() for each in given]
    out, lse = cascade(*given, *tree.stretches(window), SCALE)
    expected, _ = dense(*exact, dense_mask(tree, window))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    found, wanted = (torch.autograd.grad(each.sum(), leaves) for each, leaves in ((out, given), (expected, exact)))
    for one, other in [(out, expected), *zip(found, wanted, strict=True)]:
        assert one.dtype == torch.bfloat16
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-2


# How torch's kernels are called.


class FlashAttention:
    """Computes torch's flash attention on the CPU, from its arguments alone.

    Like the kernels, it writes rows within the bounds only: 0 and infinity for queries without keys, and gradients of 0
    for keys without queries. Everything else is nan.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name, run in (("forward", self.forward), ("backward", self.backward)):
            schema = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema
            monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{name}", self.taking(schema, name, run))

    def taking(self, schema: Any, name: str, run: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            positional = [each.name for each in schema.arguments if not each.kwarg_only]
            assert kwargs.keys() <= {each.name for each in schema.arguments if each.kwarg_only}
            given = {**dict(zip(positional, args, strict=True)), **kwargs}
            assert given["dropout_p"] == 0
            assert given["cum_seq_q"].dtype == given["cum_seq_k"].dtype == torch.int32
            return run(given)

        return call

    def pairs(self, given: dict[str, Any]) -> Iterator[tuple[slice, slice, Tensor]]:
        left, right = given["window_size_left"], given["window_size_right"]
        right = 0 if given["is_causal"] else right
        bounds = given["cum_seq_q"].tolist(), given["cum_seq_k"].tolist()
        assert len(bounds[0]) == len(bounds[1])
        assert max(np.diff(bounds[0])) == given["max_q"]
        assert max(np.diff(bounds[1])) == given["max_k"]
        for n in range(len(bounds[0]) - 1):
            rows, columns = (slice(*each[n : n + 2]) for each in bounds)
            shape = rows.stop - rows.start, columns.stop - columns.start
            # The last query is aligned with the last key.
            ahead = torch.arange(shape[1])[None] - (torch.arange(shape[0])[:, None] + shape[1] - shape[0])
            visible = torch.ones(shape, dtype=torch.bool)
            visible &= ahead <= right if right >= 0 else visible
            visible &= -ahead <= left if left >= 0 else visible
            yield rows, columns, visible

    def scores(self, given: dict[str, Any], rows: slice, columns: slice, visible: Tensor) -> tuple[Tensor, ...]:
        query, key, value = given["query"][rows], given["key"][columns], given["value"][columns]
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * given["scale"]
        return query, key, value, scores.masked_fill(~visible, -math.inf)

    def forward(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        assert given["return_debug_mask"] is False
        query = given["query"]
        out = torch.full_like(query, math.nan)
        lse = query.new_full((query.shape[1], query.shape[0]), math.nan)
        for rows, columns, visible in self.pairs(given):
            out[rows], lse[:, rows] = 0, math.inf
            if visible.numel():
                *_, value, scores = self.scores(given, rows, columns, visible)
                out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
                lse[:, rows] = scores.logsumexp(-1)
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def backward(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        assert given["grad_out"].is_contiguous()
        assert given["logsumexp"].is_contiguous()
        found = [torch.full_like(given[name], math.nan) for name in ("query", "key", "value")]
        kv_heads = given["key"].shape[1]
        for rows, columns, visible in self.pairs(given):
            found[0][rows] = found[1][columns] = found[2][columns] = 0
            if not visible.numel():
                continue
            query, key, value, scores = self.scores(given, rows, columns, visible)
            slope, out = given["grad_out"][rows], given["out"][rows]
            weights = (scores - given["logsumexp"][:, rows, None]).exp()
            delta = (slope * out).sum(-1).T[..., None]
            of_scores = weights * (torch.einsum("qhd,khd->hqk", slope, value) - delta) * given["scale"]
            found[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, key)
            of_keys = torch.einsum("hqk,qhd->khd", of_scores, query), torch.einsum("hqk,qhd->khd", weights, slope)
            found[1][columns], found[2][columns] = (each.unflatten(1, (kv_heads, -1)).sum(2) for each in of_keys)
        return tuple(found)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("name", FORESTS)
def test_flash_attention_is_called_as_it_works(name: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "plain_forward", operator.flash_forward)
    monkeypatch.setattr(operator, "plain_backward", operator.flash_backward)
    tree = FORESTS[name]()
    flash = FlashAttention(monkeypatch)
    check(tree, window)
    stretches = tree.stretches(window)
    number = len(stretches.bounds) // 2
    assert flash.calls == ["forward"] * number + ["backward"] * number
    assert stretches.window is None or number == 1


def test_flash_attention_takes_these_arguments() -> None:
    tree = FORESTS["depth-3"]()
    query, key, value = (each.to("meta", torch.bfloat16) for each in states(tree))
    for window in (None, 3):
        bounds, longest, key_index, cut = tree.stretches(window)
        calls = operator._calls([each.to("meta") for each in bounds], longest, cut, SCALE)
        keys, values = operator._chosen(key, value, None if key_index is None else key_index.to("meta"))
        for call in calls:
            out, lse = operator.flash_forward(query, keys, values, call)
            assert (out.shape, lse.shape, lse.dtype) == (query.shape, (query.shape[1], len(query)), torch.float32)
            found = operator.flash_backward(out, query, keys, values, out, lse, call)
            assert [each.shape for each in found] == [query.shape, keys.shape, values.shape]


# Memory.


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, every memory once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = run()  # held, so that no storage is freed and its place used again
    assert held is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("rows", "prompt", "completion", "number"), [(64, 120, 150, 2), (4, 2000, 590, 8), (1, 2000, 390, 64)]
)
@pytest.mark.parametrize("window", [None, 128])
def test_keys_are_kept_once(rows: int, prompt: int, completion: int, number: int, window: int | None) -> None:
    segments: list[tuple[int, int, int]] = []
    for _ in range(rows):
        root, start = len(segments), sum(length for _, length, _ in segments)
        segments.append((start, prompt, -1))
        segments += [(start + prompt + n * completion, completion, root) for n in range(number)]
    tree = TreeGeometry(segments)
    size, heads, kv_heads, head_size = len(tree.subtree_end), 16, 8, 128
    assert 26_000 < size < 28_000
    made = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    query, key, value = (torch.empty(size, each, head_size, **made) for each in (heads, kv_heads, kv_heads))
    stretches = tree.stretches(window)
    kept = kept_bytes(lambda: cascade(query, key, value, *stretches, SCALE))
    of_queries, of_keys, of_lse = 2 * size * heads * head_size, 2 * size * kv_heads * head_size, 4 * size * heads
    # Queries are given; the output has their size.
    assert kept <= of_queries + 1.3 * (2 * of_keys + of_queries + of_lse)


def test_under_autocast_only_half_precision_is_kept() -> None:
    """Rotary embeddings leave queries and keys in single precision; they are cast before anything is kept."""
    tree = draw_forest(1)
    query, key, value = (each.transpose(0, 1)[None] for each in states(tree, dtype=torch.float32))
    given = [query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = tree_attention(nn.Module(), *given, None, tree=tree, kernel="cascade", scaling=SCALE)
        kept = kept_bytes(lambda: tree_attention(nn.Module(), *given, None, tree=tree, kernel="cascade"))
    assert out.dtype == torch.bfloat16
    half = sum(2 * each.numel() for each in (query, key, value, out))
    bounds = tree.stretches(None).bounds[0].untyped_storage().nbytes()
    assert kept == half + 4 * query.numel() // SIZE + bounds
    exact = [each[0].transpose(0, 1).detach().bfloat16().double() for each in given]
    expected, _ = dense(*exact, dense_mask(tree))
    assert float((out[0] - expected).detach().norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("rows", [1, 50])
def test_launches_do_not_grow_with_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forest of prompts with completions: two calls of the kernel and their merge."""
    launched: list[str] = []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                launched.append(func.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(operator, "plain_forward", operator.flash_forward)
    tree = forest(*(Segment([n] * 5, children=(Segment([1] * 3), Segment([2] * 4))) for n in range(rows)))
    query, key, value = (each.to("meta", torch.bfloat16) for each in states(tree))
    bounds, longest, _, _ = tree.stretches(None)
    bounds = [each.to("meta") for each in bounds]
    with Launches():
        cascade._init_fn(query, key, value, bounds, longest, None, None, SCALE)
    assert launched.count("_flash_attention_forward.default") == 2
    assert len(launched) <= 11, launched
