"""Chunks of rows, as on a GPU: rounding in half precision, launches, waiting, memory; computed on the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.models import (
    OutputHead,
    TokenStats,
    cpu_logprob_tiles,
    fused_head,
    fused_logprobs,
    gpu_logprob_chunks,
)
from rlhf_lightning.models.cpu_logprob_tiles import TiledLogProbs
from rlhf_lightning.models.gpu_logprob_chunks import ChunkedLogProbs

from ..gpu.pretended import Pretended, pretended_cuda

N, D, V, R = 45, 32, 301, 4
ALL = {"entropy": True, "mean": True, "power": True}


@pytest.fixture(autouse=True)
def four_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """12, 12, 12 and 9 rows in fp32."""
    monkeypatch.setattr(fused_head, "_implementation", lambda device: ChunkedLogProbs)
    monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 12 * V * 4)


def draw(dtype: torch.dtype, *parts: str) -> tuple[Tensor, OutputHead, Tensor, list[Tensor]]:
    """Hidden states, a head with some parts, targets, and the leaves of both."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (V, D), "bias": (V,), "lora_in": (R, D), "lora_out": (V, R)}
    names = ["weight", *(name for name in shapes if name.partition("_")[0] in parts)]
    sizes = [(N, D), *(shapes[name] for name in names)]
    leaves = [(0.7 * torch.randn(size, generator=generator)).to(dtype) for size in sizes]
    for leaf in leaves:
        leaf.requires_grad_()
    extra: dict[str, Any] = {"softcap": 5.0, "scale": 0.5} if "softcap" in parts else {}
    head = OutputHead(**dict(zip(names, leaves[1:], strict=True)), lora_scaling=0.7, **extra)
    return leaves[0], head, torch.randint(0, V, (N,), generator=generator), leaves


def total(stats: TokenStats) -> Tensor:
    """A number to which every row contributes with another weight and sign."""
    pull = torch.linspace(-1, 1, N).to(stats.logprobs.device)
    return (pull * stats.logprobs + pull.flip(0) * stats.entropy + pull.square() * stats.mean_logprobs).sum()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


PARTS = [(), ("bias",), ("lora",), ("softcap",), ("bias", "lora", "softcap")]


def test_a_cpu_has_tiles_and_other_devices_have_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert fused_head._implementation(torch.device("cpu")) is TiledLogProbs
    assert fused_head._implementation(torch.device("cuda", 1)) is ChunkedLogProbs


@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"mean": True}, ALL], ids=lambda asked: "+".join(asked))
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_the_tiles_of_a_cpu(parts: tuple[str, ...], asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, leaves = draw(torch.float32, *parts)
    found = fused_logprobs(hidden, head, targets, temperature=0.8, **asked)
    monkeypatch.setattr(fused_head, "_implementation", lambda device: TiledLogProbs)
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_COLUMNS", 128)
    expected = fused_logprobs(hidden, head, targets, temperature=0.8, **asked)
    assert torch.equal(found.correct, expected.correct)
    for name in ("logprobs", *(n for n in ("entropy", "mean_logprobs", "log_sum_p2") if asked.get(n.split("_")[0]))):
        assert error(getattr(found, name), getattr(expected, name)) < 2e-6
    weights = {"logprobs": 1.0, "entropy": 2.0 * bool(asked.get("entropy")), "mean_logprobs": 3.0 * ("mean" in asked)}
    sums = [sum((w * getattr(s, n)).sum() for n, w in weights.items() if w) for s in (found, expected)]
    for a, b in zip(*(torch.autograd.grad(s, leaves) for s in sums), strict=True):  # type: ignore[arg-type]
        assert error(a, b) < 4e-6


def exact_gradient(hidden: Tensor, head: OutputHead, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In fp64, from the same values: hidden states, weight, the gradient of the logits, and the statistics' sum."""
    wide = [t.detach().double() for t in (hidden, head.weight)]
    logits = (wide[0] @ wide[1].T).requires_grad_()
    log_p = logits.log_softmax(dim=1)
    mean, entropy = log_p.mean(dim=1), -(log_p.exp() * log_p).sum(dim=1)
    picked = log_p.gather(1, targets[:, None])[:, 0]
    value = total(TokenStats(picked, picked, entropy, mean, picked))
    (grad,) = torch.autograd.grad(value, logits)
    return wide[0], wide[1], grad, value


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_rounds_gradients_twice(dtype: torch.dtype, unit: float) -> None:
    """The gradient G of the logits is rounded once, by a relative ``unit`` at most, before it is multiplied, and the
    product once more: ``|dH - G W| <= unit |G| |W| + unit |G W|``, element by element; sums in fp32 add 2^-20 or so.
    Below its normal numbers fp16 rounds by 2^-25, here of 4096 / 10: no coefficient of a row is above 10."""
    hidden, head, targets, leaves = draw(dtype)
    found = fused_logprobs(hidden, head, targets, **ALL)
    states, weight, grad, value = exact_gradient(hidden, head, targets)
    assert found.logprobs.dtype == torch.float32
    assert float((total(found).double() - value).detach().abs() / value.detach().abs()) < 1e-6
    for a, factors in zip(torch.autograd.grad(total(found), leaves), ((grad, weight), (grad.T, states)), strict=True):
        assert a.dtype == dtype
        exact, size = factors[0] @ factors[1], factors[0].abs() @ factors[1].abs()
        least = 2.0**-25 * (1 + 10 / 4096 * factors[1].abs().sum(dim=0)) if dtype == torch.float16 else 0.0
        assert ((a.double() - exact).abs() <= (unit * (1 + unit) + 2**-20) * size + unit * exact.abs() + least).all()


def test_small_gradients_do_not_vanish_in_fp16() -> None:
    """At 1e-4 / V they are below the smallest number of fp16, but together they are as large as the target's."""
    generator = torch.Generator().manual_seed(1)
    weight = (1 + 0.1 * torch.randn(4096, D, generator=generator)).half().requires_grad_()
    hidden = (0.1 * torch.randn(8, D, generator=generator)).half().requires_grad_()
    targets = torch.arange(8)
    fused_logprobs(hidden, OutputHead(weight), targets).logprobs.mul(1e-4).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = (wide[0] @ wide[1].T).log_softmax(dim=1)[torch.arange(8), targets].mul(1e-4).sum()
    assert hidden.grad is not None
    assert error(hidden.grad, torch.autograd.grad(expected, wide)[0]) < 5e-3


def test_overflows_are_passed_on_in_fp16() -> None:
    """A gradient scaler looks for them."""
    hidden, head, targets, leaves = draw(torch.float16)
    value = fused_logprobs(hidden, head, targets).logprobs.mul(torch.inf).sum()
    assert not all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(value, leaves))


def test_a_gradient_of_zero_stays_zero_in_fp16() -> None:
    hidden, head, targets, leaves = draw(torch.float16)
    value = fused_logprobs(hidden, head, targets).logprobs.mul(0.0).sum()
    assert not any(bool(grad.any()) for grad in torch.autograd.grad(value, leaves))


def test_an_adapter_in_fp32_on_a_weight_in_half_precision() -> None:
    """Its gradients, and that of a bias, are those of the logits in fp32, which are not rounded."""
    hidden, head, targets, _ = draw(torch.bfloat16, "bias", "lora")
    assert head.bias is not None
    assert head.lora_in is not None
    assert head.lora_out is not None
    small = [t.detach().float().requires_grad_() for t in (head.bias, head.lora_in, head.lora_out)]
    head.bias, head.lora_in, head.lora_out = small
    found = torch.autograd.grad(fused_logprobs(hidden, head, targets).logprobs.square().sum(), small)
    exact = [t.detach().double().requires_grad_() for t in (head.weight, *small)]
    wide = OutputHead(exact[0], exact[1], exact[2], exact[3], 0.7)
    log_p = wide.logits(hidden.detach().double()).log_softmax(dim=1).gather(1, targets[:, None])
    for a, b in zip(found, torch.autograd.grad(log_p.square().sum(), exact[1:]), strict=True):
        assert error(a, b) < 2e-6


def test_a_graph_that_is_kept_gives_the_same_bits_again() -> None:
    hidden, head, targets, leaves = draw(torch.float32, *PARTS[-1])
    value = total(fused_logprobs(hidden, head, targets, **ALL))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves, retain_graph=True)
    anew = torch.autograd.grad(total(fused_logprobs(hidden, head, targets, **ALL)), leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, anew, strict=True))


class Operators(TorchDispatchMode):
    """Counts operators that compute, ones that make the host wait for the device, and the elements of the largest."""

    WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "bincount", "equal", "is_nonzero", "unique")
    FREE = "empty detach view alias slice select unsqueeze t transpose permute unbind as_strided"

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits = 0
        self.largest = 0

    @property
    def launches(self) -> int:
        return sum(n for name, n in self.counts.items() if name not in self.FREE.split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        masked = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        self.waits += masked or name.lstrip("_").startswith(self.WAITS) or name in self.WAITS
        made = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor))])
        return made


def counted(parts: tuple[str, ...], asked: dict[str, bool], dtype: torch.dtype = torch.bfloat16) -> Operators:
    """Forward and backward on the pretended device."""
    hidden, head, targets, _ = draw(dtype, *parts)
    with pretended_cuda():
        there = {n: t.detach().to("cuda").requires_grad_() for n, t in vars(head).items() if isinstance(t, Tensor)}
        placed = OutputHead(**{**vars(head), **there})
        states, ids = hidden.detach().to("cuda").requires_grad_(), targets.to("cuda")
        with Operators() as seen:
            stats = fused_logprobs(states, placed, ids, **asked)
            (stats.logprobs.sum() + stats.entropy.sum() + stats.mean_logprobs.sum()).backward()
        assert states.grad is not None
        assert bool(states.grad.isfinite().all())
    return seen


@pytest.mark.parametrize("asked", [{}, ALL], ids=["logprobs", "all"])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_few_launches_and_no_waiting(
    parts: tuple[str, ...], asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a copy to the host")

    with monkeypatch.context() as patches:
        patches.setattr(Pretended, "cpu", refuse)
        seen = counted(parts, asked)
    assert seen.waits == 0
    monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 6 * V * 4)
    more = counted(parts, asked)
    per_chunk = (more.launches - seen.launches) / 4  # eight chunks instead of four
    assert per_chunk <= (16 if not parts and not asked else 45)
    assert seen.launches - 4 * per_chunk <= 80  # whatever the number of chunks


def test_waiting_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "_implementation", lambda device: TiledLogProbs)
    assert counted((), {}).waits > 0


def test_no_more_than_a_chunk_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 12 * V * 4)
    hidden, head, targets, _ = draw(torch.float32, "bias", "softcap")
    narrow = hidden.detach()[:, :8].requires_grad_()
    head.weight = head.weight.detach()[:, :8].requires_grad_()  # its gradient is smaller than a chunk
    with Operators() as seen:
        total(fused_logprobs(narrow, head, targets, **ALL)).backward()
    assert 8 * V < seen.largest <= 12 * V
