"""Loaders that shard themselves, count what was consumed, and resume exactly.

A pass over the data (an epoch) is a fixed order of rows, a function of seed and epoch alone, cut into global batches;
each rank gets every ``world_size``-th row of them. So neither the number of ranks nor an interruption changes the rows
of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..sequences.example import Example, ExampleBatch
from .files import RowSource

Couple = Callable[[list[Example]], list[Example]]


class BatchLoader(ABC):
    """Base class of loaders that yield one rank's share of each global batch and save their position.

    Iteration starts at the position. A batch counts as consumed when it is marked so (``batch.mark_consumed()``, at
    the end of the step that used it); for a consumer that never marks batches, a batch is consumed when it asks for
    the next one, and the last batch of an epoch when it receives it. After the last batch the position is the start of
    the next epoch. Restarting an unfinished iteration also begins the next epoch, as with any data loader; only a
    loaded position continues within one.

    Args:
        batch_size: rows in a global batch, over all ranks; at least 1.
        seed: seed of the order.
        rank: this process, from 0.
        world_size: how many processes there are.
        drop_last: drop a last batch of fewer rows; otherwise it is kept, and ranks without a row get an empty
            batch.
        limit: end an epoch after this many batches; ``len`` ignores it, since Lightning applies its own limit to the
            length.

    Raises:
        ValueError: for a batch size, rank or limit outside its range.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        limit: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}, expected 0 <= rank < world_size")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}, expected at least 1, or None for all")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.limit = limit
        self.contract: str | None = None  # of the datamodule that made the loader
        self._epoch = 0
        self._consumed = 0
        self._marks = False  # whether the consumer has ever marked a batch
        self._current: object | None = None  # the iteration that may move the position; none between two epochs

    @property
    def epoch(self) -> int:
        """The epoch of the next row to be consumed, from 0."""
        return self._epoch

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch before ``limit``; ``None`` if unknown."""
        raise TypeError(f"{type(self).__name__} does not know its rows")

    def __len__(self) -> int:
        num_rows = self.num_rows
        if num_rows is None:
            raise TypeError(f"{type(self).__name__} has no length: the number of rows of its source is unknown")
        full, rest = divmod(num_rows, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    @property
    def batch_sizes(self) -> list[int]:
        """Rows of each global batch of an epoch, up to ``limit``; empty where the number of rows is unknown."""
        if self.num_rows is None:
            return []
        sizes = [min(self.batch_size, self.num_rows - n * self.batch_size) for n in range(len(self))]
        return sizes[: self.limit]

    def __iter__(self) -> Iterator[ExampleBatch]:
        # A generator does nothing before its first `next`: Lightning makes iterators that it discards, and may load
        # the position after making the one that it keeps.
        if self._current is not None:
            self._next_epoch()
        current = self._current = object()
        for examples, stop, last in self._batches(self._epoch, self._consumed):
            # Modules mark a batch when its step is done; for other consumers, asking for the next batch is the mark.
            consumed = partial(self._advance, current, stop, last)
            if last and not self._marks:
                consumed()
            yield ExampleBatch(examples, on_consumed=partial(self._marked, consumed), contract=self.contract)
            if not self._marks:
                consumed()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position (epoch, consumed rows of it) and the identity of the data it refers to."""
        return {"epoch": self._epoch, "rows": self._consumed, "marks": self._marks, "data": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position; iterators made earlier no longer move it.

        Raises:
            ValueError: if the position refers to other data, another order or batches of another size.
        """
        now = self._identity()
        for key, before in state["data"].items():
            if now.get(key) != before:
                raise ValueError(
                    f"cannot resume on other data: {_READABLE.get(key, key)} was {before!r} in the checkpoint and is "
                    f"{now.get(key)!r} now; restore the old value, or start a new run from the checkpoint's weights"
                )

        # Batches of earlier iterators may still be marked: they no longer move the position.
        self._epoch, self._consumed, self._marks = int(state["epoch"]), int(state["rows"]), bool(state["marks"])
        self._current = None

    def _marked(self, consumed: Callable[[], None]) -> None:
        self._marks = True
        consumed()

    def _advance(self, iteration: object, stop: int, last: bool) -> None:
        if iteration is not self._current:
            return
        if last:
            self._next_epoch()
        else:
            self._consumed = max(self._consumed, stop)

    def _next_epoch(self) -> None:
        self._epoch, self._consumed, self._current = self._epoch + 1, 0, None

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Returns the properties that must be equal for a position to be valid."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[tuple[list[Example], int, bool]]:
        """Yields this rank's examples, the rows of the epoch consumed after them, and whether the batch is the last."""


_READABLE = {
    "fingerprint": "the rows' fingerprint",
    "num_rows": "the number of rows",
    "batch_size": "global_batch_size",
}


def epoch_order(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Draws the order of rows in an epoch: a permutation that depends on seed and epoch alone.

    Args:
        num_rows: how many rows there are.
        seed: at least 0.
        epoch: from 0.

    Returns:
        ``(num_rows,)`` row indices.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=1).tolist())
        [0, 1, 2, 3]
    """
    return epoch_draws(seed, epoch).permutation(num_rows)


def epoch_draws(seed: int, epoch: int) -> np.random.Generator:
    """Returns an epoch's random generator; no two pairs of seed and epoch have the same draws.

    ``SeedSequence`` treats ``[2**32, 0]`` like ``[0, 1]``: where a number exceeds one of its words, a digest is used.

    Args:
        seed: at least 0.
        epoch: from 0.
    """
    entropy = [seed, epoch]
    if max(entropy) >= 2**32:
        digest = blake2b(f"{seed}/{epoch}".encode(), digest_size=32).digest()
        entropy = [int.from_bytes(digest, "little")]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def by_prompt(order: npt.NDArray[np.int64], prompts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Moves all rows of a prompt up to its first row.

    Args:
        order: ``(num_rows,)`` row indices.
        prompts: ``(num_rows,)`` a number for each row's prompt.

    Returns:
        ``(num_rows,)`` row indices.

    Example:
        >>> by_prompt(np.array([2, 0, 3, 1]), np.array([5, 8, 5, 7])).tolist()
        [2, 0, 3, 1]
        >>> by_prompt(np.array([2, 1, 3, 0]), np.array([5, 8, 5, 7])).tolist()
        [2, 0, 1, 3]
    """
    _, first, group = np.unique(prompts[order], return_index=True, return_inverse=True)
    return order[np.argsort(first[group], kind="stable")]


class ExampleLoader(BatchLoader):
    """Loads batches of examples that are already tokenised.

    Args:
        examples: the examples; :class:`~rlhf_lightning.data.example_store.ExampleStore` takes the least memory.
        batch_size: examples in a global batch, over all ranks; at least 1.
        shuffle: draw a new order in each epoch.
        group_by_prompt: in each order, move examples of the same prompt next to the first of them; a rank's share of
            a batch is then a contiguous run instead of every ``world_size``-th example.
        seed: seed of the orders, at least 0.
        rank: this process, from 0.
        world_size: how many processes there are.
        drop_last: drop a last batch of fewer examples.
        limit: end an epoch after this many batches.
        couple: changes the examples of a *global* batch together, one for one, before a rank takes its share.
        fingerprint: identifies the examples when a position is loaded.

    Example:
        >>> from rlhf_lightning.sequences.example import Segment
        >>> rows = [Example(f"rows:{i}", Segment([i])) for i in range(1, 6)]
        >>> [[e.row_id for e in batch] for batch in ExampleLoader(rows, 2, shuffle=False, rank=1, world_size=2)]
        [['rows:2'], ['rows:4'], []]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        shuffle: bool = True,
        group_by_prompt: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        limit: int | None = None,
        couple: Couple | None = None,
        fingerprint: str = "",
    ) -> None:
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, limit=limit)
        self.examples = examples
        self.shuffle = shuffle
        self.group_by_prompt = group_by_prompt
        self.couple = couple
        self.fingerprint = fingerprint

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "group_by_prompt": self.group_by_prompt,
        }

    @cached_property
    def _prompts(self) -> npt.NDArray[np.int64]:
        """Prompt numbers of the examples, ``(num_rows,)``."""
        numbers: dict[bytes, int] = {}
        found = (numbers.setdefault(example.root.tokens.tobytes(), len(numbers)) for example in self.examples)
        return np.fromiter(found, np.int64, count=len(self.examples))

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        order = epoch_order(self.num_rows, self.seed, epoch) if self.shuffle else np.arange(self.num_rows)
        return by_prompt(order, self._prompts) if self.group_by_prompt else order

    def _share(self, size: int) -> slice:
        """Returns this rank's share of a global batch."""
        if not self.group_by_prompt:
            return slice(self.rank, None, self.world_size)
        # Neighbouring rows share a prompt: contiguous shares keep them on one rank.
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[list[Example], int, bool]]:
        order = self._order(epoch)
        number = len(self) if self.limit is None else min(len(self), self.limit)
        for batch in range(start // self.batch_size, number):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            stop = batch * self.batch_size + len(rows)
            # Coupling depends on the global batch, so every rank couples all of it and then takes its share.
            if self.couple is None:
                examples = [self.examples[row] for row in rows[self._share(len(rows))]]
            else:
                examples = self.couple([self.examples[row] for row in rows])[self._share(len(rows))]
            yield examples, stop, batch == number - 1


class StreamLoader(BatchLoader):
    """Loads batches of rows that are read and tokenised on demand.

    All ranks read the same rows in the same order and tokenise their own, so that they need not communicate. A row
    that yields no example leaves its place in the batch empty. On resume, rows up to the position are read again
    (which rebuilds the shuffle buffer), but not tokenised.

    Args:
        source: the rows, in a fixed order.
        make: makes the examples of one row, none to drop it; called with the row's id and the stored row.
        batch_size: rows in a global batch, over all ranks; at least 1.
        shuffle_buffer: rows among which the next one is drawn; below 2, rows come in the source's order. A row moves
            by about as many places; further only with its file or row group, which are reordered in each epoch.
        seed: seed of the draws, together with the epoch; at least 0.
        rank: this process, from 0.
        world_size: how many processes there are.
        drop_last: drop a last batch of fewer rows.
        limit: end an epoch after this many batches.
        couple: changes the examples of a *global* batch together, one for one; every rank then tokenises all of them.
    """

    def __init__(
        self,
        source: RowSource,
        make: Callable[[str, Any], list[Example]],
        batch_size: int,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        limit: int | None = None,
        couple: Couple | None = None,
    ) -> None:
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, limit=limit)
        self.source = source
        self.make = make
        self.shuffle_buffer = shuffle_buffer
        self.couple = couple

    @property
    def num_rows(self) -> int | None:
        """Number of rows of the source; ``None`` if unknown."""
        return self.source.num_rows

    def _identity(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "fingerprint": self.source.fingerprint,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def _rows(self, epoch: int) -> Iterator[tuple[str, Any]]:
        """Yields the rows of an epoch in order: each is drawn from a buffer and replaced by the source's next row."""
        if self.shuffle_buffer < 2:
            yield from self.source.raw()
            return
        draw = epoch_draws(self.seed, epoch)
        rows = self.source.shuffled(draw.spawn(1)[0])
        buffer = list(islice(rows, self.shuffle_buffer))
        for row in rows:
            place = int(draw.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = row
        for place in draw.permutation(len(buffer)):
            yield buffer[place]

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[list[Example], int, bool]]:
        rows = self._rows(epoch)
        number, stop = start // self.batch_size, start
        # Skips consumed rows; the buffer's draws are repeated on the way.
        next(islice(rows, start, start), None)
        following = list(islice(rows, self.batch_size))
        while following and not (self.drop_last and len(following) < self.batch_size):
            batch, following = following, list(islice(rows, self.batch_size))
            stop, number = stop + len(batch), number + 1
            complete = following and not (self.drop_last and len(following) < self.batch_size)
            last = not complete or number == self.limit
            yield self._examples(batch), stop, last
            if last:
                return

    def _examples(self, batch: list[tuple[str, Any]]) -> list[Example]:
        if self.couple is None:
            return [example for row in batch[self.rank :: self.world_size] for example in self.make(*row)]
        slots = [(slot, example) for slot, row in enumerate(batch) for example in self.make(*row)]
        coupled = self.couple([example for _, example in slots])
        return [
            example for (slot, _), example in zip(slots, coupled, strict=True) if slot % self.world_size == self.rank
        ]
