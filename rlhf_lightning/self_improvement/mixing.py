"""Mixes rows of a model's own with seed rows, which keep a loop from forgetting what it began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from ..utils.validation import check_fraction


def mix_rows(
    rows: Sequence[Mapping[str, Any]], seed_rows: Sequence[Mapping[str, Any]], *, ratio: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Adds seed rows until they are a share of all rows.

    The number of seed rows is ``ratio / (1 - ratio)`` times that of the others, rounded, drawn without replacement; if
    there are fewer, each is added once. They come in a random order after the others, with a ``provenance`` of
    ``{"seed_row": number}``.

    Args:
        rows: made of samples, all with the same columns but for those of prompts.
        seed_rows: of the same kind, such as the demonstrations of the first training.
        ratio: the share, in [0, 1).
        seed: of the choice.

    Raises:
        ValueError: a ratio out of its range, or a seed row without a column that a row of this kind needs.

    Example:
        >>> mixed = mix_rows([{"prompt": "a", "completion": "b"}] * 3, [{"prompt": "c", "completion": "d"}], ratio=0.25)
        >>> [row["prompt"] for row in mixed]
        ['a', 'a', 'a', 'c']
    """
    check_fraction("ratio", ratio, "0.2 is usual, 0 adds none")
    found = [dict(row) for row in rows]
    count = min(len(seed_rows), round(ratio / (1 - ratio) * len(rows)))
    needed = [name for name in ("prompt", "completion", "chosen", "rejected", "label") if rows and name in rows[0]]
    for number in Random(f"seed rows/{seed}").sample(range(len(seed_rows)), count):
        row = dict(seed_rows[number])
        for name in needed:
            if row.get(name) is None:
                raise ValueError(
                    f"seed row {number} has no {name!r}, which the rows it is mixed with have: give rows with "
                    f"{', '.join(needed)}"
                )
        found.append(row | {"provenance": {"seed_row": number}})
    return found
