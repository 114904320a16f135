"""Continuous batching: a prompt is computed once, its samples decode together, new rows replace finished ones.

Legend: N rows of the batch, P prompts of a prefill, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .completion import Request
from .decoder import Decoder
from .kv_cache import PromptStates, SlotCache
from .lanes import Lanes, read, remaining
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
    requests: deque[Request]


class ContinuousBatch:
    """Decodes any number of samples in a batch of bounded size.

    Args:
        decoder: the model.
        requests: the samples to make, at least one, in any order.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        max_batch_tokens: maximum tokens of cache, and of a prefill; one row, and one prompt, always fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        max_batch_tokens: int,
    ) -> None:
        by_prompt: dict[tuple[int, ...], deque[Request]] = {}
        for request in requests:
            by_prompt.setdefault(request.prompt, deque()).append(request)
        # Longest first: neighbours in a prefill differ little in length, and later prompts fit left of written columns.
        self._waiting = deque(sorted(by_prompt.items(), key=lambda item: -len(item[0])))
        self._computed: deque[_Computed] = deque()
        self._running: list[Request] = []
        self._cache: SlotCache | None = None
        self._lanes: Lanes | None = None
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self._budget = max_batch_tokens
        longest_row = max(len(request.prompt) + request.limit for request in requests)
        self._num_rows = min(len(requests), max(1, max_batch_tokens // longest_row))
        # With refilled rows, columns keep advancing; spare ones make shifts back to the left rare.
        self._num_columns = max(map(len, by_prompt)) + max(request.limit for request in requests)
        self._num_columns += longest_row if self._num_rows < len(requests) else 0

    def run(self) -> None:
        """Generates all samples; the results are in the requests."""
        while self._waiting or self._computed or self._running:
            self._admit()
            if self._running and self._cache is not None and self._lanes is not None:
                self._step(self._cache, self._lanes)

    def _step(self, cache: SlotCache, lanes: Lanes) -> None:
        """Draws one more token of every running sample; those that it ends leave."""
        read([lanes.draw(self._decoder.step(lanes.tokens_N, cache))], self._running, self._params)
        leaving = [row for row, request in enumerate(self._running) if request.finish_reason is not None]
        if leaving:
            order = remaining(len(self._running), leaving)
            cache.keep(order)
            lanes.keep(order)
            self._running = [self._running[row] for row in order]

    def _admit(self) -> None:
        """Fills free rows with new samples."""
        free = self._num_rows - len(self._running)
        if self._running and free < self._num_rows * _REFILL_FRACTION:
            return
        while free > 0 and (self._computed or self._waiting):
            if not self._computed:
                self._prefill(free)
            # One draw for all first tokens, whichever prompt they belong to.
            chosen: list[tuple[_Computed, list[Request]]] = []
            while free > 0 and self._computed:
                prompt = self._computed[0]
                chosen.append((prompt, [prompt.requests.popleft() for _ in range(min(free, len(prompt.requests)))]))
                free -= len(chosen[-1][1])
                if not prompt.requests:
                    self._computed.popleft()
            self._begin(chosen)
            free = self._num_rows - len(self._running)

    def _prefill(self, free: int) -> None:
        """Computes the next prompts: as many as the free rows need, within the token budget."""
        group: list[tuple[tuple[int, ...], deque[Request]]] = []
        # The longest prompt comes first, so that its length is the width of the whole group.
        width = len(self._waiting[0][0])
        while self._waiting and (not group or (free > 0 and (len(group) + 1) * width <= self._budget)):
            group.append(self._waiting.popleft())
            free -= len(group[-1][1])
        logits_PV, states = self._decoder.prefill([prompt for prompt, _ in group])
        for index, (prompt, requests) in enumerate(group):
            self._computed.append(_Computed(states, index, len(prompt), logits_PV[index], requests))

    def _begin(self, chosen: Sequence[tuple[_Computed, list[Request]]]) -> None:
        """Draws first tokens from the logits after the prompts; samples that continue get a row each."""
        logits_NV = torch.cat([prompt.logits_V.expand(len(requests), -1) for prompt, requests in chosen])
        begun = [request for _, requests in chosen for request in requests]
        lanes = Lanes(begun, self._params, self._stop_ids, logits_NV.device, logits_NV.shape[-1])
        read([lanes.draw(logits_NV)], begun, self._params)

        # Those that ended with their first token need no row.
        lanes.keep([row for row, request in enumerate(begun) if request.finish_reason is None])
        if self._lanes is None:
            self._lanes = lanes
        else:
            self._lanes.append(lanes)
        for prompt, requests in chosen:
            continuing = [request for request in requests if request.finish_reason is None]
            if continuing and self._cache is None:
                self._cache = SlotCache(prompt.states, self._num_rows, self._num_columns)
            if continuing and self._cache is not None:
                self._cache.admit(prompt.states, prompt.index, prompt.length, copies=len(continuing))
                self._running.extend(continuing)
