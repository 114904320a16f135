"""Key/value caches whose rows begin at column 0 and have lengths of their own.

A token's column is its position, so rows are never shifted, several tokens of each row are computed in one forward,
and a row is rolled back by making it shorter. A model's own masks cannot describe such rows: its layers run with the
registered attention, which is given their geometry (``sequences.CachedRows``). ``kv_cache.SlotCache`` is for models
whose layers cannot.

Legend: R rows of storage, N rows of a forward, Q new tokens, H key/value heads, C columns, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..sequences import CachedRows
from .kv_cache import PromptStates
from .lanes import bucket, to_device
from .planes import Places, Plane

# Keys are padded to a multiple of this where a mask is needed: CUDA's kernels want aligned masks.
_ALIGNMENT = 16
_LEAST = 64  # columns of fixed shapes


class _RowLayer(CacheLayerMixin):
    """One layer: what a model's layer hands its new keys and values to."""

    is_sliding = False  # attention applies windows; a layer keeps all its columns

    def __init__(self, owner: Rows, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner, self._number = owner, number
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: storage is allocated with the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new tokens and returns all columns in use."""
        return self._owner.exchange(self._number, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask, which is not read."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return int(self._owner.lengths[: self._owner.num_rows].max(initial=0))

    def get_max_length(self) -> int:
        """No maximum that a layer knows of."""
        return -1


class Rows(Cache):
    """Lengths of rows, and what a forward of new tokens needs to know of them; subclasses store keys and values.

    Attributes:
        num_rows: rows in use: the first ones.
        lengths: tokens in each.
        offsets: how far the position of a row's next token is ahead of its column, after a compressed context.
        device: where they are stored.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.num_rows = 0
        self.lengths = np.zeros(0, dtype=np.int64)
        self.offsets = np.zeros(0, dtype=np.int64)
        self._offsets_N1: Tensor | None = None  # on the device, copied when rows come or leave
        self.device = torch.device("cpu")
        self._lengths_N1: Tensor | None = None  # on the device, copied when rows come, leave or become shorter
        self._width = 0

    @abstractmethod
    def exchange(self, layer: int, keys_NHQD: Tensor, values_NHQD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new tokens; returns all its keys and values, ``(N, H, C, D)``."""

    @abstractmethod
    def _place(self, columns_NQ: Tensor, written_NQ: Tensor | None) -> None:
        """Remembers where new tokens are written: nowhere that is read where ``written_NQ`` is false."""

    def _computed_rows(self) -> int:
        """Rows of a forward: those in use."""
        return self.num_rows

    def _columns(self, needed: int) -> int:
        """Columns that attention is given where rows have different lengths."""
        return -(-needed // _ALIGNMENT) * _ALIGNMENT

    def begin(self, counts: Sequence[int] | None = None, alive_N: Tensor | None = None) -> dict[str, Any]:
        """Prepares a forward of new tokens; returns its arguments besides the tokens and the cache itself.

        Args:
            counts: new tokens of each row, at least 0, padded on the left to the most; one each by default.
            alive_N: with one token each, the rows that take it; the others stay as they are.
        """
        lengths_N1 = self._device_lengths()
        used = self.lengths[: self.num_rows]
        if counts is None:
            columns_NQ, written_NQ = lengths_N1, None if alive_N is None else alive_N[:, None]
            positions_NQ, needed = self._positions(columns_NQ), int(used.max()) + 1
        else:
            most = max(counts)
            missing_N1 = most - to_device(np.array(counts, dtype=np.int64)[:, None], self.device)
            offsets_NQ = torch.arange(most, device=self.device) - missing_N1
            # Padding takes position 0, which every model has.
            written_NQ = offsets_NQ >= 0
            columns_NQ = (lengths_N1[: self.num_rows] + offsets_NQ).where(written_NQ, 0)
            positions_NQ = self._positions(columns_NQ).where(written_NQ, 0)
            needed = int((used + np.array(counts)).max())
        # Rows of one length need no mask for one more token each.
        all_seen = counts is None and alive_N is None and bool((used == used[0]).all())
        self._width = needed if all_seen else self._columns(needed)
        self._place(columns_NQ, written_NQ)
        return {
            "position_ids": positions_NQ,
            # A mask with four dimensions passes through mask creation untouched, and the attention does not read it.
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device),
            "cached_rows": CachedRows(columns_NQ, self._width, all_seen=all_seen),
        }

    def advance(self, counts: Sequence[int] | None = None, alive_N: Tensor | None = None) -> None:
        """Makes rows longer by the tokens that a forward has computed, with the arguments of ``begin``.

        Where ``alive_N`` is given, the host's lengths are those of rows that stay alive.
        """
        self.lengths[: self.num_rows] += 1 if counts is None else np.array(counts, dtype=np.int64)
        if counts is None:
            self._lengths_N1 = self._device_lengths() + (1 if alive_N is None else alive_N[:, None])
        else:
            self._lengths_N1 = None

    def rollback(self, counts: Sequence[int]) -> None:
        """Takes the last tokens of each row back.

        Args:
            counts: tokens of each row, at most its length.
        """
        self.lengths[: self.num_rows] -= np.array(counts, dtype=np.int64)
        self._lengths_N1 = None

    def _positions(self, columns_NQ: Tensor) -> Tensor:
        if not self.offsets[: self.num_rows].any():
            return columns_NQ
        if self._offsets_N1 is None:
            offsets = np.zeros((self._computed_rows(), 1), dtype=np.int64)
            offsets[: self.num_rows, 0] = self.offsets[: self.num_rows]
            self._offsets_N1 = to_device(offsets, self.device)
        return columns_NQ + self._offsets_N1[: len(columns_NQ)]

    def _device_lengths(self) -> Tensor:
        if self._lengths_N1 is None:
            lengths = np.zeros((self._computed_rows(), 1), dtype=np.int64)
            lengths[: self.num_rows, 0] = self.lengths[: self.num_rows]
            self._lengths_N1 = to_device(lengths, self.device)
        return self._lengths_N1

    def _add_layers(self, count: int) -> None:
        self.layers.extend(_RowLayer(self, number) for number in range(count))


class RowCache(Rows):
    """Rows in storage of a fixed number of rows and columns.

    Args:
        plane: makes the storage of a layer's keys or values, from states of prompts, rows and columns.
        num_rows: rows of storage.
        num_columns: columns of storage: as many as the longest row has.
        fixed_shapes: whether forwards compute a power of two of rows, over a power of two of columns, so that their
            shapes stay the same for many steps; all of these rows are stored.
    """

    def __init__(
        self, plane: Callable[[Tensor, int, int], Plane], num_rows: int, num_columns: int, *, fixed_shapes: bool = False
    ) -> None:
        super().__init__()
        self._plane, self._fixed = plane, fixed_shapes
        self._shape = (bucket(num_rows), bucket(num_columns, _LEAST)) if fixed_shapes else (num_rows, num_columns)
        self._planes: list[tuple[Plane, Plane]] = []
        self._places: Places = (torch.empty(0), torch.empty(0))
        self.lengths = np.zeros(self._shape[0], dtype=np.int64)
        self.offsets = np.zeros(self._shape[0], dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(plane.nbytes for planes in self._planes for plane in planes)

    def admit(self, prompts: PromptStates, index: int, length: int, copies: int, offset: int = 0) -> None:
        """Appends rows that each begin with one prompt of a left-padded batch."""
        if not self._planes:
            self.device = prompts[0][0].device
            self._planes = [(self._plane(k, *self._shape), self._plane(v, *self._shape)) for k, v in prompts]
            self._add_layers(len(prompts))
        rows = slice(self.num_rows, self.num_rows + copies)
        for planes, layer in zip(self._planes, prompts, strict=True):
            for plane, states_PHLD in zip(planes, layer, strict=True):
                plane.fill(rows, states_PHLD[index, :, -length:])
        self.lengths[rows], self.offsets[rows] = length, offset
        self.num_rows += copies
        self._lengths_N1 = self._offsets_N1 = None

    def keep(self, order: Sequence[int]) -> None:
        """Keeps some rows, in a new order (see ``lanes.remaining``): only those whose index changes move."""
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        if moved:
            targets, sources = to_device(np.array(moved, dtype=np.int64).T.copy(), self.device).unbind()
            columns = max(int(self.lengths[source]) for _, source in moved)
            for planes in self._planes:
                for plane in planes:
                    plane.move(targets, sources, columns)
        self.lengths[: len(order)] = self.lengths[list(order)]
        self.offsets[: len(order)] = self.offsets[list(order)]
        self.num_rows = len(order)
        self._lengths_N1 = self._offsets_N1 = None

    def exchange(self, layer: int, keys_NHQD: Tensor, values_NHQD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new tokens; returns all its keys and values, ``(N, H, C, D)``."""
        keys, values = self._planes[layer]
        keys.put(self._places, keys_NHQD)
        values.put(self._places, values_NHQD)
        return keys.get(len(keys_NHQD), self._width), values.get(len(keys_NHQD), self._width)

    def _place(self, columns_NQ: Tensor, written_NQ: Tensor | None) -> None:
        # The column after the last is never read.
        written = columns_NQ if written_NQ is None else columns_NQ.where(written_NQ, self._shape[1])
        self._places = torch.arange(len(columns_NQ), device=self.device)[:, None], written

    def _computed_rows(self) -> int:
        return bucket(self.num_rows) if self._fixed else self.num_rows

    def _columns(self, needed: int) -> int:
        return min(bucket(needed, _LEAST) if self._fixed else super()._columns(needed), self._shape[1])
