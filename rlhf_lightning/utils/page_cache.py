"""Releases memory pages of weight files that a process has read and no longer needs."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED of Linux, which Python's mmap names on some systems only


def drop_file_pages(tensors: Sequence[Tensor]) -> None:
    """Drops the memory pages of tensors that lie in mapped weight files; a later read fetches them from the file.

    transformers maps weight files, and a mapped page counts as this process's memory until the whole file is unmapped.
    Other tensors are not affected, and on systems other than Linux this does nothing.
    """
    maps = Path("/proc/self/maps")
    if not tensors or not maps.is_file():
        return
    files = []
    # The mapped files of this process, from the kernel's list.
    for line in maps.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith((".safetensors", ".bin")):
            files.append(tuple(int(edge, 16) for edge in fields[0].split("-")))
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or not files:
        return
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    # Only whole pages: neighbours on shared ones may still be needed.
    page = mmap.PAGESIZE
    for tensor in tensors:
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        first, last = -(-start // page) * page, stop // page * page  # whole pages of its own
        if last > first and any(low <= start and stop <= high for low, high in files):
            advise(first, last - first, _DONTNEED)
