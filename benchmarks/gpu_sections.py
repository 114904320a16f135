"""Sections of ``gpu.py`` that measure one piece at a time: attention, the head, decoding, copies and waits.

Legend: T tokens, H heads, K key/value heads, S head size, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Left = Callable[[], float]
OURS = "ours"


class Row(NamedTuple):
    """A row of the final table."""

    what: str
    side: str
    found: str


class Pieces(NamedTuple):
    """Sizes of the pieces.

    Args:
        forests: prompts, completions of each, tokens of a prompt and of a completion.
        heads: H, K and S.
        heads_of_logits: N, D and V of the head.
        pair: tokens of a prompt and of each completion of a pair, in the count of copies.
        rows: prompts and samples in decoding, and tokens of each sample.
    """

    forests: dict[str, tuple[int, int, int, int]]
    heads: tuple[int, int, int]
    heads_of_logits: tuple[tuple[int, int, int], ...]
    pair: int
    rows: tuple[int, int, int]


ON_CARD = Pieces(
    {
        "80 pairs, 100 + 2 x 120": (80, 2, 100, 120),
        "8 x (200 + 8 x 500)": (6, 8, 200, 500),
        "8 x (2000 + 8 x 500)": (4, 8, 2000, 500),
        "64 x (2000 + 400)": (1, 64, 2000, 400),
        "68 rows of 400": (68, 1, 100, 300),
    },
    (16, 8, 128),
    ((8192, 1024, 151_936), (16_384, 1024, 151_936), (8192, 4096, 151_936)),
    64,
    (8, 8, 128),
)
REHEARSED = Pieces({"2 pairs": (2, 2, 5, 6)}, (4, 2, 16), ((32, 16, 64),), 4, (2, 2, 12))


def synchronize(device: str) -> None:
    """Waits for a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str, times: int = 3) -> tuple[float, float]:
    """Milliseconds of the first call, whose shapes are new, and of the best later one."""
    found = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - start))
    return found[0], min(found[1:])


def peak_gib(run: Callable[[], Any], device: str) -> float:
    """GiB that a call allocates at most, above what there is; 0 on a CPU."""
    if device != "cuda":
        run()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of a difference, relative to the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def guarded(what: str, side: str, measure: Callable[[], str], left: Left) -> Row:
    """A row of the table, whatever happens."""
    if left() < 5:
        row = Row(what, side, "no time left")
    else:
        try:
            row = Row(what, side, measure())
        except Exception as error:  # a failing piece must not keep the others from running
            row = Row(what, side, f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:160]}")
    print(*row, sep=" | ", flush=True)
    return row


def forest(sizes: tuple[int, int, int, int], device: str) -> Any:
    """The geometry of prompts with completions, whose lengths differ by up to a fifth."""
    from rlhf_lightning.sequences import Example, Segment, pack

    prompts, completions, of_prompt, of_completion = sizes
    draw = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        return draw.integers(3, 60, size=int(length * draw.uniform(0.8, 1.2)) + 1)

    def tree() -> Segment:
        return Segment(tokens(of_prompt), children=tuple(Segment(tokens(of_completion)) for _ in range(completions)))

    examples = [Example(str(n), tree()) for n in range(prompts)]
    return pack(examples, device=torch.device(device)).geometry


def described(run: Callable[[], list[Tensor]], device: str, exact: list[Tensor] | None = None) -> str:
    """Time and memory of a call, and how far its results are from exact ones."""
    first, later = timed(run, device)
    found = f"{later:.2f} ms (first {first:.0f}), peak {peak_gib(run, device):.2f} GiB"
    if exact is None:
        return found
    return f"{found}, {max(apart(*pair) for pair in zip(run(), exact, strict=True)):.1e} apart"


def attended(kernel: Any, dtype: torch.dtype, states: list[Tensor], geometry: Any) -> list[Tensor]:
    """The output of a layer's attention, and the gradients of its sum."""
    from rlhf_lightning.sequences.tree_attention import tree_attention

    leaves = [state.to(dtype).requires_grad_() for state in states]
    out, _ = tree_attention(nn.Module(), *leaves, None, tree=geometry, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def attention(device: str, pieces: Pieces, left: Left) -> Iterator[Row]:
    """The kernels of the packed layout, forward and backward of one layer, and how far they are from blocks in fp32."""
    heads, shared, size = pieces.heads
    # FlexAttention has no backward pass on CPUs.
    kernels = ("blocks", "cascade", "flex") if device == "cuda" else ("blocks", "cascade")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, sizes in pieces.forests.items():
        geometry = forest(sizes, device)
        length = len(geometry.subtree_end)
        draw = torch.Generator(device).manual_seed(0)
        states = [torch.randn(1, n, length, size, device=device, generator=draw) for n in (heads, shared, shared)]
        exact = attended("blocks", torch.float32, states, geometry)
        for kernel in kernels:
            run = partial(attended, kernel, dtype, states, geometry)
            yield guarded(f"attention, {name}", kernel, partial(described, run, device, exact), left)


def fused_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool) -> list[Tensor]:
    """Gradients of hidden states and weight through the fused head."""
    from rlhf_lightning.models import OutputHead, fused_logprobs

    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    stats = fused_logprobs(leaves[0], OutputHead(leaves[1]), targets, entropy=entropy)
    loss = stats.logprobs.sum() + (stats.entropy.sum() if entropy else 0)
    return list(torch.autograd.grad(loss, leaves))


def full_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The same through cross-entropy of all logits in fp32."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = -nn.functional.cross_entropy((leaves[0] @ leaves[1].T).float(), targets, reduction="sum")
    return list(torch.autograd.grad(loss, leaves))


def head(device: str, pieces: Pieces, left: Left) -> Iterator[Row]:
    """The fused head and cross-entropy of full logits, forward and backward, and how far their gradients are apart."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for rows, size, vocabulary in pieces.heads_of_logits:
        draw = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(rows, size, device=device, generator=draw).to(dtype)
        weight = (torch.randn(vocabulary, size, device=device, generator=draw) * size**-0.5).to(dtype)
        targets = torch.randint(vocabulary, (rows,), device=device, generator=draw)
        what, given = f"head, {rows} x {size} x {vocabulary}", (hidden, weight, targets)
        full = partial(full_gradients, *given)
        yield guarded(what, "full logits", partial(described, full, device), left)
        exact = full()
        yield guarded(
            what, "fused", partial(described, partial(fused_gradients, *given, entropy=False), device, exact), left
        )
        del exact
        yield guarded(
            what, "fused, entropy", partial(described, partial(fused_gradients, *given, entropy=True), device), left
        )


def decoding(device: str, pieces: Pieces, folder: Path, left: Left) -> Iterator[Row]:
    """Tokens per second of the engine by its cache, with the time of a step and the storage of the cache."""
    from transformers import AutoModelForCausalLM

    from rlhf_lightning.inference import LocalEngine, SamplingParams

    prompts, samples, limit = pieces.rows
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    draw = np.random.default_rng(0)
    given = [draw.integers(3, 60, size=int(size)).tolist() for size in draw.integers(limit // 4, limit, size=prompts)]

    def measure(cache: Any, top_p: float) -> str:
        params = SamplingParams(max_new_tokens=limit, min_new_tokens=limit, seed=0, top_p=top_p)
        engine = LocalEngine(model, None, cache=cache)
        engine.generate(given, samples, SamplingParams(max_new_tokens=12, min_new_tokens=12, seed=1))
        engine.clear_cache()
        before = engine.statistics()
        engine.generate(given, samples, params)
        after = engine.statistics()
        seconds = after["decode_seconds"] - before["decode_seconds"]
        steps = after["steps"] - before["steps"]
        tokens = prompts * samples * limit
        return (
            f"{tokens / seconds:,.0f} tokens/s, {1e3 * seconds / steps:.2f} ms a step, "
            f"{after['cache_bytes'] / 2**20:,.1f} MiB of cache"
        )

    for cache in ("dynamic", "static", "paged", "int8"):
        yield guarded(f"decoding, {prompts * samples} rows", cache, partial(measure, cache, 1.0), left)
    for cache in ("dynamic", "static"):
        yield guarded(f"decoding, {prompts * samples} rows, top_p", cache, partial(measure, cache, 0.9), left)


# Names of a profiler's events: copies, waits, launches.
_COUNTED = {
    "copies to the device": ("Memcpy HtoD",),
    "copies to the host": ("Memcpy DtoH",),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
    "operators": ("aten::",),
}


def copies(device: str, pieces: Pieces, folder: Path, left: Left) -> Iterator[Row]:
    """Copies, waits and launches of a micro-batch, by torch's profiler: a step of three less one of two."""
    for method in ("sft", "dpo"):
        measure = partial(_per_micro_batch, method, device, pieces, folder)
        yield guarded(f"{method}, per micro-batch", OURS, measure, left)


def _per_micro_batch(method: str, device: str, pieces: Pieces, folder: Path) -> str:
    two, three = (_profiled(method, device, pieces, folder, count) for count in (2, 3))
    more = {what: three[what] - two[what] for what in _COUNTED}
    once = {what: two[what] - 2 * more[what] for what in _COUNTED}
    return ", ".join(f"{more[what]} {what} ({once[what]} a step)" for what in _COUNTED)


def _profiled(method: str, device: str, pieces: Pieces, folder: Path, micro_batches: int) -> Counter[str]:
    """Counts the events of a second step."""
    import lightning
    from torch.profiler import ProfilerActivity, profile

    from rlhf_lightning import DPOModule, SFTModule
    from rlhf_lightning.sequences import Example, ExampleBatch, Segment
    from tests.invariance.harness import Batches

    size, draw = pieces.pair, np.random.default_rng(0)
    branches = 1 if method == "sft" else 2

    def example(name: str) -> Example:
        children = tuple(Segment(draw.integers(3, 60, size=size), np.ones(size)) for _ in range(branches))
        return Example(name, Segment(draw.integers(3, 60, size=size), children=children))

    # Rows of one size, so that each micro-batch has four of them.
    rows = ExampleBatch([example(str(n)) for n in range(4 * micro_batches)])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    profiler = profile(activities=activities)

    class Second(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if number == 1:
                profiler.__enter__()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if number == 1:
                synchronize(device)
                profiler.__exit__(None, None, None)

    made = SFTModule if method == "sft" else DPOModule
    module = made(str(folder), micro_batch_tokens=4 * (1 + branches) * size)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_steps=2,
        num_sanity_val_steps=0,
        callbacks=[Second()],
        **quiet,
    )
    trainer.fit(module, Batches(rows, rows))  # type: ignore[arg-type]
    found: Counter[str] = Counter()
    for event in profiler.events() or ():
        for what, names in _COUNTED.items():
            found[what] += event.name.startswith(names)
    return found
