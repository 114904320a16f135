"""Packs linear layers for products with few rows, while a model generates on CPU.

Decoding multiplies a few rows by whole weight matrices. The usual product rearranges the weight at every call; oneDNN's
blocked layout is that rearrangement done once. Measured on two cores with AVX-512 (torch 2.13), in GFLOP/s for 8 / 32
rows: a layer of 1,024 x 384 runs at 76 / 141 as stored and at 119 / 184 blocked, a head of 32,768 x 384 at 27 / 73 and
at 86 / 170. Column-major weights (other strides, same values) gave 58 / 126 and 20 / 59.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Smaller weights fit into the nearest cache, so packing gains nothing.
_SMALLEST = 1 << 17
# Packing the weights takes as long as a few steps with them.
PACKING_STEPS = 8


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Lets the plain linear layers of a model on CPU compute with blocked copies of their weights.

    Parameters are unchanged: each layer gets its own ``forward``, which reads the copy, until the context ends. Every
    context makes new copies, so they hold the current weights; they take as much memory as the weights do. Under
    autocast, and on devices, precisions or builds of torch without such a layout, nothing happens.

    Args:
        model: its layers of exactly ``nn.Linear`` in fp32 or bf16 take part, those inside of adapters included.
    """
    changed: list[nn.Module] = []
    try:
        if _available():
            for module in model.modules():
                if isinstance(module, nn.Linear) and _suits(module):
                    module.__dict__["forward"] = _packed_forward(module.weight, module.bias)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def packed_bytes(shapes: Sequence[tuple[int, int]], steps: int, dtype: torch.dtype) -> float:
    """Bytes of the copies of a model's linear layers while it generates on CPU.

    Args:
        shapes: inputs and outputs of the layers.
        steps: tokens of the longest completion.
        dtype: of the weights.
    """
    if steps < PACKING_STEPS or not _available() or not _packs(dtype):
        return 0.0
    return float(dtype.itemsize * sum(rows * columns for rows, columns in shapes if rows * columns >= _SMALLEST))


def _packs(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _available() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def _suits(module: nn.Linear) -> bool:
    # Subclasses, and layers whose forward is replaced, compute something else.
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    # Subclasses of Parameter are sharded or quantised weights.
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.numel() < _SMALLEST:
        return False
    return _packs(weight.dtype)


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    product = torch.ops.mkldnn._linear_pointwise

    def forward(input: Tensor) -> Tensor:
        output: Tensor = product(input, packed, bias, "none", [], "")
        return output

    return forward
