"""Which trees of an iteration make up each of its optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ..distributed.collectives import gather_objects
from ..inference import derive_seed
from ..sequences import Example


def update_parts(
    trees: Sequence[Example], *, seeds: tuple[int, int], num_updates: int, num_mini_batches: int
) -> Iterator[list[Example]]:
    """Yields this rank's trees of each optimizer step; the split of prompts does not depend on the ranks.

    Args:
        trees: this rank's; the field ``prompt_id`` keeps those of one prompt together.
        seeds: seed of the run and number of the iteration.
        num_updates: passes over all trees.
        num_mini_batches: steps of a pass, each on an equal share of the prompts; without prompts a step is left out.
    """
    global_ids = {row for rows in gather_objects([tree.fields["prompt_id"] for tree in trees]) for row in rows}
    for number in range(num_updates):
        order = sorted(global_ids, key=partial(derive_seed, *seeds, number))
        for part in range(num_mini_batches):
            bounds = [len(order) * edge // num_mini_batches for edge in (part, part + 1)]
            chosen = set(order[slice(*bounds)])
            if chosen:
                yield [tree for tree in trees if tree.fields["prompt_id"] in chosen]
