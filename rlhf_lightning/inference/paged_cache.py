"""A key/value cache in pages of 16 tokens, which rows with the same beginning share, also from one call to the next.

Pages are kept by the tokens that they hold (``prefix_tree.PrefixTree``). They belong to one state of the weights:
whoever owns the pool clears it when that changes. Before attention a layer's pages are gathered row by row, so that any
kernel can read them.

Legend: N rows of a forward, Q new tokens, H key/value heads, P pages of storage, B pages of the longest row, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import Decoder
from .kv_cache import PromptStates
from .lanes import to_device
from .prefix_tree import PAGE, PrefixTree
from .row_cache import Rows

# The page that is written where nothing is read.
_UNREAD = 0
_FIRST_PAGES = 64  # of storage, which doubles when it is full


@dataclass
class PagedPrompt:
    """A computed prompt: its pages, which it holds until it is dropped.

    Args:
        pages: in order; the last may have room.
        length: number of tokens.
    """

    pages: list[int]
    length: int


class PagePool:
    """Storage of pages, who holds them, and the tree of the pages that can be found again.

    Args:
        max_pages: pages within which storage grows, and beyond which pages that no row holds are given up; rows that
            need more get more.
    """

    def __init__(self, max_pages: int) -> None:
        self.max_pages = max_pages
        self.tree = PrefixTree()
        self.evictions = 0
        self.peak = 0
        self.places = 0  # of all steps' rows
        self.empty_places = 0
        self._layers: list[tuple[Tensor, Tensor]] = []  # (H, P, 16, D) each
        self._holders = np.zeros(1, dtype=np.int64)
        self._free: list[int] = []

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``(H, P, 16, D)``."""
        return self._layers

    @property
    def pages_held(self) -> int:
        """Pages that a row or the tree holds."""
        return int((self._holders > 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(states.nbytes for layer in self._layers for states in layer)

    def statistics(self) -> dict[str, float]:
        """Pages held now, at most, and by the tree; pages given up; and the share of rows' places without a token."""
        return {
            "pages": self.pages_held,
            "pages_peak": self.peak,
            "pages_cached": len(self.tree),
            "evictions": self.evictions,
            "fragmentation": self.empty_places / max(1, self.places),
        }

    def allocate(self, count: int, like: PromptStates | None = None) -> list[int]:
        """Returns pages that nothing holds yet, held once.

        Args:
            count: their number.
            like: states that give layers, heads, sizes and precision; needed the first time.
        """
        if not self._layers and like is not None:
            for keys, values in like:
                self._layers.append((_empty(keys), _empty(values)))
        found = []
        for _ in range(count):
            if not self._free:
                self._make_room()
            found.append(self._free.pop())
        self.retain(found)
        self.peak = max(self.peak, self.pages_held)
        return found

    def _make_room(self) -> None:
        size = len(self._holders)
        wanted = min(2 * size, self.max_pages + 1) if size > 1 else min(_FIRST_PAGES, self.max_pages + 1)
        if wanted <= size:
            page = self.tree.give_up(lambda page: self._holders[page] == 1)
            if page is not None:
                self.evictions += 1
                self.release([page])
                return
            wanted = size + 1
        more = wanted - size
        self._layers = [(_longer(keys, more), _longer(values, more)) for keys, values in self._layers]
        self._holders = np.concatenate((self._holders, np.zeros(more, dtype=np.int64)))
        self._free = list(range(wanted - 1, size - 1, -1))

    def retain(self, pages: Sequence[int]) -> None:
        """Holds pages once more."""
        np.add.at(self._holders, np.array(pages, dtype=np.int64), 1)

    def release(self, pages: Sequence[int]) -> None:
        """Holds pages once less; pages that nothing holds any more are free."""
        np.subtract.at(self._holders, np.array(pages, dtype=np.int64), 1)
        self._free += [page for page in dict.fromkeys(pages) if self._holders[page] == 0]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies what pages hold."""
        device = self._layers[0][0].device
        both = to_device(np.array((sources, targets), dtype=np.int64), device)
        for layer in self._layers:
            for states in layer:
                states[:, both[1]] = states[:, both[0]]

    def fill(self, pages: Sequence[int], prompts: PromptStates, index: int, length: int) -> None:
        """Writes a prompt of a left-padded batch into its pages."""
        device = self._layers[0][0].device
        slots = (np.array(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()[:length]
        slots_L = to_device(slots, device)
        for layer, given in zip(self._layers, prompts, strict=True):
            for states, states_PHLD in zip(layer, given, strict=True):
                states.flatten(1, 2)[:, slots_L] = states_PHLD[index, :, -length:]


def _empty(states_PHLD: Tensor) -> Tensor:
    """Storage that has only the page that is not read."""
    return states_PHLD.new_zeros((states_PHLD.shape[1], 1, PAGE, states_PHLD.shape[3]))


def _longer(states: Tensor, more: int) -> Tensor:
    heads, _, size, width = states.shape
    return torch.cat((states, states.new_zeros((heads, more, size, width))), dim=1)


class PagedRows(Rows):
    """Rows whose tokens lie in pages of a pool.

    Args:
        pool: the pages.

    Attributes:
        tables: the pages of each row.
    """

    def __init__(self, pool: PagePool) -> None:
        super().__init__()
        self.pool = pool
        self.tables: list[list[int]] = []
        self._table_NB: Tensor | None = None
        self._slots = torch.empty(0)
        self._gathered: dict[int, Tensor] = {}

    def add(self, pages: list[int], length: int) -> None:
        """Appends a row that takes over pages."""
        if not self.layers:
            self._add_layers(len(self.pool.layers))
            self.device = self.pool.layers[0][0].device
        self.tables.append(pages)
        self.lengths = np.append(self.lengths[: self.num_rows], length)
        self.num_rows += 1
        self._lengths_N1 = self._table_NB = None

    def admit(self, prompt: PagedPrompt, copies: int) -> None:
        """Appends rows that begin with a prompt: they share its full pages, and copy the one that has room."""
        full = prompt.length // PAGE
        shared, partial = prompt.pages[:full], prompt.pages[full:]
        own = self.pool.allocate(copies * len(partial))
        if own:
            self.pool.copy(partial * copies, own)
        for number in range(copies):
            self.pool.retain(shared)
            self.add([*shared, *own[number : number + len(partial)]], prompt.length)

    def keep(self, order: Sequence[int]) -> None:
        """Keeps some rows, in a new order; the others' pages are released."""
        for row in set(range(self.num_rows)) - set(order):
            self.pool.release(self.tables[row])
        self.tables = [self.tables[row] for row in order]
        self.lengths = self.lengths[list(order)]
        self.num_rows = len(order)
        self._lengths_N1 = self._table_NB = None

    def remember(self, row: int, tokens: Sequence[int]) -> None:
        """Lets later prompts find the pages of a row.

        Args:
            row: its index.
            tokens: its tokens; tokens without keys and values yet are skipped.
        """
        self.pool.retain(self.pool.tree.insert(tokens[: int(self.lengths[row])], self.tables[row]))

    def begin(self, counts: Sequence[int] | None = None, alive_N: Tensor | None = None) -> dict[str, object]:
        """Prepares a forward of new tokens, for which it allocates pages; see ``Rows.begin``."""
        for row, table in enumerate(self.tables):
            missing = -(-(int(self.lengths[row]) + (1 if counts is None else counts[row])) // PAGE) - len(table)
            if missing > 0:
                table += self.pool.allocate(missing)
                self._table_NB = None
        places = PAGE * sum(map(len, self.tables))
        self.pool.places += places
        self.pool.empty_places += places - int(self.lengths[: self.num_rows].sum())
        return super().begin(counts, alive_N)

    def exchange(self, layer: int, keys_NHQD: Tensor, values_NHQD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new tokens; returns all its keys and values, ``(N, H, C, D)``."""
        stored = self.pool.layers[layer]
        for states, new_NHQD in zip(stored, (keys_NHQD, values_NHQD), strict=True):
            states.flatten(1, 2)[:, self._slots] = new_NHQD.transpose(0, 1).flatten(1, 2).to(states.dtype)
        return self._gather(stored[0]), self._gather(stored[1])

    def _gather(self, states_HPXD: Tensor) -> Tensor:
        heads, pages, _, size = states_HPXD.shape
        if heads not in self._gathered:
            first_H = torch.arange(heads, device=self.device) * pages
            self._gathered[heads] = self._device_table()[:, None] + first_H[:, None]
        # Whole pages are rows of a look-up, once for every head.
        found = F.embedding(self._gathered[heads], states_HPXD.reshape(heads * pages, PAGE * size))
        return found.view(len(found), heads, -1, size)[:, :, : self._width]

    def _place(self, columns_NQ: Tensor, written_NQ: Tensor | None) -> None:
        self._gathered = {}
        page_NQ = self._device_table().gather(1, columns_NQ // PAGE)
        slots_NQ = page_NQ * PAGE + columns_NQ % PAGE
        self._slots = (slots_NQ if written_NQ is None else slots_NQ.where(written_NQ, _UNREAD)).flatten()

    def _device_table(self) -> Tensor:
        if self._table_NB is None:
            table = np.zeros((self.num_rows, max(map(len, self.tables))), dtype=np.int64)
            for row, pages in enumerate(self.tables):
                table[row, : len(pages)] = pages
            self._table_NB = to_device(table, self.device)
        return self._table_NB


def compute_prompts(
    pool: PagePool, decoder: Decoder, prompts: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[PagedPrompt], list[int]]:
    """Computes prompts as far as their beginnings are not in the pool.

    Returns:
        The scores after each, ``(V,)``; their pages; and how many tokens of each were found.
    """
    scores: dict[int, Tensor] = {}
    computed: dict[int, PagedPrompt] = {}
    found: dict[int, int] = {}
    # Prompts that begin like an earlier one of the same group wait until that is in the pool.
    first: list[int] = []
    begun: set[tuple[int, ...]] = set()
    for number, prompt in enumerate(prompts):
        next_page = len(pool.tree.match(prompt[:-1])) + 1
        beginning = tuple(prompt[: next_page * PAGE])
        if len(prompt) <= next_page * PAGE or beginning not in begun:
            first.append(number)
        begun.add(beginning)
    for group in (first, [number for number in range(len(prompts)) if number not in set(first)]):
        known = {number: pool.tree.match(prompts[number][:-1]) for number in group}
        for pages in known.values():
            pool.retain(pages)
        found |= {number: len(pages) * PAGE for number, pages in known.items()}
        for numbers, compute in (
            ([number for number in group if not known[number]], _compute_cold),
            ([number for number in group if known[number]], _compute_warm),
        ):
            if numbers:
                given = [prompts[number] for number in numbers]
                logits_PV, made = compute(pool, decoder, given, [known[number] for number in numbers])
                for number, logits_V, one in zip(numbers, logits_PV, made, strict=True):
                    scores[number], computed[number] = logits_V, one
                    pool.retain(pool.tree.insert(prompts[number], one.pages))
    order = range(len(prompts))
    return [scores[n] for n in order], [computed[n] for n in order], [found[n] for n in order]


def _compute_cold(
    pool: PagePool, decoder: Decoder, prompts: Sequence[Sequence[int]], known: Sequence[list[int]]
) -> tuple[Tensor, list[PagedPrompt]]:
    logits_PV, states = decoder.prefill(prompts)
    made = []
    for index, prompt in enumerate(prompts):
        pages = pool.allocate(-(-len(prompt) // PAGE), like=states)
        pool.fill(pages, states, index, len(prompt))
        made.append(PagedPrompt(pages, len(prompt)))
    return logits_PV, made


def _compute_warm(
    pool: PagePool, decoder: Decoder, prompts: Sequence[Sequence[int]], known: Sequence[list[int]]
) -> tuple[Tensor, list[PagedPrompt]]:
    rows = PagedRows(pool)
    for pages in known:
        rows.add(list(pages), len(pages) * PAGE)
    rest = [prompt[len(pages) * PAGE :] for prompt, pages in zip(prompts, known, strict=True)]
    logits_PV = decoder.finish(rest, rows)
    return logits_PV, [PagedPrompt(table, len(prompt)) for table, prompt in zip(rows.tables, prompts, strict=True)]
