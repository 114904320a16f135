"""Contexts in segments, each summed up by slots: what later segments see of a context is its summaries alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..utils.validation import check_choice, check_count
from .example import Segment

Recurrence = Literal["accumulate", "replace"]
Placement = Literal["interleaved", "end"]

RECURRENCES: Final[tuple[Recurrence, ...]] = get_args(Recurrence)
PLACEMENTS: Final[tuple[Placement, ...]] = get_args(Placement)


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

    Raises:
        ValueError: an option is out of range, or the ratio does not divide the segment.

    Example:
        >>> layout = SummaryLayout(ratio=2, segment_length=4)
        >>> [(tokens.tolist(), slots.tolist()) for tokens, slots in layout.segments([5, 6, 7, 8, 9])]
        [([5, 6, 0, 7, 8, 0], [-1, -1, 0, -1, -1, 1]), ([9, 0], [-1, 0])]
    """

    ratio: int = 4
    segment_length: int = 128
    recurrence: Recurrence = "accumulate"
    placement: Placement = "interleaved"

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

    @property
    def num_slots(self) -> int:
        """Slots of a whole segment."""
        return self.segment_length // self.ratio

    def size(self, length: int) -> int:
        """Returns the number of slots that stay visible of a context of ``length`` tokens."""
        if self.recurrence == "replace" and length:
            length = (length - 1) % self.segment_length + 1
        return -(-length // self.ratio)

    def segments(self, context: npt.ArrayLike) -> list[tuple[np.ndarray, np.ndarray]]:
        """Divides a context: per segment its tokens, 0 at slots, and the numbers of its slots, -1 at tokens."""
        tokens = np.asarray(context, np.int64)
        starts = range(0, len(tokens), self.segment_length)
        return [self._with_slots(tokens[start : start + self.segment_length]) for start in starts]

    def _with_slots(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = -(-len(tokens) // self.ratio)
        if self.placement == "end":
            places = np.full(count, len(tokens))
        else:
            places = np.minimum(np.arange(1, count + 1) * self.ratio, len(tokens))
        return np.insert(tokens, places, 0), np.insert(np.full(len(tokens), -1), places, np.arange(count))

    def stands_for(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of a segment's tokens, and for each the place of the slot that stands for it.

        Args:
            slots: numbers of the segment's slots, -1 at tokens.

        Example:
            >>> SummaryLayout(ratio=2, segment_length=4).stands_for(np.array([-1, -1, 0, -1, 1]))
            (array([0, 1, 3]), array([2, 2, 4]))
        """
        tokens, places = np.flatnonzero(slots < 0), np.flatnonzero(slots >= 0)
        return tokens, places[np.arange(len(tokens)) // self.ratio]

    def tree(self, context: npt.ArrayLike, children: Sequence[Segment]) -> Segment:
        """Makes the tree of a context, as the segments that come after it see it.

        Args:
            context: its tokens, at least one.
            children: the trees that continue it.

        Returns:
            The first of the context's segments; each is the only child of the one before.
        """
        shows: Literal["slots", "only slots"] = "slots" if self.recurrence == "accumulate" else "only slots"
        below = list(children)
        for tokens, slots in reversed(self.segments(context)):
            below = [Segment(tokens, None, below, slots=slots, shows=shows)]
        return below[0]
