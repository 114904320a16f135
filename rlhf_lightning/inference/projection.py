"""Computes the logits for sampling in the same precision as those in training.

In half precision, or under autocast, a model rounds its logits to 8 or 11 bits, while the fused head of training sums
their products in fp32. Samples would come from another distribution than the trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed.unshard import gathered
from ..models import base_model
from ..models.half_weights import HalfLinear, rounded, rounded_copy

_HALF: Final = (torch.bfloat16, torch.float16)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Prepares the weights of a model for many forwards, once for all of them.

    Sharded weights are gathered, weights that autocast would round in every forward are rounded, and the output
    projection returns fp32. All ranks enter and leave together.
    """
    with gathered(model), rounded(model), exact_projection(model):
        yield


@contextmanager
def exact_projection(model: nn.Module) -> Iterator[None]:
    """Lets the output projection of a model accumulate and return fp32 while it computes in half precision.

    Args:
        model: a causal language model of transformers, bare or with adapters around it; the rest of its forward
            (scales, soft caps) is its own.
    """
    projection: Any = base_model(model).get_output_embeddings()
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for module in () if projection is None else projection.modules():
            if type(module) in (nn.Linear, HalfLinear) and not isinstance(module.weight, DTensor):
                dtype = _computed_in(module.weight)
                # Weights that are merely kept in half precision are widened where there is no autocast.
                widens = type(module) is HalfLinear and not torch.is_autocast_enabled(module.weight.device.type)
                if dtype in _HALF and not widens:
                    copy, before = rounded_copy(module), module.__dict__.get("forward")
                    weight = module.weight if copy is None else copy
                    module.__dict__["forward"] = _fp32_forward(weight, module.bias, dtype)
                    changed.append((module, before))
        yield
    finally:
        for module, before in changed:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


def computes_in_half(model: nn.Module) -> bool:
    """Whether a model's layers compute in half precision, by their weights or by autocast."""
    return _computed_in(next(model.parameters())) in _HALF


def _computed_in(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _fp32_forward(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Makes a linear layer's forward, which rounds its operands to ``dtype`` and accumulates and returns fp32."""
    rounded = weight.detach().to(dtype)
    rounded = rounded if weight.is_cuda else rounded.float()  # the CPU has no product of halves with sums in fp32

    def forward(input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            # Operands rounded as the layer would, sums in fp32: the arithmetic of the fused head in training.
            rows = input.flatten(0, -2).to(dtype)
            options: dict[str, Any] = {"out_dtype": torch.float32} if rows.is_cuda else {}
            product: Tensor = torch.mm(rows if rows.is_cuda else rows.float(), rounded.T, **options)
            product = product if bias is None else product + bias.float()
            return product.view(*input.shape[:-1], -1)

    return forward
