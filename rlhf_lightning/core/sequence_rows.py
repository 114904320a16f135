"""Helpers that turn packed batches into rows, shared by several methods.

Legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..distributed.collectives import Rows
from ..sequences import Example


def num_scored(example: Example) -> list[int]:
    """Counts the scored tokens of each sequence of an example."""
    return [len(weights) for weights in example.weights_per_sequence()]


def check_pairs(examples: Sequence[Example]) -> None:
    """Checks that every example is a pair: two sequences, chosen first, each with a scored token.

    Raises:
        ValueError: with the row, its sequences, and the datamodule that makes pairs.
    """
    for example in examples:
        scored = num_scored(example)
        if len(scored) != 2 or 0 in scored:
            raise ValueError(
                f"row {example.row_id} has {len(scored)} sequences with {scored} scored tokens; a pair has two with at "
                "least one each: use PreferenceDataModule"
            )


def pair_rows(name: str, values_S: Tensor) -> Rows:
    """Splits values of alternating chosen and rejected sequences into rows; ``{}`` in the name becomes either word."""
    values = values_S.view(-1, 2)
    return {name.format("chosen"): values[:, 0], name.format("rejected"): values[:, 1]}
