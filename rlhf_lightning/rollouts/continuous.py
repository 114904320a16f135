"""Continuous batching: a prompt is computed once, its samples decode together, and finished rows make room for new ones.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache import SlotCache
from .completion import Track, draw
from .decoder import Decoder
from .sampling import SamplingParams

# Prompts wait until this share of the rows is free: a prefill for every single row that ends would cost more than it fills.
_REFILL_SHARE = 8


@dataclass
class _Group:
    """The samples of one prompt that have not begun, and, once it is computed, where the prompt lies."""

    prompt: tuple[int, ...]
    tracks: deque[Track]
    cache: DynamicCache | None = None
    logits_PV: Tensor | None = None
    index: int = 0


class ContinuousBatch:
    """Decodes any number of samples in a batch of bounded size.

    Args:
        decoder: the model.
        tracks: the samples to make, in any order.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        max_batch_tokens: tokens of cache, and of a prefill; one row, and one prompt, always fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        tracks: Sequence[Track],
        params: SamplingParams,
        stop_ids: Sequence[int],
        max_batch_tokens: int,
    ) -> None:
        groups: dict[tuple[int, ...], _Group] = {}
        for track in tracks:
            groups.setdefault(track.prompt, _Group(track.prompt, deque())).tracks.append(track)
        # Longest first: neighbours in a prefill differ little in length, and later prompts fit left of what is written.
        self._waiting = deque(sorted(groups.values(), key=lambda group: -len(group.prompt)))
        self._ready: deque[_Group] = deque()
        self._running: list[Track] = []
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self._budget = max_batch_tokens
        longest_row = max(len(track.prompt) + track.limit for track in tracks)
        self._capacity = min(len(tracks), max(1, max_batch_tokens // longest_row))
        self._columns = longest_row_columns(tracks, spare=longest_row if self._capacity < len(tracks) else 0)
        self._cache: SlotCache | None = None

    def run(self) -> None:
        """Makes all samples; the results are in the tracks."""
        while self._waiting or self._ready or self._running:
            self._admit()
            if self._running:
                self._step()

    def _step(self) -> None:
        assert self._cache is not None  # rows run only once they were admitted to it
        logits_NV = self._decoder.step([track.token_ids[-1] for track in self._running], self._cache)
        draw(logits_NV, self._running, self._params, self._stop_ids)
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is not None:
                self._cache.release(row)
                self._running[row] = self._running[-1]
                self._running.pop()

    def _admit(self) -> None:
        """Fills free rows with new samples; the scores after their prompts give their first tokens."""
        free = self._capacity - len(self._running)
        if self._running and free * _REFILL_SHARE < self._capacity:
            return
        while free > 0 and (self._ready or self._waiting):
            if not self._ready:
                self._prefill(free)
            batch: list[tuple[_Group, list[Track]]] = []
            while free > 0 and self._ready:
                group = self._ready[0]
                taken = [group.tracks.popleft() for _ in range(min(free, len(group.tracks)))]
                batch.append((group, taken))
                free -= len(taken)
                if not group.tracks:
                    self._ready.popleft()
            self._begin(batch)
            free = self._capacity - len(self._running)

    def _prefill(self, free: int) -> None:
        """Computes the next prompts: as many as the free rows need, within the token budget."""
        groups: list[_Group] = []
        width = len(self._waiting[0].prompt)
        while self._waiting and (not groups or (free > 0 and (len(groups) + 1) * width <= self._budget)):
            groups.append(self._waiting.popleft())
            free -= len(groups[-1].tracks)
        logits_PV, cache = self._decoder.prefill([group.prompt for group in groups])
        for index, group in enumerate(groups):
            group.cache, group.logits_PV, group.index = cache, logits_PV, index
        self._ready.extend(groups)
        if self._cache is None:
            self._cache = SlotCache(cache, self._capacity, self._columns)

    def _begin(self, batch: Sequence[tuple[_Group, list[Track]]]) -> None:
        """Draws first tokens and gives a row to each sample that they do not end."""
        rows_NV = [group.logits_PV[group.index].expand(len(taken), -1) for group, taken in batch]
        draw(torch.cat(rows_NV), [track for _, taken in batch for track in taken], self._params, self._stop_ids)
        for group, taken in batch:
            alive = [track for track in taken if track.finish_reason is None]
            if alive:
                self._cache.admit(group.cache, group.index, len(group.prompt), copies=len(alive))
                self._running.extend(alive)


def longest_row_columns(tracks: Sequence[Track], spare: int) -> int:
    """Columns that hold the longest prompt and the longest completion, and some to spare before columns are shifted."""
    return max(len(track.prompt) for track in tracks) + max(track.limit for track in tracks) + spare
