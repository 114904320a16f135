"""A buffer of what comes back later, drawn by priority: completions of GRPO and PPO, rows of earlier rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..inference import derive_seed


class Kept(Protocol):
    """Has a time and a priority, and may be kept."""

    @property
    def iteration(self) -> int:
        """When it came."""

    @property
    def priority(self) -> float:
        """How much it deserves to come back, above 0."""


KeptT = TypeVar("KeptT", bound=Kept)


class PriorityBuffer(Generic[KeptT]):
    """Keeps records, and draws some of them.

    Of more than ``capacity``, those with the lowest priority leave, of equals the oldest.

    Args:
        capacity: largest number of records.
        seed: of the draws.
        max_age: iterations after which a record leaves, at least 1; ``None`` for no limit.

    Attributes:
        records: in the order in which they came.

    Example:
        >>> from collections import namedtuple
        >>> Note = namedtuple("Note", "iteration priority text")
        >>> buffer = PriorityBuffer(capacity=2, seed=0)
        >>> buffer.add([Note(0, 1.0, "a"), Note(0, 0.5, "b"), Note(0, 2.0, "c")])
        >>> [note.text for note in buffer.draw(5, iteration=1)]
        ['a', 'c']
    """

    def __init__(self, capacity: int, seed: int, *, max_age: int | None = None) -> None:
        self.capacity, self.seed, self.max_age = capacity, seed, max_age
        self.records: list[KeptT] = []

    def draw(self, count: int, iteration: int) -> list[KeptT]:
        """Draws different records, in proportion to their priority; those above the maximum age leave first.

        One after the other without replacement, by exponential keys (Efraimidis and Spirakis, 2006).

        Args:
            count: at most this many.
            iteration: number of this one, which the draw depends on.

        Returns:
            The drawn ones, which stay in the buffer, in the order in which they came.
        """
        if self.max_age is not None:
            oldest = iteration - self.max_age
            self.records = [record for record in self.records if record.iteration >= oldest]
        rng = np.random.default_rng(derive_seed(self.seed, iteration, "replay"))
        keys = rng.exponential(size=len(self.records)) / np.array([record.priority for record in self.records])
        return [self.records[place] for place in sorted(np.argsort(keys, kind="stable")[:count].tolist())]

    def add(self, records: Sequence[KeptT]) -> None:
        """Keeps records, as many as there is room for."""
        self.records += records
        order = sorted(range(len(self.records)), key=lambda n: (-self.records[n].priority, -n))
        self.records = [self.records[n] for n in sorted(order[: self.capacity])]
