"""A preallocated key/value cache whose rows end at the same column, so that rows of any length share one batch.

Every row is written at the column ``end`` and starts where its prompt's length puts it: short rows are padded on the
left, as in a left-padded batch, which is the one layout that every decoder's masks support (sliding windows and
position biases included). A row that joins later starts later; columns before the earliest start are not read.

Legend: P prompts of a prefill, R rows of storage, H key/value heads, L tokens, C columns, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .lanes import to_device

# Per layer, the keys and the values of a left-padded batch of prompts: ``(P, H, L, D)`` each.
PromptStates = Sequence[tuple[Tensor, Tensor]]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer; the whole cache shares one geometry."""

    is_sliding = False  # masks apply windows; a layer keeps all its columns

    def __init__(self, owner: SlotCache, keys_RHCD: Tensor, values_RHCD: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.keys: Tensor = keys_RHCD
        self.values: Tensor = values_RHCD
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: storage is allocated with the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one new column and returns all columns in use."""
        rows, end = len(key_states), self.owner.end
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        columns = slice(self.owner.base, end + 1)
        return self.keys[:rows, :, columns], self.values[:rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use, the padding of shorter rows included."""
        return self.owner.end - self.owner.base

    def get_max_length(self) -> int:
        """Columns of storage."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """Key/value storage for a batch in which rows join and leave.

    Rows in use are the first ``num_rows``.

    Args:
        like: states of computed prompts, which give layers, heads, sizes and precision.
        num_rows: rows of storage.
        num_columns: columns of storage: more than the longest row has.
    """

    def __init__(self, like: PromptStates, num_rows: int, num_columns: int) -> None:
        def storage(states_PHLD: Tensor) -> Tensor:
            # Zeros instead of uninitialized memory: a masked value must not be NaN.
            _, heads, _, size = states_PHLD.shape
            return states_PHLD.new_zeros((num_rows, heads, num_columns, size))

        self.slots = [_SlotLayer(self, storage(keys), storage(values)) for keys, values in like]
        super().__init__(layers=list(self.slots))
        self.num_columns = num_columns
        self.num_rows = 0
        self.starts = np.zeros(num_rows, dtype=np.int64)
        self.base = 0
        self.end = 0
        self._starts_R1: Tensor | None = None  # on the device, copied when rows come, leave or move

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.slots)

    def admit(self, prompts: PromptStates, index: int, length: int, copies: int) -> None:
        """Appends rows that each begin with one prompt of a left-padded batch."""
        # An empty batch starts over at column 0.
        if self.num_rows == 0:
            self.base = self.end = 0
        # All rows end at the same column, so that the written ones move right until the prompt fits before it.
        if self.end < length:
            self._shift_to(length)
        rows = slice(self.num_rows, self.num_rows + copies)
        columns = slice(self.end - length, self.end)
        for slot, (keys_PHLD, values_PHLD) in zip(self.slots, prompts, strict=True):
            slot.keys[rows, :, columns] = keys_PHLD[index, :, -length:]
            slot.values[rows, :, columns] = values_PHLD[index, :, -length:]
        self.starts[rows] = self.end - length
        self._starts_R1 = None
        self.num_rows += copies

    def keep(self, order: Sequence[int]) -> None:
        """Keeps some rows, in a new order (see ``lanes.remaining``): only those whose index changes move."""
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        if moved:
            device = self.slots[0].keys.device
            targets, sources = to_device(np.array(moved, dtype=np.int64).T.copy(), device).unbind()
            columns = slice(min(int(self.starts[source]) for _, source in moved), self.end)
            for slot in self.slots:
                for states_RHCD in (slot.keys, slot.values):
                    states_RHCD[targets, :, columns] = states_RHCD[sources, :, columns]
        self.starts[: len(order)] = self.starts[list(order)]
        self._starts_R1 = None
        self.num_rows = len(order)

    def begin(self) -> dict[str, Any]:
        """Prepares a forward of one more token; returns its arguments besides the tokens and the cache itself."""
        # Columns that no row needs any more are dropped, and there must be room for one more.
        self.base = int(self.starts[: self.num_rows].min())
        if self.end == self.num_columns:
            self._shift_to(self.end - self.base)
        return {"attention_mask": self._mask(), "position_ids": self.end - self._device_starts()}

    def advance(self) -> None:
        """Makes every row longer by the token that a forward has computed."""
        self.end += 1

    def _shift_to(self, end: int) -> None:
        """Moves all columns in use so that the next one to be written is ``end``."""
        shift = end - self.end
        for slot in self.slots:
            for states_RHCD in (slot.keys, slot.values):
                # A copy, since source and destination overlap.
                used = states_RHCD[: self.num_rows, :, self.base : self.end].clone()
                states_RHCD[: self.num_rows, :, self.base + shift : end] = used
        self.starts += shift
        self._starts_R1 = None
        self.base += shift
        self.end = end

    def _mask(self) -> Tensor | None:
        """``(rows, columns in use + 1)``, 1 = the row's own token; ``None`` where no row is padded."""
        if (self.starts[: self.num_rows] == self.base).all():
            return None

        # Padding lies left of a row's first column.
        starts_R1 = self._device_starts()
        columns = torch.arange(self.base, self.end + 1, device=starts_R1.device)
        return (columns >= starts_R1).long()

    def _device_starts(self) -> Tensor:
        if self._starts_R1 is None:
            starts = self.starts[: self.num_rows, None].copy()
            self._starts_R1 = to_device(starts, self.slots[0].keys.device)
        return self._starts_R1
