"""Compiles the decoder layers of a model in place, one function for each class of layers.

All layers of a class, of all models, share what torch compiles of their class's ``forward``, with sizes that may
change; parameters are inputs of it. Compiled are passes over a packed forest. Passes with a cache, padded rows, and
probes run the layers as they are, on the same weights; names in state dicts do not change.

Attention in blocks and FlexAttention read lists whose lengths change with every batch. They run between the compiled
parts of a layer; the cascade is one operator within them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from ..utils.compilation import allow_compilations
from .backbone import base_model, decoder_blocks, evaluating
from .half_weights import make_copies
from .routers import has_routers

_FORWARD = "forward"  # attribute of a layer that replaces the method of its class


def compile_layers(model: nn.Module) -> None:
    """Lets the decoder layers of a model run compiled wherever they can; changes no result beyond rounding.

    Args:
        model: a causal language model, with its adapters.

    Raises:
        ValueError: it has routers, whose experts run a number of rows that changes from layer to layer.
    """
    base = base_model(model)
    if has_routers(model):
        raise ValueError(
            f"compile is true, and {type(base).__name__} is a mixture of experts, whose layers are not compiled: set "
            "compile to false"
        )
    for layer in decoder_blocks(base):
        if not is_compiled(layer):
            layer.__dict__[_FORWARD] = CompiledForward(layer)


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a layer, or a layer within a module, runs compiled."""
    return any(isinstance(part.__dict__.get(_FORWARD), CompiledForward) for part in module.modules())


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs the layers of a model as they are within the context, as for a few passes of a kind that is not repeated."""
    kept = {
        part: part.__dict__.pop(_FORWARD)
        for part in model.modules()
        if isinstance(part.__dict__.get(_FORWARD), CompiledForward)
    }
    try:
        yield
    finally:
        for part, forward in kept.items():
            part.__dict__[_FORWARD] = forward


class CompiledForward:
    """Replaces a layer's ``forward``: compiled in passes over a packed forest, and else the layer's own.

    Args:
        layer: the layer; a copy of it gets a copy of this.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._windows: list[int | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer; the first time also as it is, which shows what of a forest its attention reads."""
        layer, tree = self.layer, kwargs.get("tree")
        kind: Any = type(layer)
        if tree is None:
            return kind.forward(layer, *args, **kwargs)
        if self._windows is None:
            # Draws nothing and gives nothing: a resumed run computes what the run that was not stopped does.
            with evaluating(layer), torch.no_grad():
                kind.forward(layer, *args, **kwargs)
            self._windows = tree.stretched

        # Lazy attributes are made here, since compiled code can only read them.
        for window in self._windows:
            tree.stretches(window)
        make_copies(layer)
        return _compiled(kind)(layer, *args, **kwargs)


@cache
def _compiled(kind: Any) -> Callable[..., Any]:
    allow_compilations()
    compiled: Callable[..., Any] = torch.compile(kind.forward, dynamic=True)
    return compiled
