"""The fused log-prob head on the device: values, gradients and memory compared with those of full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.models import OutputHead, cpu_logprob_tiles, fused_logprobs, gpu_logprob_chunks


def draw(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator).to(device)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fused_logprobs(hidden, OutputHead(weight), targets).logprobs


@pytest.mark.parametrize(
    ("dtype", "value", "slope"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-4, 0.02)],
)
def test_full_logits(
    dtype: torch.dtype, value: float, slope: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_ROWS", 64)  # several tiles in both directions, the last ones smaller
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_COLUMNS", 256)
    monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 64 * 1000 * 4)
    hidden, weight, targets = draw(150, 64, 1000, dtype, device)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    found, expected = fused(hidden, weight, targets), full(exact[0], exact[1], targets)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < value
    pull = torch.linspace(-1, 1, len(found), device=device, dtype=torch.float64)
    pulled = torch.autograd.grad((found * pull.to(found)).sum(), (hidden, weight))
    for a, b in zip(pulled, torch.autograd.grad((expected * pull).sum(), exact), strict=True):
        assert a.dtype == dtype
        assert float((a - b).norm() / b.norm()) < slope


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that anything has made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.most = max([self.most, *sizes])
        return made


def bytes_of(function: Callable[[], Tensor], device: torch.device) -> int:
    """Forward and backward: on CUDA the peak above what was there, on the CPU the largest tensor."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function().sum().backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Largest() as largest:
        function().sum().backward()
    return largest.most


def test_memory_is_below_that_of_full_logits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (16384, 1024, 65536) if device.type == "cuda" else (256, 16, 2048)
    if device.type == "cpu":
        monkeypatch.setattr(cpu_logprob_tiles, "TILE_ROWS", 64)
        monkeypatch.setattr(cpu_logprob_tiles, "TILE_COLUMNS", 256)
    taken = {}
    for name, head in (("full", full), ("fused", fused)):
        hidden, weight, targets = draw(*sizes, torch.bfloat16, device)
        taken[name] = bytes_of(lambda h=head, a=hidden, b=weight, c=targets: h(a, b, c), device)  # type: ignore[misc]
        del hidden, weight, targets
    print(f"\n{device.type}: {taken['fused'] / 2**20:,.1f} MiB fused, {taken['full'] / 2**20:,.1f} MiB full logits")
    assert taken["full"] >= 4 * sizes[0] * sizes[2]  # fp32 logits, at the least
    assert taken["fused"] < taken["full"] / 2
