"""Reads and replaces the weights that a module trains, whole or sharded, for callbacks that keep copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import lightning
from torch import Tensor, float64, nn
from torch.distributed.tensor import DTensor

from ..distributed.fsdp2 import sharded_like, sharded_units


def trained_weights(module: lightning.LightningModule) -> dict[str, nn.Parameter]:
    """Returns the weights that are trained: with LoRA the adapter, never a reference."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def settled_weights(module: lightning.LightningModule) -> dict[str, nn.Parameter]:
    """Returns the weights that are trained, sharded where they are sharded."""
    for unit in sharded_units(module):
        unit.reshard()  # it may still hold gathered weights of the last forward
    return trained_weights(module)


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies weights on their devices, in their types."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Replaces weights in place, rounding to their types."""
    for name, weight in weights.items():
        weight.copy_(values[name])


def exact(weight: Tensor) -> Tensor:
    """Converts to at least fp32: in half precision, a thousandth of a step would be rounded away."""
    value = weight.detach()
    return value if value.dtype == float64 else value.float()


def placed(
    values: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, what: str, callback: str
) -> dict[str, Tensor]:
    """Moves tensors of a checkpoint to the devices and shards of the weights.

    Args:
        values: whole tensors by the names of weights.
        weights: the weights.
        what: name of the tensors, for the error.
        callback: name of the callback, for the error.

    Raises:
        ValueError: they are not tensors of these weights.
    """
    wrong = sorted(values.keys() ^ weights.keys()) or sorted(
        name for name, weight in weights.items() if values[name].shape != weight.shape
    )
    if wrong:
        raise ValueError(
            f"the checkpoint's {what} is not one of the weights that are trained here ({len(wrong)} differ, the first "
            f"{wrong[0]!r}): use the options that it was made with, or remove {callback}"
        )
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        value = values[name]
        if isinstance(weight, DTensor) and not isinstance(value, DTensor):
            found[name] = sharded_like(value, weight)
        else:
            found[name] = value.to(weight.device, copy=True)
    return found
