"""The caches that a batch can run with: how prompts are computed, how rows begin with them, and how rows leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

from torch import Tensor

from .completion import Request
from .decoder import Decoder
from .kv_cache import PromptStates, SlotCache
from .lanes import bucket
from .paged_cache import PagedPrompt, PagedRows, PagePool, compute_prompts
from .planes import EightBitPlane, WholePlane
from .prefix_tree import PAGE
from .row_cache import RowCache, Rows

CacheKind = Literal["dynamic", "static", "paged", "int8"]

CACHES: Final[tuple[CacheKind, ...]] = get_args(CacheKind)
# Steps of fixed shapes that the host does not look into.
_BLIND_STEPS = 8


class Computed(NamedTuple):
    """A computed prompt.

    Args:
        logits_V: the scores after it.
        states: what its store needs to begin rows with it.
        reused: how many of its tokens were not computed again.
    """

    logits_V: Tensor
    states: Any
    reused: int


class Store(ABC):
    """A cache, and how prompts come into it.

    Args:
        num_rows: rows that run at once.
        steps: steps between two looks of the host.

    Attributes:
        fixed: whether steps have fixed shapes.
    """

    def __init__(self, num_rows: int, steps: int = 1) -> None:
        self.num_rows, self.steps, self.fixed = num_rows, steps, steps > 1

    @property
    @abstractmethod
    def cache(self) -> SlotCache | Rows:
        """The rows that run."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of storage."""

    @abstractmethod
    def compute(self, decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> list[Computed]:
        """Computes prompts."""

    def step(self, decoder: Decoder, tokens_N: Tensor, alive_N: Tensor | None) -> Tensor:
        """Computes one more token of every row; returns the scores after it, ``(N, V)``."""
        return decoder.step(tokens_N, self.cache, alive_N)

    @abstractmethod
    def admit(self, prompt: Computed, copies: int) -> None:
        """Appends rows that each begin with a prompt."""

    @abstractmethod
    def drop(self, prompt: Computed) -> None:
        """Is told that no more rows begin with a prompt."""

    @abstractmethod
    def keep(self, order: Sequence[int], leaving: Mapping[int, Sequence[int]]) -> None:
        """Keeps some rows, in a new order.

        Args:
            order: the rows that stay; see ``lanes.remaining``.
            leaving: the tokens of each row that leaves.
        """


class _StateStore(Store):
    """Copies the states of prompts into rows."""

    def __init__(self, make: Callable[[PromptStates], SlotCache | RowCache], num_rows: int, steps: int = 1) -> None:
        super().__init__(num_rows, steps)
        self._make = make
        self._cache: SlotCache | RowCache | None = None

    @property
    def cache(self) -> SlotCache | RowCache:
        """The rows that run."""
        if self._cache is None:
            raise RuntimeError("no row has been admitted")
        return self._cache

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return 0 if self._cache is None else self._cache.nbytes

    def compute(self, decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> list[Computed]:
        """Computes prompts."""
        logits_PV, states = decoder.prefill(prompts)
        return [
            Computed(logits_PV[n], (states, n, len(prompt), decoder.positions_ahead(prompt)), 0)
            for n, prompt in enumerate(prompts)
        ]

    def admit(self, prompt: Computed, copies: int) -> None:
        """Appends rows that each begin with a prompt."""
        states, index, length, ahead = prompt.states
        if self._cache is None:
            self._cache = self._make(states)
        if isinstance(self._cache, RowCache):
            self._cache.admit(states, index, length, copies, ahead)
        else:
            self._cache.admit(states, index, length, copies)

    def drop(self, prompt: Computed) -> None:
        """Does nothing: rows have copies."""

    def keep(self, order: Sequence[int], leaving: Mapping[int, Sequence[int]]) -> None:
        """Keeps some rows, in a new order."""
        self.cache.keep(order)


class _PagedStore(Store):
    """Lets rows share pages of a pool."""

    def __init__(self, pool: PagePool, num_rows: int) -> None:
        super().__init__(num_rows)
        self._cache = PagedRows(pool)

    @property
    def cache(self) -> PagedRows:
        """The rows that run."""
        return self._cache

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._cache.pool.nbytes

    def compute(self, decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> list[Computed]:
        """Computes prompts, as far as their beginnings are not in the pool."""
        found = compute_prompts(self._cache.pool, decoder, prompts)
        return [Computed(*each) for each in zip(*found, strict=True)]

    def admit(self, prompt: Computed, copies: int) -> None:
        """Appends rows that each begin with a prompt."""
        self._cache.admit(prompt.states, copies)

    def drop(self, prompt: Computed) -> None:
        """Releases the pages of a prompt."""
        pages: PagedPrompt = prompt.states
        self._cache.pool.release(pages.pages)

    def keep(self, order: Sequence[int], leaving: Mapping[int, Sequence[int]]) -> None:
        """Keeps some rows, in a new order; the pages of the others can be found again."""
        for row, tokens in leaving.items():
            self._cache.remember(row, tokens)
        self._cache.keep(order)


def make_store(
    kind: CacheKind,
    requests: Sequence[Request],
    max_tokens: int,
    pool: PagePool | None = None,
    *,
    spare: int = 0,
    own_lengths: bool = False,
) -> Store:
    """Makes the cache of a batch.

    Args:
        kind: which.
        requests: all samples of the batch.
        max_tokens: tokens of cache; one row always fits.
        pool: of ``paged``.
        spare: columns after a row's last, for tokens that may be taken back; rows then have lengths of their own with
            ``dynamic`` as well, so that they can be.
        own_lengths: whether rows have lengths of their own with ``dynamic``, whatever ``spare`` is.
    """
    longest = max(len(request.prompt) + request.limit for request in requests)
    count = min(len(requests), max(1, max_tokens // longest))
    if kind == "paged" and pool is not None:
        # A prompt is stored once for all its samples.
        prompts = sum(-(-len(prompt) // PAGE) for prompt in {request.prompt for request in requests})
        pages = prompts + sum(request.limit // PAGE + 2 for request in requests)
        return _PagedStore(pool, len(requests) if pages * PAGE <= max_tokens else count)
    if kind == "static":
        # The largest power of two of rows that fits, and no more than are needed.
        fitting = max(1, max_tokens // bucket(longest))
        count = min(bucket(len(requests)), bucket(fitting + 1) // 2)
        make = lambda _: RowCache(WholePlane, count, longest, fixed_shapes=True)  # noqa: E731
        return _StateStore(make, count, _BLIND_STEPS)
    if kind == "int8" or spare or own_lengths:
        plane = EightBitPlane if kind == "int8" else WholePlane
        return _StateStore(lambda _: RowCache(plane, count, longest + spare), count)

    # With refilled rows, columns keep advancing; spare ones make shifts back to the left rare.
    columns = max(len(request.prompt) for request in requests) + max(request.limit for request in requests)
    columns += longest if count < len(requests) else 0
    return _StateStore(lambda states: SlotCache(states, count, columns), count)
