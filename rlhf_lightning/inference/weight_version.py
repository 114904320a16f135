"""A fingerprint of a model's weights, which tells whether keys and values computed earlier are still theirs."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Values of each tensor that are read.
_SAMPLES = 16
# State of adapters outside of tensors.
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def weight_version(model: nn.Module) -> bytes:
    """Returns a fingerprint that changes when a weight, a buffer or the state of an adapter does.

    It covers where tensors are, how often torch has changed them in place, and some of their values: changes through
    ``.data`` are not counted by torch, and reach every value in practice. It reads the device once.

    Args:
        model: the model, bare or with adapters around it.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> before = weight_version(layer)
        >>> before == weight_version(layer)
        True
        >>> layer.weight.data.mul_(2).sum() is None, before == weight_version(layer)
        (False, False)
    """
    parts: list[Any] = []
    values: list[Tensor] = []
    for tensor in chain(model.parameters(), model.buffers()):
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.detach()
        version = -1 if tensor.is_inference() else tensor._version
        parts.append((local.data_ptr(), version, tuple(local.shape), local.dtype))
        flat = local.view(-1) if local.is_contiguous() else local.flatten()
        values.append(flat[:: max(1, len(flat) // _SAMPLES)][: _SAMPLES + 1].double())
    parts += _adapter_state(model)
    kind = values[0].device.type if values else "cpu"
    parts.append((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
    read = torch.cat([value.to(values[0].device) for value in values]).cpu().numpy().tobytes() if values else b""
    return blake2b(repr(parts).encode() + read, digest_size=16).digest()


def _adapter_state(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        state = {key: vars(module)[key] for key in _ADAPTER_STATE if key in vars(module)}
        if state:
            yield name, sorted(state.items())
