"""Contexts in segments, each summed up by slots: what later segments see of a context is its summaries alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ..utils.validation import check_choice, check_count
from .example import Segment

Recurrence = Literal["accumulate", "replace"]
Placement = Literal["interleaved", "end"]

RECURRENCES: Final[tuple[Recurrence, ...]] = get_args(Recurrence)
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)

_TOKEN, _QUERY = -1, -2  # numbers of tokens, where slots have theirs


class ContextSegment(NamedTuple):
    """One of the segments of a context.

    Args:
        tokens: its tokens, 0 at slots.
        slots: numbers of its slots, below 0 at tokens.
        hides: number of the last summaries before it that its own replace.
    """

    tokens: np.ndarray
    slots: np.ndarray
    hides: int = 0


@dataclass(frozen=True)
class SummaryLayout:
    """Divides contexts into segments with a slot for every ``ratio`` tokens.

    A slot sees the tokens of its segment before it, and the summaries of the segments before. The last segment may be
    shorter: ``n`` tokens get ``ceil(n / ratio)`` slots. So a context of ``n`` tokens, shorter than a segment or not, is
    compressed to ``ceil(n / ratio)`` slots.

    Args:
        ratio: tokens per slot, at least 1.
        segment_length: tokens of a segment, a multiple of ``ratio``.
        recurrence: ``"accumulate"``: summaries of all segments stay visible (AutoCompressors, Chevalier et al., 2023,
            arXiv:2305.14788); ``"replace"``: those of the last segment replace the earlier ones, which they have seen,
            so that what is visible does not grow with the context (Bulatov et al., 2022, arXiv:2207.06881).
        placement: ``"interleaved"``: a slot after every ``ratio`` tokens (Zhang et al., 2024, arXiv:2401.03462);
            ``"end"``: all slots after the segment (Mu et al., 2023, arXiv:2304.08467).
        condense_every: compresses what is compressed: after so many whole segments comes one of slots alone, one for
            every ``ratio`` of their summaries, which it sees and replaces; 0 does not.
        reads_query: each segment begins with the prompt that will follow the context, so that its slots can keep what
            answers it; the prompt's tokens get no slots, and take positions.

    Raises:
        ValueError: an option is out of range, or the ratio does not divide the segment or the summaries to condense.

    Example:
        >>> layout = SummaryLayout(ratio=2, segment_length=4)
        >>> [(tokens.tolist(), slots.tolist()) for tokens, slots, _ in layout.segments([5, 6, 7, 8, 9])]
        [([5, 6, 0, 7, 8, 0], [-1, -1, 0, -1, -1, 1]), ([9, 0], [-1, 0])]
    """

    ratio: int = 4
    segment_length: int = 128
    recurrence: Recurrence = "accumulate"
    placement: Placement = "interleaved"
    condense_every: int = 0
    reads_query: bool = False

    def __post_init__(self) -> None:
        check_count("ratio", self.ratio, "4 keeps a quarter")
        check_count("segment_length", self.segment_length, "128 is a good start")
        check_choice("recurrence", self.recurrence, RECURRENCES)
        check_choice("placement", self.placement, PLACEMENTS)
        if self.segment_length % self.ratio:
            near = max(1, round(self.segment_length / self.ratio)) * self.ratio
            raise ValueError(
                f"ratio {self.ratio} does not divide segment_length {self.segment_length}: use segment_length {near}"
            )
        self._check_condensing()

    def _check_condensing(self) -> None:
        if not self.condense_every:
            return
        check_count("condense_every", self.condense_every, "0 condenses nothing")
        if self.recurrence == "replace":
            raise ValueError(
                f"condense_every is {self.condense_every} with recurrence 'replace', which keeps the summaries of one "
                "segment alone: use 'accumulate'"
            )
        summaries = self.condense_every * self.num_slots
        if summaries % self.ratio:
            raise ValueError(
                f"ratio {self.ratio} does not divide the {summaries} summaries of {self.condense_every} segments: use "
                f"condense_every={self.ratio}"
            )

    @property
    def num_slots(self) -> int:
        """Slots of a whole segment."""
        return self.segment_length // self.ratio

    @property
    def num_condensed(self) -> int:
        """Slots that replace the summaries of ``condense_every`` segments."""
        return self.condense_every * self.num_slots // self.ratio

    @property
    def num_embeddings(self) -> int:
        """Slots with an embedding of their own: those of a segment, and the ones that replace them."""
        return self.num_slots + self.num_condensed

    def num_segments(self, length: int) -> int:
        """Returns the number of segments with tokens of a context of ``length`` tokens."""
        return -(-length // self.segment_length)

    def size(self, length: int) -> int:
        """Returns the number of slots that stay visible of a context of ``length`` tokens."""
        if self.recurrence == "replace" and length:
            length = (length - 1) % self.segment_length + 1
        span = self.condense_every * self.segment_length
        condensed = length // span if span else 0
        return condensed * self.num_condensed - (condensed * span - length) // self.ratio

    def segments(self, context: npt.ArrayLike, query: npt.ArrayLike = ()) -> list[ContextSegment]:
        """Divides a context.

        Args:
            context: its tokens.
            query: tokens of the prompt that follows, where that is read.
        """
        tokens, asked = np.asarray(context, np.int64), np.asarray(query, np.int64)
        found: list[ContextSegment] = []
        for number in range(self.num_segments(len(tokens))):
            part = tokens[number * self.segment_length : (number + 1) * self.segment_length]
            own, slots = self._with_slots(part)
            if self.reads_query:
                own, slots = np.concatenate([asked, own]), np.concatenate([np.full(len(asked), _QUERY), slots])
            found.append(ContextSegment(own, slots))
            is_whole = len(part) == self.segment_length
            if self.condense_every and is_whole and (number + 1) % self.condense_every == 0:
                numbers = np.arange(self.num_slots, self.num_embeddings)
                found.append(ContextSegment(np.zeros_like(numbers), numbers, self.condense_every * self.num_slots))
        return found

    def _with_slots(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = -(-len(tokens) // self.ratio)
        if self.placement == "end":
            places = np.full(count, len(tokens))
        else:
            places = np.minimum(np.arange(1, count + 1) * self.ratio, len(tokens))
        return np.insert(tokens, places, 0), np.insert(np.full(len(tokens), _TOKEN), places, np.arange(count))

    def stands_for(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of a segment's tokens, and for each the place of the slot that stands for it.

        Args:
            slots: numbers of the segment's slots, below 0 at tokens.

        Example:
            >>> SummaryLayout(ratio=2, segment_length=4).stands_for(np.array([-1, -1, 0, -1, 1]))
            (array([0, 1, 3]), array([2, 2, 4]))
        """
        tokens, places = np.flatnonzero(slots == _TOKEN), np.flatnonzero(slots >= 0)
        return tokens, places[np.arange(len(tokens)) // self.ratio]

    def tree(self, context: npt.ArrayLike, children: Sequence[Segment], query: npt.ArrayLike = ()) -> Segment:
        """Makes the tree of a context, as the segments that come after it see it.

        Args:
            context: its tokens, at least one.
            children: the trees that continue it.
            query: see ``segments``.

        Returns:
            The first of the context's segments; each is the only child of the one before.
        """
        shows: Literal["slots", "only slots"] = "slots" if self.recurrence == "accumulate" else "only slots"
        below = list(children)
        for tokens, slots, hides in reversed(self.segments(context, query)):
            below = [Segment(tokens, None, below, slots=slots, shows=shows, hides=hides)]
        return below[0]
