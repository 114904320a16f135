"""Planes: the keys, or the values, of one layer, for rows of any length.

A plane stores rows as they are, or in 8 bits. Its last column takes what is written for rows that have none to write,
so that a write always has the same shape; it is never read.

Legend: P prompts, L tokens of the longest, R rows of storage, N rows in use, H key/value heads, C columns, Q new
tokens, D head size, G groups of a head's channels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Channels that share a scale in 8 bits.
_GROUP = 32
_LARGEST = 127

# The row and the column of each new token, (N, 1) and (N, Q).
Places = tuple[Tensor, Tensor]


class Plane(Protocol):
    """Keys or values of one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        ...

    def put(self, places: Places, states_NHQD: Tensor) -> None:
        """Writes new tokens."""
        ...

    def get(self, num_rows: int, num_columns: int) -> Tensor:
        """The first columns of the first rows, ``(N, H, C, D)``."""
        ...

    def fill(self, rows: slice, states_HLD: Tensor) -> None:
        """Writes a prompt into some rows."""
        ...

    def move(self, targets: Tensor, sources: Tensor, num_columns: int) -> None:
        """Copies the first columns of rows to other rows."""
        ...


class WholePlane:
    """States as the model computes them.

    Args:
        like_PHLD: states that give heads, sizes and precision.
        num_rows: rows of storage.
        num_columns: columns of storage, without the one that is never read.
    """

    def __init__(self, like_PHLD: Tensor, num_rows: int, num_columns: int) -> None:
        _, heads, _, size = like_PHLD.shape
        # Zeros instead of uninitialized memory: a value that is masked must not be NaN.
        self._states = like_PHLD.new_zeros((num_rows, heads, num_columns + 1, size))

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._states.nbytes

    def put(self, places: Places, states_NHQD: Tensor) -> None:
        """Writes new tokens."""
        _write(self._states, places, states_NHQD)

    def get(self, num_rows: int, num_columns: int) -> Tensor:
        """The first columns of the first rows, ``(N, H, C, D)``."""
        return self._states[:num_rows, :, :num_columns]

    def fill(self, rows: slice, states_HLD: Tensor) -> None:
        """Writes a prompt into some rows."""
        self._states[rows, :, : states_HLD.shape[1]] = states_HLD

    def move(self, targets: Tensor, sources: Tensor, num_columns: int) -> None:
        """Copies the first columns of rows to other rows."""
        self._states[targets, :, :num_columns] = self._states[sources, :, :num_columns]


class EightBitPlane:
    """States in 8 bits: integers from -127 to 127, with a scale for every 32 channels of a token's head.

    A state is off by at most 1/254 of the largest of its group. Scales are in bfloat16, whose range is that of single
    precision: the integers are computed with the rounded scale, so that its precision costs nothing.

    Args:
        like_PHLD: states that give heads, sizes and precision.
        num_rows: rows of storage.
        num_columns: columns of storage, without the one that is never read.
    """

    def __init__(self, like_PHLD: Tensor, num_rows: int, num_columns: int) -> None:
        _, heads, _, size = like_PHLD.shape
        self._dtype = like_PHLD.dtype
        self._group = _GROUP if size % _GROUP == 0 else size
        shape = (num_rows, heads, num_columns + 1)
        self._codes = torch.zeros((*shape, size), dtype=torch.int8, device=like_PHLD.device)
        self._scales = torch.zeros((*shape, size // self._group), dtype=torch.bfloat16, device=like_PHLD.device)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._codes.nbytes + self._scales.nbytes

    def put(self, places: Places, states_NHQD: Tensor) -> None:
        """Writes new tokens."""
        codes, scales = self._rounded(states_NHQD)
        _write(self._codes, places, codes)
        _write(self._scales, places, scales)

    def get(self, num_rows: int, num_columns: int) -> Tensor:
        """The first columns of the first rows, ``(N, H, C, D)``."""
        codes = self._codes[:num_rows, :, :num_columns].unflatten(-1, (-1, self._group))
        scales = self._scales[:num_rows, :, :num_columns, :, None]
        states: Tensor = (codes * scales.to(self._dtype)).flatten(-2)
        return states

    def fill(self, rows: slice, states_HLD: Tensor) -> None:
        """Writes a prompt into some rows."""
        codes, scales = self._rounded(states_HLD)
        self._codes[rows, :, : states_HLD.shape[1]] = codes
        self._scales[rows, :, : states_HLD.shape[1]] = scales

    def move(self, targets: Tensor, sources: Tensor, num_columns: int) -> None:
        """Copies the first columns of rows to other rows."""
        for stored in (self._codes, self._scales):
            stored[targets, :, :num_columns] = stored[sources, :, :num_columns]

    def _rounded(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds states ``(..., D)`` to integers ``(..., D)`` and scales ``(..., G)``."""
        groups = states.float().unflatten(-1, (-1, self._group))
        scales = (groups.abs().amax(-1, keepdim=True) / _LARGEST).to(torch.bfloat16)
        # A group of zeros has a scale of zero.
        exact = groups / scales.float().clamp_min(torch.finfo(torch.float32).tiny)
        codes = exact.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        return codes.flatten(-2), scales.squeeze(-1)


def _write(stored_RHCX: Tensor, places: Places, states_NHQX: Tensor) -> None:
    stored_RHCX.transpose(1, 2)[places] = states_NHQX.transpose(1, 2).to(stored_RHCX.dtype)
