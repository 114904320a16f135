"""The few collectives that the modules need; each does nothing in a single process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Scores = dict[str, Tensor]


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Adds counts up over all ranks."""
    if world_size() == 1:
        return dict(values)
    vector = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


def gather_scores(scores: Scores, device: torch.device) -> Scores:
    """Concatenates the rows of all ranks, also of none: ``{name: (E_rank, ...)} -> {name: (E, ...)}``."""
    if world_size() == 1:
        return scores
    parts: list[Scores] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, {name: value.cpu() for name, value in scores.items()})
    filled = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in filled]).to(device) for name in (filled[0] if filled else ())}


def gather_objects(value: Any) -> list[Any]:
    """Collects one small picklable object per rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def rows_before_this_rank(count: int) -> int:
    """Where this rank's rows begin in what ``gather_scores`` returns."""
    if world_size() == 1:
        return 0
    counts = [0] * world_size()
    dist.all_gather_object(counts, count)
    return sum(counts[: dist.get_rank()])


def concatenate(parts: Iterable[Scores]) -> Scores:
    """Concatenates rows: ``[{name: (e, ...)}] -> {name: (E, ...)}``."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def sum_gradients(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
    """Adds gradients up over all ranks, in flat buckets; a parameter without gradient counts as zero.

    Losses are divided by global totals before the backward pass, so the sum is the gradient of the global batch,
    however many micro-batches each rank ran, none included.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
        bucket.clear()

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and bucket[0].dtype != parameter.grad.dtype:
            flush()
        bucket.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in bucket) >= bucket_bytes:
            flush()
    flush()
