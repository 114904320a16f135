"""Models without weights: what ranks build that will be given the weights of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_WANTED: ContextVar[bool] = ContextVar("skeletons", default=False)


@contextmanager
def skeletons(wanted: bool = True) -> Iterator[None]:
    """Makes ``load_causal_lm`` build models on the meta device: all of them but the values of weights and buffers."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def skeletons_wanted() -> bool:
    """Whether models are to be built without weights."""
    return _WANTED.get()


def weights_device() -> AbstractContextManager[object]:
    """Where models are built: on the meta device where skeletons are wanted, else where they would be."""
    return torch.device("meta") if skeletons_wanted() else nullcontext()
