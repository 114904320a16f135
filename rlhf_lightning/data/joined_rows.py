"""Several sources of rows read as one, with an id of its own for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from .files import RowSource


class JoinedRows(RowSource):
    """Concatenates several sources.

    Args:
        name: their common name.
        parts: the sources, whose row ids are kept.
    """

    def __init__(self, name: str, parts: Sequence[RowSource]) -> None:
        super().__init__(name)
        self.parts = list(parts)

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Yields the rows as they are stored, each with the source that can parse it."""
        for part in self.parts:
            for row_id, stored in part.raw():
                yield row_id, (part, stored)

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Yields the rows with the parts, and the parts of these, in a random order."""
        for number in draw.permutation(len(self.parts)).tolist():
            for row_id, stored in self.parts[number].shuffled(draw):
                yield row_id, (self.parts[number], stored)

    def parse(self, stored: tuple[RowSource, Any]) -> dict[str, Any]:
        """Makes a dictionary of a stored row."""
        part, inner = stored
        return part.parse(inner)

    @property
    def num_rows(self) -> int | None:
        """The sum over the parts; ``None`` if one is unknown."""
        counts = [part.num_rows for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def fingerprint(self) -> str:
        """A digest of the parts' digests."""
        return blake2b("\n".join(part.fingerprint for part in self.parts).encode(), digest_size=16).hexdigest()


def distinct(sources: Iterable[RowSource]) -> list[RowSource]:
    """Gives the rows of sources that are read together distinct ids.

    Ids of the first source of a name stay as they are; those of the second one, such as another split of a dataset, or
    the same file once more, end with ``#2``.

    Example:
        >>> from rlhf_lightning.data.sources import open_source
        >>> first, second = distinct([open_source([{"n": 1}]), open_source([{"n": 2}])])
        >>> [*first, *second]
        [('memory:1', {'n': 1}), ('memory:1#2', {'n': 2})]
    """
    seen: Counter[str] = Counter()
    found: list[RowSource] = []
    for source in sources:
        names = Counter(_names(source))
        if before := max(seen[name] for name in names):
            found.append(_Again(source, before + 1))
            seen |= Counter(dict.fromkeys(names, before + 1))
        else:
            found.append(source)
            seen |= names
    return found


def _names(source: RowSource) -> list[str]:
    """The names that ids of rows begin with."""
    if isinstance(source, JoinedRows):
        return [name for part in source.parts for name in _names(part)]
    inner = getattr(source, "inner", None)
    return [source.name] if inner is None else _names(inner)


class _Again(JoinedRows):
    """Gives the rows of a source whose name another one has taken ids of their own."""

    def __init__(self, part: RowSource, time: int) -> None:
        super().__init__(part.name, [part])
        self.time = time

    def raw(self) -> Iterator[tuple[str, Any]]:
        for row_id, stored in super().raw():
            yield f"{row_id}#{self.time}", stored

    def shuffled(self, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
        for row_id, stored in super().shuffled(draw):
            yield f"{row_id}#{self.time}", stored
