"""Switches a model between its own eager attention and others, and compares them.

The eager forward of a model, one row at a time without padding, defines its results. Everything else (the packed
forest, padded rows, a cache) must agree with it, or is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

EAGER: Final = "eager"
_HALF = (torch.bfloat16, torch.float16)
# Parts of the names of config values that limit how far back a token attends.
_REACH = ("window", "attention_chunk_size", "index_topk")
_SHORT = 3  # the reach that the probe tries


def _parts(base: nn.Module) -> list[PreTrainedModel]:
    return [part for part in base.modules() if isinstance(part, PreTrainedModel)]


def is_switchable(base: nn.Module) -> bool:
    """Tells whether all parts of a model look up their attention by name in every forward and pass it its arguments."""
    return all(part._supports_attention_backend and part._can_set_attn_implementation() for part in _parts(base))


def attention_of(base: nn.Module) -> str | None:
    """Returns the name of the attention that a model runs with."""
    config: Any = getattr(base, "config", None)
    name = getattr(config and config.get_text_config(), "_attn_implementation", None)
    return None if name is None else str(name)


def set_attention(base: nn.Module, name: str) -> None:
    """Makes a switchable model run with another attention; others are left as they are.

    Args:
        base: a transformers model without adapters around it.
        name: ``eager``, or a registered attention.
    """
    if not is_switchable(base):
        return
    for config in _configs(base):
        config._attn_implementation_internal = name


def avoid_cudnn_attention(device: torch.device) -> None:
    """Switches cuDNN's kernels of scaled-dot-product attention off in this process, if a run is on a CUDA device.

    On Hopper and Blackwell torch prefers them for half precision. They build a plan for every new shape, which takes
    0.02 to 1 s, and here nearly every block of a micro-batch and every step of a generation has a shape of its own.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _configs(base: nn.Module) -> list[Any]:
    """Collects every config in a model: of its parts, of their parts, and the copies that layers keep."""
    found: dict[int, Any] = {}
    for module in base.modules():
        config: Any = getattr(module, "config", None)
        for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
            if hasattr(each, "_attn_implementation_internal"):
                found[id(each)] = each
    return list(found.values())


@contextmanager
def using_attention(base: nn.Module, name: str) -> Iterator[None]:
    """Runs a model with another attention within the context.

    Args:
        base: a transformers model without adapters around it.
        name: ``eager``, or a registered attention.
    """
    before = [(config, config._attn_implementation_internal) for config in _configs(base)]
    set_attention(base, name)
    try:
        yield
    finally:
        for config, kept in before:
            config._attn_implementation_internal = kept


def reaches(base: PreTrainedModel, length: int) -> list[str]:
    """Names the config values that limit a token's view, but that ``length`` tokens are too few to show."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    # A window in the config that no layer uses.
    if kinds and kinds <= {"full_attention"}:
        return []

    # A window beyond the model's positions never applies.
    positions = getattr(config, "max_position_embeddings", None) or float("inf")
    numbers = vars(config).items()  # not getattr: some configs answer it per layer only
    return [name for name, value in numbers if _is_reach(name, value) and length <= value < positions]


def _is_reach(name: str, value: Any) -> bool:
    return any(word in name for word in _REACH) and isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextmanager
def short_reach(base: nn.Module) -> Iterator[None]:
    """Shortens windows and the like within the context, so that a probe's few tokens show them."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for holder in (*base.modules(), *_configs(base)):
        for name, value in list(vars(holder).items()):
            if _is_reach(name, value) and value > _SHORT:
                changed.append((vars(holder), name, value))
                vars(holder)[name] = _SHORT
    try:
        yield
    finally:
        for values, name, value in changed:
            values[name] = value


@contextmanager
def single_precision(model: nn.Module) -> Iterator[None]:
    """Computes in fp32 within the context: half-precision weights are widened while their module runs.

    Comparisons then see the computation and not its rounding, at the memory cost of one module's weights at a time.
    """
    kept: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def widen(module: nn.Module, args: Any) -> None:
        own = {name: p for name, p in module._parameters.items() if p is not None and p.dtype in _HALF}
        kept[module] = own
        for name, parameter in own.items():
            module._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(kept.pop(module, {}))

    with ExitStack() as stack:
        for module in model.modules():
            own = [p for p in module._parameters.values() if p is not None and p.dtype in _HALF]
            # Shards cannot be replaced one module at a time.
            if own and not any(isinstance(p, DTensor) for p in own):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


def distance(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of ``expected``."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
