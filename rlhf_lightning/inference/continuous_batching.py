"""Continuous batching: a prompt is computed once, its samples decode together, finished rows make room for new ones.

Legend: N rows of the batch, P prompts of a prefill, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .completion import Track, draw
from .decoder import Decoder
from .kv_cache import PromptStates, SlotCache
from .sampling import SamplingParams

# Prompts wait until this fraction of the rows is free: a prefill for every row that ends costs more than it fills.
_REFILL_FRACTION = 1 / 8


@dataclass
class _Computed:
    """A prefilled prompt with its samples that have not begun."""

    states: PromptStates
    index: int
    length: int
    logits_V: Tensor
    tracks: deque[Track]


class ContinuousBatch:
    """Decodes any number of samples in a batch of bounded size.

    Args:
        decoder: the model.
        tracks: the samples to make, at least one, in any order.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        max_batch_tokens: maximum tokens of cache, and of a prefill; one row, and one prompt, always fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        tracks: Sequence[Track],
        params: SamplingParams,
        stop_ids: Sequence[int],
        max_batch_tokens: int,
    ) -> None:
        by_prompt: dict[tuple[int, ...], deque[Track]] = {}
        for track in tracks:
            by_prompt.setdefault(track.prompt, deque()).append(track)
        # Longest first: neighbours in a prefill differ little in length, and later prompts fit left of written columns.
        self._waiting = deque(sorted(by_prompt.items(), key=lambda item: -len(item[0])))
        self._computed: deque[_Computed] = deque()
        self._running: list[Track] = []
        self._cache: SlotCache | None = None
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self._budget = max_batch_tokens
        longest_row = max(len(track.prompt) + track.limit for track in tracks)
        self._num_rows = min(len(tracks), max(1, max_batch_tokens // longest_row))
        # With refilled rows, columns keep advancing; spare ones make shifts back to the left rare.
        self._num_columns = max(map(len, by_prompt)) + max(track.limit for track in tracks)
        self._num_columns += longest_row if self._num_rows < len(tracks) else 0

    def run(self) -> None:
        """Generates all samples; the results are in the tracks."""
        while self._waiting or self._computed or self._running:
            self._admit()
            if self._running and self._cache is not None:
                self._step(self._cache)

    def _step(self, cache: SlotCache) -> None:
        logits_NV = self._decoder.step([track.token_ids[-1] for track in self._running], cache)
        draw(logits_NV, self._running, self._params, self._stop_ids)
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is not None:
                cache.release(row)
                self._running[row] = self._running[-1]
                self._running.pop()

    def _admit(self) -> None:
        """Fills free rows with new samples."""
        free = self._num_rows - len(self._running)
        if self._running and free < self._num_rows * _REFILL_FRACTION:
            return
        while free > 0 and (self._computed or self._waiting):
            if not self._computed:
                self._prefill(free)
            chosen: list[tuple[_Computed, list[Track]]] = []
            while free > 0 and self._computed:
                prompt = self._computed[0]
                chosen.append((prompt, [prompt.tracks.popleft() for _ in range(min(free, len(prompt.tracks)))]))
                free -= len(chosen[-1][1])
                if not prompt.tracks:
                    self._computed.popleft()
            self._begin(chosen)
            free = self._num_rows - len(self._running)

    def _prefill(self, free: int) -> None:
        """Computes the next prompts: as many as the free rows need, within the token budget."""
        group: list[tuple[tuple[int, ...], deque[Track]]] = []
        width = len(self._waiting[0][0])
        while self._waiting and (not group or (free > 0 and (len(group) + 1) * width <= self._budget)):
            group.append(self._waiting.popleft())
            free -= len(group[-1][1])
        logits_PV, states = self._decoder.prefill([prompt for prompt, _ in group])
        for index, (prompt, tracks) in enumerate(group):
            self._computed.append(_Computed(states, index, len(prompt), logits_PV[index], tracks))

    def _begin(self, chosen: Sequence[tuple[_Computed, list[Track]]]) -> None:
        """Draws first tokens from the logits after the prompts; samples that continue get a row each."""
        logits_NV = torch.cat([prompt.logits_V.expand(len(tracks), -1) for prompt, tracks in chosen])
        draw(logits_NV, [track for _, tracks in chosen for track in tracks], self._params, self._stop_ids)
        for prompt, tracks in chosen:
            going_on = [track for track in tracks if track.finish_reason is None]
            if not going_on:
                continue
            if self._cache is None:
                self._cache = SlotCache(prompt.states, self._num_rows, self._num_columns)
            self._cache.admit(prompt.states, prompt.index, prompt.length, copies=len(going_on))
            self._running.extend(going_on)
