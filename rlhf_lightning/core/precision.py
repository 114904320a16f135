"""Weights and buffers that stay in fp32 when Lightning casts a module to half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.reference import ADAPTER_COPY
from .resume import adapted_models

_HALF = (torch.bfloat16, torch.float16)


def apply_in_fp32(
    module: nn.Module, fn: Callable[[Tensor], Tensor], apply: Callable[[Callable[..., Tensor]], None]
) -> None:
    """Moves and casts a module as torch does, but keeps fp32 adapters and the fp32 buffers of its models in fp32.

    Lightning's ``bf16-true`` and ``16-true`` cast everything. An adapter's updates are often below the resolution of
    half precision, and so few weights cost little in fp32; the dtype of sharded weights is fixed from here on, so a
    cast could not be undone later. Rotary frequencies, rounded, are off by tenths of a radian at position 1000.

    Args:
        module: the module.
        fn: function that moves or casts a tensor.
        apply: torch's ``_apply`` of the module.
    """
    exact = [p for p in _adapter_parameters(module) if p.dtype == torch.float32]
    kept = {id(tensor) for p in exact for tensor in (p, p.grad) if tensor is not None}
    models = [model for model in module.modules() if isinstance(model, PreTrainedModel)]
    owners = {id(owner): owner for model in models for owner in model.modules()}.values()
    buffers = [(owner._buffers, name, b) for owner in owners for name, b in owner._buffers.items() if b is not None]

    def moved(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        return tensor.to(changed.device) if changed.dtype in _HALF and id(tensor) in kept else changed

    apply(moved)
    for owner, name, before in buffers:
        now = owner[name]
        if before.dtype == torch.float32 and now is not None and now.dtype != before.dtype:
            owner[name] = before.to(now.device)


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for model in adapted_models(module).values():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or f".{ADAPTER_COPY}." in name:
                yield parameter
