"""Counts of the tokens that scorers read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from .strategy import Candidate, Scorer


def scoring_cost(scorer: Scorer | None, candidate: Candidate) -> int:
    """Returns the most tokens that scoring a candidate reads: what the scorer states, or all of the candidate's."""
    cost: Callable[[Candidate], int] | None = getattr(scorer, "cost", None)
    return len(candidate.query.token_ids) + len(candidate.token_ids) if cost is None else cost(candidate)


def read_once(candidates: Sequence[Candidate], sequences: Sequence[Sequence[int]]) -> list[int]:
    """Counts the tokens of each sequence that no earlier one of its query begins with; the last is always its own.

    Those of other queries never count, so that a search pays the same whatever shares its batch.

    Args:
        candidates: of any queries.
        sequences: the tokens that are read for each, at least one.

    Example:
        >>> from rlhf_lightning.inference.strategy import Query
        >>> ones = [Candidate(Query("p", (), 0), (), "")] * 3
        >>> read_once(ones, [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3)])
        [3, 2, 0]
    """
    seen: dict[int, list[tuple[int, ...]]] = {}
    counts = []
    for candidate, sequence in zip(candidates, sequences, strict=True):
        tokens = tuple(sequence)
        known = seen.setdefault(id(candidate.query), [])
        place = bisect_left(known, tokens)
        if place < len(known) and known[place] == tokens:
            counts.append(0)
            continue
        # In sorted order, the sequence with the longest common beginning is a neighbour.
        shared = max((_inner(tokens, other) for other in known[max(place - 1, 0) : place + 1]), default=0)
        counts.append(len(tokens) - shared)
        known.insert(place, tokens)
    return counts


def _inner(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two sequences begin with, the last of each left out."""
    longest = min(len(one), len(other)) - 1
    return next((n for n in range(longest) if one[n] != other[n]), max(longest, 0))
