"""Counts the bytes that are allocated on a pretended CUDA device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from ..budgets.trace import traced_cuda
from ..gpu.pretended import Pretended


class DeviceMemory:
    """Bytes allocated now, and their maximum; memory within kernels is not seen.

    Attributes:
        now: bytes of all storages.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def see(self, inner: Tensor) -> None:
        """Counts the storage of a tensor on the device until it is freed."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes and size:
            self._sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def counted_cuda() -> Iterator[DeviceMemory]:
    """Within it, ``cuda:0`` is there and its memory is counted."""
    memory, plain = DeviceMemory(), Pretended.__new__

    def new(cls: Any, inner: Tensor) -> Pretended:
        memory.see(inner)
        return plain(cls, inner)

    with traced_cuda(), patch.object(Pretended, "__new__", staticmethod(new)):
        yield memory
