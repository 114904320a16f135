"""Continuous batching: a prompt is computed once, its samples decode together, new rows replace finished ones.

Legend: N rows of the batch, P prompts of a prefill, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .completion import Request
from .decoder import Decoder
from .kv_cache import SlotCache
from .lanes import Lanes, read, remaining
from .sampling import SamplingParams
from .speculation import Speculator
from .stores import Computed, Store

# Prompts wait until this fraction of the rows is free: a prefill for every row that ends costs more than it fills.
_REFILL_FRACTION = 1 / 8


@dataclass
class Counts:
    """Counts of an engine's work.

    Args:
        prompts: distinct prompts of each call.
        prompt_tokens: their tokens.
        reused_tokens: tokens among them that were not computed again.
        hits: prompts whose beginning was not computed again.
        new_tokens: tokens of completions.
        steps: forwards of one more token, or of drafts.
        rows: rows of these forwards.
        prefill_seconds: seconds of computing prompts and drawing first tokens.
        decode_seconds: seconds of all other tokens.
        cache_bytes: largest storage of keys and values.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    hits: int = 0
    new_tokens: int = 0
    steps: int = 0
    rows: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0

    def add(self, requests: Sequence[Request], seconds: float) -> None:
        """Counts finished samples that were made one by one, their seconds as those of ``decode_seconds``."""
        distinct = {request.prompt for request in requests}
        self.prompts += len(distinct)
        self.prompt_tokens += sum(map(len, distinct))
        self.new_tokens += sum(len(request.token_ids) for request in requests)
        self.decode_seconds += seconds

    def as_dict(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)


@dataclass
class _Waiting:
    """A computed prompt with its samples that have not begun."""

    computed: Computed
    requests: deque[Request]


class ContinuousBatch:
    """Decodes any number of samples in a batch of bounded size.

    Args:
        decoder: the model.
        requests: the samples to make, at least one, in any order.
        params: the sampling settings.
        stop_ids: tokens that end a sample.
        store: the cache.
        max_batch_tokens: maximum tokens of a prefill; one prompt always fits.
        counts: what was done is added to these.
        speculator: gives rows several tokens at once; without one, steps are plain.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        store: Store,
        max_batch_tokens: int,
        counts: Counts,
        speculator: Speculator | None = None,
    ) -> None:
        by_prompt: dict[tuple[int, ...], deque[Request]] = {}
        for request in requests:
            by_prompt.setdefault(request.prompt, deque()).append(request)
        # Longest first: neighbours in a prefill differ little in length, and later prompts fit left of written columns.
        self._waiting = deque(sorted(by_prompt.items(), key=lambda item: -len(item[0])))
        self._computed: deque[_Waiting] = deque()
        self._running: list[Request] = []
        self._lanes: Lanes | None = None
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self._store, self._budget, self._counts = store, max_batch_tokens, counts
        self._speculator = speculator

    def run(self) -> None:
        """Generates all samples; the results are in the requests."""
        while self._waiting or self._computed or self._running:
            start = time.perf_counter()
            self._admit()
            self._counts.prefill_seconds += time.perf_counter() - start
            if self._running and self._lanes is not None:
                start = time.perf_counter()
                self._advance(self._lanes)
                self._leave(self._lanes)
                self._counts.decode_seconds += time.perf_counter() - start
        self._counts.cache_bytes = max(self._counts.cache_bytes, self._store.nbytes)

    def _advance(self, lanes: Lanes) -> None:
        """Draws the next tokens of every running sample."""
        cache = self._store.cache
        if self._speculator is None or isinstance(cache, SlotCache):
            self._plain(lanes)
            return
        before = sum(len(request.token_ids) for request in self._running)
        checked = self._speculator.step(self._running, cache, lanes)
        if not checked:
            start = time.perf_counter()
            self._plain(lanes)
            self._speculator.observe_plain(len(self._running), time.perf_counter() - start)
            return
        self._counts.steps += 1
        self._counts.rows += len(self._running)
        self._counts.new_tokens += sum(len(request.token_ids) for request in self._running) - before

    def _plain(self, lanes: Lanes) -> None:
        """Draws one token of every running sample, or as many as the store's shapes stay fixed for."""
        drawn = []
        for _ in range(self._store.steps):
            logits_NV = self._store.step(self._decoder, lanes.tokens_N, lanes.alive_N)
            drawn.append(lanes.draw(logits_NV))
            self._counts.steps += 1
            self._counts.rows += len(logits_NV)
        self._read(drawn, self._running)

    def _read(self, drawn: Sequence[torch.Tensor], requests: Sequence[Request]) -> None:
        before = sum(len(request.token_ids) for request in requests)
        read(drawn, requests, self._params)
        self._counts.new_tokens += sum(len(request.token_ids) for request in requests) - before

    def _leave(self, lanes: Lanes) -> None:
        """Lets finished samples leave."""
        leaving = [row for row, request in enumerate(self._running) if request.finish_reason is not None]
        if leaving:
            order = remaining(len(self._running), leaving)
            tokens = {row: (*self._running[row].prompt, *self._running[row].token_ids) for row in leaving}
            self._store.keep(order, tokens)
            lanes.keep(order)
            self._running = [self._running[row] for row in order]

    def _admit(self) -> None:
        """Fills free rows with new samples."""
        free = self._store.num_rows - len(self._running)
        if self._running and free < self._store.num_rows * _REFILL_FRACTION:
            return
        while free > 0 and (self._computed or self._waiting):
            if not self._computed:
                self._prefill(free)
            # One draw for all first tokens, whichever prompt they belong to.
            chosen: list[tuple[_Waiting, list[Request]]] = []
            while free > 0 and self._computed:
                prompt = self._computed[0]
                chosen.append((prompt, [prompt.requests.popleft() for _ in range(min(free, len(prompt.requests)))]))
                free -= len(chosen[-1][1])
                if not prompt.requests:
                    self._computed.popleft()
            self._begin(chosen)
            free = self._store.num_rows - len(self._running)

    def _prefill(self, free: int) -> None:
        """Computes the next prompts: as many as the free rows need, within the token budget."""
        group: list[tuple[tuple[int, ...], deque[Request]]] = []
        # The longest prompt comes first, so that its length is the width of the whole group.
        width = len(self._waiting[0][0])
        while self._waiting and (not group or (free > 0 and (len(group) + 1) * width <= self._budget)):
            group.append(self._waiting.popleft())
            free -= len(group[-1][1])
        found = self._store.compute(self._decoder, [prompt for prompt, _ in group])
        for computed, (prompt, requests) in zip(found, group, strict=True):
            self._computed.append(_Waiting(computed, requests))
            self._counts.prompts += 1
            self._counts.prompt_tokens += len(prompt)
            self._counts.reused_tokens += computed.reused
            self._counts.hits += computed.reused > 0

    def _begin(self, chosen: Sequence[tuple[_Waiting, list[Request]]]) -> None:
        """Draws first tokens from the logits after the prompts; samples that continue get a row each."""
        logits_NV = torch.cat([prompt.computed.logits_V.expand(len(requests), -1) for prompt, requests in chosen])
        begun = [request for _, requests in chosen for request in requests]
        vocabulary, fixed = logits_NV.shape[-1], self._store.fixed
        lanes = Lanes(begun, self._params, self._stop_ids, logits_NV.device, vocabulary, fixed_width=fixed)
        self._read([lanes.draw(logits_NV)], begun)

        # Samples that ended with their first token need no row.
        lanes.keep([row for row, request in enumerate(begun) if request.finish_reason is None])
        if self._lanes is None:
            self._lanes = lanes
        else:
            self._lanes.append(lanes)
        for prompt, requests in chosen:
            continuing = [request for request in requests if request.finish_reason is None]
            if continuing:
                self._store.admit(prompt.computed, len(continuing))
                self._running.extend(continuing)
            if not prompt.requests:
                self._store.drop(prompt.computed)
