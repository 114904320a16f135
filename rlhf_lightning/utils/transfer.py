"""Copies between host memory and a GPU, each of many arrays at once: a copy costs its latency, not its bytes.

On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Name = TypeVar("_Name", bound=Hashable)

_ALIGNMENT = 16  # bytes; kernels that read several numbers at once need no more


def to_device(arrays: Mapping[_Name, np.ndarray | Tensor], device: torch.device | str | None) -> dict[_Name, Tensor]:
    """Makes tensors of arrays, on a GPU by a single copy that the host does not wait for.

    Args:
        arrays: by name, of any shapes and dtypes that torch has; empty ones, too. Tensors of host memory are arrays.
        device: device of the tensors. On the CPU, and with ``None``, they share the arrays' memory.

    Returns:
        The tensors; on a GPU they are views of one buffer.

    Example:
        >>> to_device({"lengths": np.array([2, 3])}, "cpu")
        {'lengths': tensor([2, 3])}
    """
    device = torch.device("cpu" if device is None else device)
    hosted = {name: a if isinstance(a, Tensor) else torch.from_numpy(a) for name, a in arrays.items()}
    if device.type == "cpu" or not hosted:
        return hosted

    # The memory is pinned, so that the copy runs while the host continues; torch keeps it until the copy is done.
    places: dict[_Name, slice] = {}
    end = 0
    for name, tensor in hosted.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.itemsize
        places[name] = slice(start, end)
    memory = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for name, place in places.items():
        memory[place].view(hosted[name].dtype).view(hosted[name].shape).copy_(hosted[name])
    moved = memory.to(device, non_blocking=True)
    return {name: moved[place].view(hosted[name].dtype).view(hosted[name].shape) for name, place in places.items()}


def to_host(tensors: Mapping[_Name, Tensor]) -> dict[_Name, Tensor]:
    """Copies tensors to host memory, from a GPU by a single copy, which waits until they are computed.

    Args:
        tensors: by name, without gradient; those on the CPU are returned as they are.

    Returns:
        Tensors of the same names, shapes and dtypes on the CPU.

    Example:
        >>> to_host({"loss": torch.tensor(0.5)})
        {'loss': tensor(0.5000)}
    """
    remote = {name: tensor.detach() for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    if not remote:
        return dict(tensors)

    # Wide dtypes first: so every tensor begins at a multiple of its own.
    order = sorted(remote, key=lambda name: -remote[name].itemsize)
    memory = torch.cat([remote[name].contiguous().view(-1).view(torch.uint8) for name in order]).cpu()
    sizes = [remote[name].numel() * remote[name].itemsize for name in order]
    found = dict(zip(order, memory.split(sizes), strict=True))
    return {
        name: found[name].view(tensor.dtype).view(tensor.shape) if name in found else tensor
        for name, tensor in tensors.items()
    }


def count_index(index: Tensor, size: int) -> Tensor:
    """Counts how often each number below ``size`` occurs: as ``bincount``, for which the host waits on a GPU.

    Args:
        index: whole numbers, at least 0 and below ``size``.
        size: number of counts.

    Example:
        >>> count_index(torch.tensor([0, 2, 2]), 4).tolist()
        [1, 0, 2, 0]
    """
    return index.new_zeros(size).index_add(0, index, torch.ones_like(index))
