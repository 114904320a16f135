"""Splits a batch into micro-batches under a token budget; the budget is a memory knob and cannot change a result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .example import Example


def example_cost(example: Example, *, share_prefix: bool) -> int:
    """Tokens that the backbone computes for an example."""
    if share_prefix:
        return example.root.num_tokens
    return sum(len(segment.tokens) for path in example.root.paths() for segment in path)


def plan_micro_batches(examples: Sequence[Example], *, budget: int, share_prefix: bool = True) -> list[list[int]]:
    """Assigns examples to micro-batches of at most ``budget`` tokens, longest first (first-fit decreasing).

    An example is what a loss couples (a pair, a sequence) and is never split; one above the budget runs alone, with one
    warning. Examples of similar length come together, which keeps padding small where padding is needed.

    Args:
        examples: any number; none gives no micro-batch.
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
    order = sorted(range(len(examples)), key=lambda n: (-costs[n], n))
    if order and costs[order[0]] > budget:
        row = examples[order[0]].row_id
        warnings.warn(
            f"row {row} has {costs[order[0]]} tokens, above micro_batch_tokens={budget}: it runs alone; memory is set "
            "by the longest row (lower max_length to bound it)",
            stacklevel=2,
        )
    bins: list[list[int]] = []
    room: list[int] = []
    first_open = 0  # bins before it are full: keeps the search short where rows are short and many
    for n in order:
        while first_open < len(bins) and room[first_open] <= 0:
            first_open += 1
        for b in range(first_open, len(bins)):
            if room[b] >= costs[n]:
                bins[b].append(n)
                room[b] -= costs[n]
                break
        else:
            bins.append([n])
            room.append(budget - costs[n])
    return bins
