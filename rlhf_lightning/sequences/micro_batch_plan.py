"""Splits a batch into micro-batches under a token budget, which sets memory use and cannot change a result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .example import Example, Segment


def example_cost(example: Example, *, share_prefix: bool) -> int:
    """Counts the tokens that the backbone computes for an example."""
    if share_prefix:
        return example.root.num_tokens
    return sum(segment.num_own for path in example.root.paths() for segment in path)


def plan_micro_batches(examples: Sequence[Example], *, budget: int, share_prefix: bool = True) -> list[list[int]]:
    """Assigns examples to micro-batches of at most ``budget`` tokens, longest first (first-fit decreasing).

    An example is the unit that a loss couples (a pair, a sequence) and is never split; one above the budget runs alone,
    with one warning. Examples of one prompt are grouped where prompts are shared, because ``pack`` lays out common
    prefixes once; then examples of similar length, which limits padding where padding is needed.

    Args:
        examples: any number; an empty list gives no micro-batch.
        budget: tokens per micro-batch, above 0.
        share_prefix: whether a prompt counts once or once per completion.

    Returns:
        Lists of positions in ``examples``; every position occurs exactly once.

    Raises:
        ValueError: the budget is not above 0.

    Example:
        >>> from rlhf_lightning.sequences import Segment
        >>> rows = [Example(f"rows:{n}", Segment([1] * length)) for n, length in enumerate([3, 5, 2, 4])]
        >>> plan_micro_batches(rows, budget=7)
        [[1, 2], [3, 0]]
    """
    if budget <= 0:
        raise ValueError(f"micro_batch_tokens is {budget}; it must be above 0 (8192 is a good start)")

    costs = [example_cost(example, share_prefix=share_prefix) for example in examples]
    longest = min(range(len(examples)), key=lambda n: (-costs[n], n), default=None)
    if longest is not None and costs[longest] > budget:
        row = examples[longest].row_id
        warnings.warn(
            f"row {row} has {costs[longest]} tokens, above micro_batch_tokens={budget}: it runs alone; memory is set "
            "by the longest row (lower max_length to bound it)",
            stacklevel=2,
        )

    # Longest first; ties by position, so that the plan is deterministic.
    units = _families(examples, budget) if share_prefix else [([n], cost) for n, cost in enumerate(costs)]
    units.sort(key=lambda unit: (-unit[1], unit[0]))

    # Each unit goes into the first bin with room for it, or opens a new one.
    bins: list[list[int]] = []
    room: list[int] = []
    first_open = 0  # bins before it are full: keeps the search short for many short rows
    for unit, cost in units:
        while first_open < len(bins) and room[first_open] <= 0:
            first_open += 1
        for b in range(first_open, len(bins)):
            if room[b] >= cost:
                bins[b].extend(unit)
                room[b] -= cost
                break
        else:
            bins.append(unit)
            room.append(budget - cost)
    return bins


class _Level(dict[bytes, "_Level"]):
    """Maps the distinct segments at one node of merged trees, by their content."""

    def missing(self, segment: Segment) -> int:
        """Counts the tokens that merging a segment and its descendants would add, at most."""
        below = self.get(segment.content)
        return segment.num_tokens if below is None else sum(below.missing(child) for child in segment.children)

    def add(self, segment: Segment) -> int:
        """Merges a segment and its descendants; returns the number of tokens added."""
        key = segment.content
        added = 0 if key in self else segment.num_own
        below = self.setdefault(key, _Level())
        return added + sum(below.add(child) for child in segment.children)


def _families(examples: Sequence[Example], budget: int) -> list[tuple[list[int], int]]:
    """Groups examples of the same prompt, as many together as the budget allows, with their merged cost."""
    found: list[tuple[list[int], int]] = []
    latest: dict[bytes, tuple[int, _Level]] = {}  # prompt -> its last family and the merged segments of that
    for n, example in enumerate(examples):
        key = example.root.content
        number, level = latest.get(key, (-1, _Level()))
        # A full family is never opened again: its prompt starts another one.
        if number < 0 or found[number][1] + level.missing(example.root) > budget:
            number, level = len(found), _Level()
            found.append(([], 0))
            latest[key] = (number, level)
        family, cost = found[number]
        found[number] = ([*family, n], cost + level.add(example.root))
    return found
