"""Rows of a source that filters keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from ..utils.progress import progress
from .files import FilteredRowError, RowSource
from .filters import Row, RowFilter


class FilteredRows(RowSource):
    """Applies filters to the rows of a source.

    Args:
        inner: the source.
        filters: applied in order.
    """

    def __init__(self, inner: RowSource, filters: Sequence[RowFilter]) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.filters = list(filters)
        for each in self.filters:
            each.prepare()

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored, each with its id, by which repeated ones are known."""
        for row_id, stored in self.inner.raw():
            yield row_id, (row_id, stored)

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored, the source's parts in a random order."""
        for row_id, stored in self.inner.shuffled(draw):
            yield row_id, (row_id, stored)

    def parse(self, stored: tuple[str, Any]) -> Row:
        """Makes a dictionary of a stored row and filters it."""
        row_id, inner = stored
        return self._filtered(self.inner.parse(inner), lambda number, row: row_id in self._repeated[number])

    @property
    def num_rows(self) -> int | None:
        """Number of rows, including rows that will be dropped."""
        return self.inner.num_rows

    @property
    def fingerprint(self) -> str:
        """A digest of the rows and of the filters."""
        named = "\n".join([self.inner.fingerprint, *(each.fingerprint for each in self.filters)])
        return blake2b(named.encode(), digest_size=16).hexdigest()

    def _filtered(self, row: Row, is_repeated: Callable[[int, Row], bool]) -> Row:
        """Returns the row that filters leave, or raises under the label of the one that drops it."""
        for number, each in enumerate(self.filters):
            kept = None if is_repeated(number, row) else each(row)
            if kept is None:
                raise FilteredRowError(each.label)
            row = kept
        return row

    @cached_property
    def _repeated(self) -> list[set[str]]:
        """For each filter, the ids of the rows that repeat an earlier one: found in the source's order, once."""
        found: list[set[str]] = [set() for _ in self.filters]
        memories = [each.repeats() for each in self.filters]
        if not any(memories):
            return found
        for row_id, stored in progress(self.inner.raw(), f"comparing {self.name}", self.inner.num_rows):

            def is_repeated(number: int, row: Row, row_id: str = row_id) -> bool:
                memory = memories[number]
                if memory is None or not memory(row):
                    return False
                found[number].add(row_id)
                return True

            # Dropped and bad rows do not count as first occurrences; they are counted when they are read.
            try:
                self._filtered(self.inner.parse(stored), is_repeated)
            except (FilteredRowError, ValueError):
                continue
        return found
