"""The few collectives that the modules need; each does nothing in a single process.

Under FSDP2 each begins with ``meet``, since ranks may still be in the middle of different numbers of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..models.lockstep import lockstep, meet
from ..models.sharding import copies_of

Scores = dict[str, Tensor]


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Adds counts up over all ranks."""
    if world_size() == 1:
        return dict(values)
    meet()
    vector = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return value
    meet()
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_scores(scores: Scores, device: torch.device) -> Scores:
    """Concatenates the rows of all ranks, also of none: ``{name: (E_rank, ...)} -> {name: (E, ...)}``."""
    if world_size() == 1:
        return scores
    meet()
    parts: list[Scores] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, {name: value.cpu() for name, value in scores.items()})
    filled = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in filled]).to(device) for name in (filled[0] if filled else ())}


def gather_objects(value: Any) -> list[Any]:
    """Collects one small picklable object per rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    meet()
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def rows_before_this_rank(count: int) -> int:
    """Where this rank's rows begin in what ``gather_scores`` returns."""
    if world_size() == 1:
        return 0
    meet()
    counts = [0] * world_size()
    dist.all_gather_object(counts, count)
    return sum(counts[: dist.get_rank()])


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the values of the first; sharded tensors have one value already."""
    if world_size() == 1:
        return
    meet()
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.data, src=0)


def concatenate(parts: Iterable[Scores]) -> Scores:
    """Concatenates rows: ``[{name: (e, ...)}] -> {name: (E, ...)}``."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def sum_gradients(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
    """Adds gradients up over all ranks, in flat buckets; sharded parameters have their part of the sum already.

    Losses are divided by global totals before the backward pass, so the sum is the gradient of the global batch,
    however many micro-batches each rank ran, none included. A parameter without gradient counts as zero, and one that
    has none on any rank keeps none, so that an optimizer leaves it alone as it would on one rank.
    """
    if world_size() == 1:
        return
    meet()
    agreement = lockstep()
    if agreement is not None:
        agreement.drop_unreached()
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not whole:
        return
    used = torch.tensor([parameter.grad is not None for parameter in whole], device=whole[0].device).int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    bucket: list[Tensor] = []

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
        bucket.clear()

    for parameter in (parameter for parameter, count in zip(whole, used.tolist(), strict=True) if count):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and bucket[0].dtype != parameter.grad.dtype:
            flush()
        bucket.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in bucket) >= bucket_bytes:
            flush()
    flush()


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down so that their global norm is at most ``limit``; returns the norm that they had.

    Args:
        parameters: those without gradient count as 0; sharded and whole ones may be mixed.
        limit: above 0; infinite to leave them as they are.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, limit).detach()
    grads: list[Any] = [parameter.grad for parameter in parameters]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    dtype = torch.promote_types(local[0].dtype, torch.float32)
    # Parts may lie in host memory; what is added up over ranks lies where they compute.
    device = next(torch.device(grad.device_mesh.device_type) for grad in grads if isinstance(grad, DTensor))
    # Shards are added up over the ranks, each of their copies for its part, so that all ranks find the same number;
    # what is whole is the same on each, and counts once.
    squares = [part.to(dtype).square().sum().to(device) for part in local]
    squares = [s / copies_of(g) if isinstance(g, DTensor) else s for s, g in zip(squares, grads, strict=True)]
    total = squares[0].new_zeros(())
    sharded = sum((s for s, grad in zip(squares, grads, strict=True) if isinstance(grad, DTensor)), total.clone())
    whole = sum((s for s, grad in zip(squares, grads, strict=True) if not isinstance(grad, DTensor)), total)
    meet()
    dist.all_reduce(sharded)
    norm: Tensor = (sharded + whole).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for part in local:
        part.mul_(factor.to(part))
    return norm
