"""Margins, ratings and bootstrap weights of the rows that a reward model learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..data.cell_checks import describe_columns
from ..sequences import Example


def ratings_of(example: Example, attributes: Sequence[str]) -> list[float]:
    """Returns the ratings of a row, NaN for a missing one.

    Raises:
        ValueError: with the row and the value, if a rating is not a finite number.

    Example:
        >>> from rlhf_lightning.sequences import Segment
        >>> ratings_of(Example("rows:0", Segment([1]), {"helpfulness": 4}), ["helpfulness", "correctness"])
        [4.0, nan]
    """
    return [_rating(example.row_id, name, example.fields.get(name)) for name in attributes]


def check_rated(examples: Sequence[Example], attributes: Sequence[str]) -> None:
    """Checks that every attribute is rated in at least one row.

    Args:
        examples: rows, read until every attribute is found.
        attributes: names of ratings.

    Raises:
        ValueError: with the attribute, the rows, and the numeric columns of the first row.
    """
    missing = set(attributes)
    for example in examples:
        ratings = ratings_of(example, attributes)
        missing -= {name for name, rating in zip(attributes, ratings, strict=True) if not math.isnan(rating)}
        if not missing:
            return
    if not len(examples):
        return
    name = next(name for name in attributes if name in missing)
    first, last = examples[0], examples[-1]
    numbers = {key: value for key, value in first.fields.items() if isinstance(value, int | float)}
    raise ValueError(
        f"none of the {len(examples)} training rows ({first.row_id} to {last.row_id}) has a number {name!r}"
        f"{describe_columns(numbers, name)}: name attributes after columns of ratings"
    )


def _rating(row_id: str, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(
            f"row {row_id} has the {name} {value!r}; it must be a finite number, or null where it was not rated"
        )
    return float(value)


def check_pair(example: Example, *, use_margins: bool, allow_ties: bool) -> None:
    """Checks the margin of a pair, and that it is no tie unless ties are modelled.

    Raises:
        ValueError: with the row, the value, and what to do.
    """
    margin = example.fields.get("margin") if use_margins else None
    number = isinstance(margin, int | float) and math.isfinite(margin)
    if margin is not None and not number:
        raise ValueError(
            f"row {example.row_id} has the margin {margin!r}; it must be a finite number: fix the column, or set "
            "use_margins=False"
        )
    if example.fields.get("tie") and not allow_ties:
        raise ValueError(f"row {example.row_id} is a tie: set tie_threshold (0.5 is usual), or leave such rows out")


def bootstrap_weights(row_ids: Sequence[str], num_models: int, seed: int) -> Tensor:
    """Draws each ensemble member's weights of rows: Poisson variables of mean 1, ``(rows, members)`` in fp32.

    Paper: Oza and Russell, 2001, "Online bagging and boosting": the limit of drawing n of n rows with replacement. A
    draw is a function of (seed, member, row id) alone, so a member sees the same sample in every epoch and with any
    number of ranks.

    Args:
        row_ids: stable ids of rows.
        num_models: members, at least 1.
        seed: seed of the draws.

    Example:
        >>> bootstrap_weights(["rows:0"], 4, seed=0).shape
        torch.Size([1, 4])
    """
    return torch.tensor(
        [[_poisson(_uniform(f"{seed}/{member}/{row_id}")) for member in range(num_models)] for row_id in row_ids]
    )


def _uniform(text: str) -> float:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


def _poisson(uniform: float) -> float:
    """Inverts the distribution function of a Poisson variable of mean 1."""
    count, term = 0, math.exp(-1.0)
    below = term
    while uniform >= below and count < 20:
        count += 1
        term /= count
        below += term
    return float(count)
