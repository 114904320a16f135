"""The fused head against the whole (tokens x vocabulary) matrix: values, gradients, and what it never allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.models import (
    OutputHead,
    TokenStats,
    cpu_logprob_tiles,
    fused_head,
    fused_logprobs,
    gpu_logprob_chunks,
    output_head,
)
from rlhf_lightning.models.gpu_logprob_chunks import ChunkedLogProbs

from ..helpers import tiny_model

N, D, V, R = 37, 16, 101, 3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions, the last ones smaller."""
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_ROWS", 8)
    monkeypatch.setattr(cpu_logprob_tiles, "TILE_COLUMNS", 17)


@pytest.fixture(params=["tiles", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiles of a CPU, or the chunks of a GPU computed here: several of up to 15 rows in fp32."""
    if request.param == "chunks":
        monkeypatch.setattr(fused_head, "_implementation", lambda device: ChunkedLogProbs)
        monkeypatch.setattr(gpu_logprob_chunks, "CHUNK_BYTES", 15 * V * 4 + 3)
    return str(request.param)


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, OutputHead, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, bias, lora_in, lora_out = draw(N, D), draw(V, D), draw(V), draw(R, D), draw(V, R)
    head = OutputHead(weight, bias, lora_in, lora_out, 0.7)
    return hidden, head, torch.randint(0, V, (N,), generator=generator), [hidden, weight, bias, lora_in, lora_out]


def naive(hidden: Tensor, head: OutputHead, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    log_p = (head.logits(hidden) / temperature).log_softmax(dim=-1)
    picked = torch.stack([row[target] for row, target in zip(log_p, targets, strict=True)])
    return picked, -(log_p.exp() * log_p).sum(dim=1), log_p.mean(dim=1), log_p.exp().square().sum(dim=1).log()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Bytes of tiles that are kept for the backward pass: none, those of some rows (the last tile of a row would fit, too,
# where a larger one did not), all of them.
KEPT = pytest.mark.parametrize("kept", [0, 4000, 1 << 20])


@KEPT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.usefixtures("way")
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    softcap: float | None,
    scale: float,
    kept: int,
) -> None:
    monkeypatch.setattr(cpu_logprob_tiles, "KEPT_BYTES", kept)
    hidden, head, targets, leaves = inputs(dtype)
    head.softcap, head.scale = softcap, scale
    stats = fused_logprobs(hidden, head, targets, temperature=1.3, entropy=True, mean=True, power=True)
    expected = naive(hidden, head, targets, 1.3)
    found = stats.logprobs, stats.entropy, stats.mean_logprobs, stats.log_sum_p2
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < tolerance
    assert torch.equal(stats.correct, head.logits(hidden).argmax(dim=1) == targets)
    assert not stats.log_sum_p2.requires_grad
    generator = torch.Generator().manual_seed(9)
    coefficients = [torch.randn(N, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    sums = [sum((a * c).sum() for a, c in zip(x[:3], coefficients, strict=True)) for x in (found, expected)]
    for a, b in zip(*(torch.autograd.grad(total, leaves) for total in sums), strict=True):  # type: ignore[arg-type]
        assert error(a, b) < 4 * tolerance


@KEPT
@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"mean": True}])
@pytest.mark.usefixtures("way")
def test_each_output_has_its_own_gradient(monkeypatch: pytest.MonkeyPatch, asked: dict[str, bool], kept: int) -> None:
    monkeypatch.setattr(cpu_logprob_tiles, "KEPT_BYTES", kept)
    hidden, head, targets, leaves = inputs(torch.float64)
    stats = fused_logprobs(hidden, head, targets, **asked)
    expected = naive(hidden, head, targets, 1.0)
    place = {"entropy": 1, "mean": 2}.get(next(iter(asked), ""), 0)
    found = (stats.logprobs, stats.entropy, stats.mean_logprobs)[place]
    for a, b in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected[place].sum(), leaves), strict=True
    ):
        assert error(a, b) < 1e-12


@pytest.mark.usefixtures("way")
def test_half_precision_accumulates_in_single() -> None:
    hidden, head, targets, _ = inputs(torch.bfloat16)
    exact = naive(
        hidden.double(),
        OutputHead(*(None if t is None else t.double() for t in (head.weight, head.bias))),
        targets,
        1.0,
    )  # type: ignore[arg-type]
    stats = fused_logprobs(hidden, OutputHead(head.weight, head.bias), targets)
    assert stats.logprobs.dtype == torch.float32
    assert error(stats.logprobs.double(), exact[0]) < 1e-6
    stats.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("way")
def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [0.0]])
    stats = fused_logprobs(hidden, OutputHead(weight), torch.tensor([0, 0]), entropy=True)
    assert stats.logprobs.tolist() == [0.0, -60000.0]
    stats.logprobs.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.usefixtures("way")
def test_no_rows() -> None:
    hidden, head, _, _ = inputs(torch.float32)
    stats = fused_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.long))
    assert stats.logprobs.shape == (0,)
    stats.logprobs.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.usefixtures("way")
def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, _ = inputs(torch.float32)
    head = OutputHead(head.weight.detach())
    fused_logprobs(hidden, head, targets).logprobs.sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_are_never_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_logprob_tiles, "KEPT_BYTES", 2000)
    hidden, head, targets, _ = inputs(torch.float32)
    with Largest() as seen:
        stats: TokenStats = fused_logprobs(hidden, head, targets, entropy=True, mean=True, power=True)
        (stats.logprobs + stats.entropy).sum().backward()
    assert seen.numel <= V * D  # the weight's own gradient is the largest thing there is; logits would be N * V
    assert seen.numel < N * V


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("asked", "kept"), [({}, True), ({"entropy": True}, True), ({}, False)])
def test_kept_tiles_are_not_computed_again(monkeypatch: pytest.MonkeyPatch, asked: dict[str, bool], kept: bool) -> None:
    hidden, head, targets, _ = inputs(torch.float64)
    head = OutputHead(head.weight)
    monkeypatch.setattr(cpu_logprob_tiles, "KEPT_BYTES", N * V * 8 if kept else 0)
    with Products() as products:
        fused_logprobs(hidden, head, targets, **asked).logprobs.sum().backward()
    num_tiles = -(-N // 8) * -(-V // 17)
    assert products.count == (3 if kept else 4) * num_tiles


def test_no_more_is_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows and 17 columns: three fit; a graph that is kept for a second pass gives the same gradient."""
    hidden, head, targets, leaves = inputs(torch.float64)
    monkeypatch.setattr(cpu_logprob_tiles, "KEPT_BYTES", 3 * 8 * 17 * 8 + 8)
    total = fused_logprobs(hidden, head, targets).logprobs.sum()
    node: Any = total.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert list(node.kept_tiles) == [(0, 0), (0, 17), (0, 34)]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert not node.kept_tiles
    for a, b in zip(torch.autograd.grad(total, leaves), first, strict=True):
        assert error(a, b) < 1e-13


def test_without_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = cpu_logprob_tiles._Tiles.logits

    def spied(self: Any, rows: slice, columns: slice, *, fresh: bool = False) -> Tensor:
        asked.append(fresh)
        return plain(self, rows, columns, fresh=fresh)

    monkeypatch.setattr(cpu_logprob_tiles._Tiles, "logits", spied)
    hidden, head, targets, _ = inputs(torch.float64)
    with torch.no_grad():
        fused_logprobs(hidden, head, targets)
    fused_logprobs(hidden.detach(), OutputHead(head.weight.detach()), targets)
    assert asked
    assert not any(asked)


def test_lora_on_the_head_of_a_model() -> None:
    model = tiny_model("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    hidden = torch.randn(5, 32)
    expected = wrapped.get_base_model().lm_head(hidden)
    assert error(output_head(wrapped).logits(hidden), expected) < 1e-6
    with wrapped.disable_adapter():
        assert error(output_head(wrapped).logits(hidden), hidden @ model.lm_head.weight.T) < 1e-6


def test_a_temperature_must_be_above_zero() -> None:
    hidden, head, targets, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="temperature is 0; it must be above 0"):
        fused_logprobs(hidden, head, targets, temperature=0)
