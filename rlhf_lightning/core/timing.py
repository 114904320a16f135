"""Time per phase of a batch and counts of tokens; costs nothing unless a callback sets a clock.

Phases partition a batch's time: a nested phase pauses the outer one, and the rest is ``other``. On CUDA the boundaries
are events on the current stream, read together with the sums: kernels run asynchronously, and a host clock would
attribute their time to the next synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..sequences import SequenceBatch

PHASES = ("data", "generate", "score", "forward_backward", "step")
OTHER = "other"
_MOST_MARKS = 10_000  # boundaries kept before they are added up


@dataclass
class Work:
    """Work of one rank over a number of batches.

    Attributes:
        seconds: seconds of each phase, including ``other``.
        batches: number of batches.
        examples: number of rows.
        tokens: trained tokens, counted for every forward and backward; a shared prompt counts once.
        unshared_tokens: the same count without shared prompts.
        padded_tokens: the same count with every micro-batch padded to its longest sequence.
        squared_lengths: sum of the squares of the sequences' lengths.
        generated_tokens: sampled tokens.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, OTHER), 0.0))
    batches: int = 0
    examples: int = 0
    tokens: int = 0
    unshared_tokens: int = 0
    padded_tokens: int = 0
    squared_lengths: int = 0
    generated_tokens: int = 0


class PhaseClock:
    """Accumulates the time of each phase, and the counts of ``Work``, between ``begin`` and ``end`` of batches.

    Args:
        device: the module's device.

    Example:
        >>> clock = PhaseClock(torch.device("cpu"))
        >>> clock.begin()
        >>> with clock.phase("forward_backward"), clock.phase("score"):
        ...     pass
        >>> clock.end(examples=2)
        >>> work = clock.take()
        >>> work.batches, work.examples, work.seconds["generate"]
        (1, 2, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = False  # within a batch
        self._work = Work()
        self._marks: list[tuple[str | None, Any]] = []  # the phase that begins, and when; None between batches
        self._start = 0  # index of the first mark of this batch
        self._stack: list[str] = []

    def begin(self) -> None:
        """Begins a batch, and discards one that was begun but never ended (at the end of an epoch)."""
        del self._marks[self._start :]
        self.running, self._stack = True, []
        self._mark(OTHER)

    def end(self, examples: int) -> None:
        """Ends a batch with its number of rows."""
        if not self.running:
            return
        self._mark(None)
        self.running = False
        self._work.batches += 1
        self._work.examples += examples
        if len(self._marks) > _MOST_MARKS:
            self._add_up()
        self._start = len(self._marks)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a block as a phase, and pauses the phase around it; does nothing outside a batch.

        Args:
            name: one of ``PHASES``.
        """
        if not self.running:
            yield
            return
        self._stack.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._stack.pop()
            self._mark(self._stack[-1] if self._stack else OTHER)

    def count_trained(self, batch: SequenceBatch) -> None:
        """Counts a micro-batch that went forward and backward, without synchronising with the device."""
        if not self.running:
            return
        # From the examples on the host, since reading tensors would wait for the device.
        lengths = [sum(len(s.tokens) for s in path) for example in batch.examples for path in example.root.paths()]
        self._work.tokens += batch.num_tokens
        self._work.unshared_tokens += sum(lengths)
        self._work.padded_tokens += len(lengths) * max(lengths)
        self._work.squared_lengths += sum(length * length for length in lengths)

    def count_generated(self, lengths: Sequence[int]) -> None:
        """Counts sampled tokens."""
        if self.running:
            self._work.generated_tokens += sum(lengths)

    def take(self) -> Work:
        """Returns and resets the work up to the last finished batch; synchronises with the device."""
        self._add_up()
        work, self._work = self._work, Work()
        return work

    def _mark(self, begins: str | None) -> None:
        # Events instead of the clock: kernels run asynchronously, and waiting for them would slow training down.
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((begins, event))
        else:
            self._marks.append((begins, time.perf_counter()))

    def _add_up(self) -> None:
        marks = self._marks
        on_cuda = self.device.type == "cuda"
        if marks and on_cuda:
            marks[-1][1].synchronize()
        for (name, begin), (_, end) in pairwise(marks):
            if name is not None:
                self._work.seconds[name] += begin.elapsed_time(end) / 1000 if on_cuda else end - begin
        self._marks, self._start = [], 0
