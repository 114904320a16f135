"""Collectives of the modules; each is a no-op in a single process.

Under FSDP2 each begins with ``barrier``, since ranks may still be running different numbers of micro-batches. All but
``copy_from_first_rank`` exchange host memory, and no device is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..utils.transfer import to_host
from .host_group import host_group
from .lockstep import barrier

Rows = dict[str, Tensor]  # per-example tensors: the first dimension is the example
Metrics = dict[str, Tensor]  # logged values by name


def world_size() -> int:
    """Returns the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums counts over all ranks."""
    if world_size() == 1:
        return dict(values)
    barrier()
    # fp64, since counts of tokens exceed the whole numbers that fp32 represents.
    vector = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    dist.all_reduce(vector, group=host_group())
    return dict(zip(values, vector.tolist(), strict=True))


def sum_vector_over_ranks(vector: Tensor) -> Tensor:
    """Sums a vector over all ranks, in fp64."""
    if world_size() == 1:
        return vector
    barrier()
    total = vector.to("cpu", torch.float64, copy=True)
    dist.all_reduce(total, group=host_group())
    return total.to(vector.device, vector.dtype)


def max_over_ranks(value: int) -> int:
    """Returns the maximum over all ranks."""
    if world_size() == 1:
        return value
    barrier()
    largest = torch.tensor(value, dtype=torch.int64, device="cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=host_group())
    return int(largest)


def gather_rows(rows: Rows) -> Rows:
    """Concatenates the rows of all ranks, which may have none: ``{name: (E_rank, ...)} -> {name: (E, ...)}``.

    Args:
        rows: of this rank, on any device.

    Returns:
        Rows in host memory, to which a GPU's come in one copy.
    """
    hosted = to_host(rows)
    if world_size() == 1:
        return hosted
    barrier()
    parts: list[Rows] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, hosted, group=host_group())
    # Ranks without rows do not know the names.
    filled = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in filled]) for name in (filled[0] if filled else ())}


def gather_objects(value: Any) -> list[Any]:
    """Collects one small picklable object per rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    barrier()
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value, group=host_group())
    return parts


def rank_prefix() -> str:
    """Returns ``"rank 1: "`` as a prefix of messages in one of several processes; empty in a single process."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK"))
    return f"rank {rank}: " if rank is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def is_peer_loss(error: RuntimeError) -> bool:
    """Returns whether an error comes from a collective that another rank has left."""
    said = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")
    return isinstance(error, dist.DistError) or any(sign in said for sign in signs)


def rows_before_this_rank(count: int) -> int:
    """Returns the offset of this rank's rows in the result of ``gather_rows``."""
    if world_size() == 1:
        return 0
    barrier()
    counts = [0] * world_size()
    dist.all_gather_object(counts, count, group=host_group())
    return sum(counts[: dist.get_rank()])


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Broadcasts tensors from rank 0 in place; sharded tensors are the same on all ranks already."""
    if world_size() == 1:
        return
    barrier()
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.data, src=0)


def concatenate(parts: Iterable[Rows]) -> Rows:
    """Concatenates rows: ``[{name: (e, ...)}] -> {name: (E, ...)}``."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
