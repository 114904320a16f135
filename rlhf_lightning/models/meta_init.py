"""Models on the meta device, which ranks build that will receive the weights of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_WANTED: ContextVar[bool] = ContextVar("skeletons", default=False)


@contextmanager
def skeletons(wanted: bool = True) -> Iterator[None]:
    """Makes ``load_causal_lm`` build models on the meta device, without values of weights and buffers."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def skeletons_wanted() -> bool:
    """Tells whether models are built without weights."""
    return _WANTED.get()


def weights_device() -> AbstractContextManager[object]:
    """Returns the context in which models are built: the meta device where skeletons are wanted, else no change."""
    return torch.device("meta") if skeletons_wanted() else nullcontext()
