"""Weights of linear layers in the half precision in which autocast multiplies them.

Autocast rounds the fp32 weight of a linear layer in every call of it: 6 bytes of traffic and a launch for what takes 2
bytes to read. ``hold_frozen`` rounds a weight that nothing trains once, and keeps only that. ``rounded`` rounds all
others once for many passes. Products stay those of autocast, bit for bit, and so do gradients, which reach a weight
through its rounded copy. Embeddings, norms and biases stay in fp32, and with the embedding an output projection that is
tied to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_HALF = (torch.bfloat16, torch.float16)
_COPY = "_rounded_weight"  # attribute of a layer: the copy that its products read, once it is made
_COPIES = "_rounded_copies"  # attribute of a layer: all copies, by the identity of their weights
_OWN = (_COPY, _COPIES, "forward")  # attributes of a layer while its copy is read
_EXACT = "_is_read_exactly"  # attribute of a layer whose weight is also read in fp32


class HalfLinear(nn.Linear):
    """A linear layer whose weight is in half precision: kept so where nothing trains it, or gathered so from shards.

    Without autocast it computes in the precision of its input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer, ``(..., in) -> (..., out)``."""
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


def hold_frozen(model: nn.Module, dtype: torch.dtype | None, *, exact: bool = True) -> None:
    """Keeps the weights of linear layers that are not trained in half precision; changes no product under autocast.

    Layers that are trained, or whose weight is read by others (an embedding, DoRA), keep it in fp32.

    Args:
        model: any module; sharded weights are left as they are.
        dtype: the precision of autocast; ``None`` widens all of these weights again.
        exact: only those whose values ``dtype`` holds exactly, as those of models that were stored in it; so exports,
            and runs in other precisions, have the same values as before.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> hold_frozen(layers, torch.bfloat16, exact=False)
        >>> [layer.weight.dtype for layer in layers]
        [torch.bfloat16, torch.float32]
    """
    widen_trained(model, dtype)
    if dtype is None:
        return
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    adapted = _read_by_adapters(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if not _is_plain(module) or weight is None or weight.requires_grad or owners[id(weight)] > 1:
            continue
        half = weight.detach().to(dtype)
        if module in adapted or _EXACT in vars(module) or (exact and not torch.equal(half.float(), weight)):
            continue
        module.weight = nn.Parameter(half, requires_grad=False)
        module.__class__ = HalfLinear


def widen_trained(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Widens weights that ``hold_frozen`` has kept and that are trained since, or all unless they are in ``dtype``."""
    for module in model.modules():
        if not isinstance(module, HalfLinear) or isinstance(module.weight, DTensor):
            continue
        if module.weight.requires_grad or module.weight.dtype != dtype:
            # The same parameter, which an optimizer may hold.
            if module.weight.dtype in _HALF:
                module.weight.data = module.weight.data.float()
            module.__class__ = nn.Linear  # type: ignore[assignment]


def multiplies_alone(model: nn.Module) -> bool:
    """Returns whether linear layers multiply by all of a module's weights, but for scales of norms.

    Not so: experts and convolutions, adapters that read the weight that they change, norms of torch's own, which want
    all in one precision.
    """
    for module in model.modules():
        own = [weight for weight in module._parameters.values() if weight is not None]
        matrices = any(weight.dim() > 1 for weight in own) and type(module) not in (nn.Linear, HalfLinear)
        if _reads_weight(module) or matrices or (own and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)):
            return False
    return True


def widen_without_autocast(model: nn.Module) -> None:
    """Lets linear layers whose weights will be gathered in half precision compute without autocast as well."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = HalfLinear


def read_exactly(layer: nn.Module | None) -> None:
    """Tells that the weight of a layer, adapters around it or not, is also read in fp32; ``hold_frozen`` leaves it."""
    for module in () if layer is None else layer.modules():
        if isinstance(module, nn.Linear):
            module.__dict__[_EXACT] = True


@contextmanager
def rounded(*models: nn.Module) -> Iterator[None]:
    """Lets linear layers read copies of their fp32 weights that are rounded once; changes no result.

    It replaces what autocast would do in every call, and does nothing without autocast. The first product of a weight
    makes its copy, 2 bytes per weight, which is held until the context ends. The weights must not change within it,
    except as ``unrounded`` tells.

    Args:
        models: all modules whose layers take part; sharded weights do not.
    """
    copies: dict[int, Tensor] = {}
    changed: list[nn.Module] = []
    try:
        for module in (module for model in models if _is_autocast(model) for module in model.modules()):
            weight = module._parameters.get("weight")
            if not _is_plain(module) or weight is None or "forward" in module.__dict__:
                continue
            # Attributes and a method: a closure would be another function to torch.compile in every step.
            module.__dict__.update({_COPY: None, _COPIES: copies, "forward": MethodType(_forward, module)})
            changed.append(module)
        yield
    finally:
        for module in changed:
            for name in _OWN:
                module.__dict__.pop(name, None)


@contextmanager
def unrounded(model: nn.Module, weights: Collection[Tensor]) -> Iterator[None]:
    """Lets layers read these weights themselves within the context, since they have other values there."""
    numbers = {id(weight) for weight in weights}
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            if _COPY in module.__dict__ and id(module._parameters["weight"]) in numbers:
                kept.append((module, {name: module.__dict__.pop(name) for name in _OWN}))
        yield
    finally:
        for module, own in kept:
            module.__dict__.update(own)


def rounded_copy(layer: nn.Module) -> Tensor | None:
    """Returns the copy of a layer's weight that ``rounded`` lets its products read; ``None`` outside of it."""
    return _copy_of(layer) if _COPY in layer.__dict__ else None


def make_copies(model: nn.Module) -> None:
    """Makes the copies that ``rounded`` lets layers read, before compiled code reads them."""
    if _is_autocast(model):
        for module in model.modules():
            rounded_copy(module)


def _copy_of(layer: Any) -> Tensor:
    weight, copies = layer.weight, layer.__dict__[_COPIES]
    if id(weight) not in copies:
        # With gradients in any mode, so that passes without and with them read the same copy.
        with torch.enable_grad():
            copies[id(weight)] = weight.to(torch.get_autocast_dtype(weight.device.type))
    copy: Tensor = copies[id(weight)]
    layer.__dict__[_COPY] = copy
    return copy


def _forward(module: Any, input: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(input.device.type):
        return F.linear(input, module.weight, module.bias)
    copy = module._rounded_weight
    return F.linear(input, _copy_of(module) if copy is None else copy, module.bias)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer with its whole weight in fp32."""
    weight = module._parameters.get("weight") if type(module) is nn.Linear else None
    return (
        weight is not None and not isinstance(weight, DTensor) and weight.dtype == torch.float32 and not weight.is_meta
    )


def _read_by_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the matrices of adapters, which stay in fp32, and adapted layers whose weight the adapter reads."""
    found: set[nn.Module] = set()
    for outer in model.modules():
        if isinstance(outer, BaseTunerLayer):
            own = set(outer.modules())
            found |= own if _reads_weight(outer) else own - set(outer.get_base_layer().modules())
    return found


def _reads_weight(layer: Any) -> bool:
    """Whether a module is an adapted layer that computes with its base's weight, and not only with its products."""
    return isinstance(layer, BaseTunerLayer) and (type(layer) is not lora.Linear or bool(layer.lora_variant))


def _is_autocast(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return first is not None and torch.is_autocast_enabled(first.device.type)
