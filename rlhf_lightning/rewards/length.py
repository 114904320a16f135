"""Rewards by the length of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..data.cell_checks import check_number, is_missing
from ._columns import TOKENS_COLUMN, LengthUnit, check_unit, read_column, read_units


class SoftOverlongReward:
    """Penalizes a completion linearly as it nears the maximum length, and not at all before.

    Paper: DAPO (Yu et al., 2025, arXiv:2503.14476), eq. 13, with L the maximum and C the buffer:
    0 up to L - C, then (L - C - length) / C, and -1 beyond L.

    Args:
        max_length: L, at least 1; the generation's own limit or less.
        buffer: C, from 1 to ``max_length``.
        unit: ``tokens`` (reads the column ``completion_ids``), ``words`` or ``characters``.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> SoftOverlongReward(max_length=10, buffer=4, unit="characters")(["p"] * 3, ["a" * 6, "a" * 9, "a" * 11])
        [0.0, -0.75, -1.0]
    """

    def __init__(self, max_length: int, buffer: int, unit: LengthUnit = "tokens") -> None:
        check_unit(unit)
        if not 1 <= buffer <= max_length:
            raise ValueError(f"buffer={buffer} is outside 1 to max_length={max_length}: a fifth of it is usual")
        self.max_length = max_length
        self.buffer = buffer
        self.unit = unit
        self.required_columns = (TOKENS_COLUMN,) if unit == "tokens" else ()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        free = self.max_length - self.buffer
        lengths = [len(units) for units in read_units(completions, columns, self.unit, self)]
        return [-1.0 if length > self.max_length else min(0.0, (free - length) / self.buffer) for length in lengths]


class LengthReward:
    """Penalizes the distance of a completion's length from a target, or only the excess over it.

    Paper: L1 (Aggarwal and Welleck, 2025, arXiv:2503.04697), eq. 1: -coef * abs(target - length), added to a reward
    for correctness. Departure: ``at_most`` is the one-sided form of the same penalty.

    Args:
        target: target length of all rows, at least 0. Give exactly one of ``target`` and ``target_column``.
        target_column: the column with each row's target length.
        coef: penalty per unit of length, at least 0.
        mode: ``exact`` or ``at_most``.
        unit: ``tokens`` (reads the column ``completion_ids``), ``words`` or ``characters``.

    Raises:
        ValueError: for a mode, unit or number that is not allowed.

    Example:
        >>> LengthReward(target=3, coef=0.5, unit="words")(["p", "p"], ["one two", "one two three four five"])
        [-0.5, -1.0]
    """

    def __init__(
        self,
        target: int | None = None,
        target_column: str | None = None,
        coef: float = 0.0003,
        mode: Literal["exact", "at_most"] = "exact",
        unit: LengthUnit = "tokens",
    ) -> None:
        check_unit(unit)
        if mode not in ("exact", "at_most"):
            raise ValueError(f"unknown mode {mode!r}: use one of exact, at_most")
        if (target is None) == (target_column is None):
            raise ValueError(f"target={target} and target_column={target_column!r}: give exactly one of the two")
        if target is not None and target < 0:
            raise ValueError(f"target={target} is below 0: write the number of {unit} to aim for")
        if not coef >= 0:
            raise ValueError(f"coef={coef} is below 0: it is a penalty, 0.0003 per token is usual")
        self.target = target
        self.target_column = target_column
        self.coef = coef
        self.mode = mode
        self.unit = unit
        tokens = (TOKENS_COLUMN,) if unit == "tokens" else ()
        self.required_columns = tokens if target_column is None else (*tokens, target_column)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion; ``None`` for rows without a target."""
        lengths = [len(units) for units in read_units(completions, columns, self.unit, self)]
        if self.target_column is None:
            targets: Sequence[Any] = [self.target] * len(lengths)
        else:
            targets = read_column(columns, self.target_column, self)
        return [self._score(length, target) for length, target in zip(lengths, targets, strict=True)]

    def _score(self, length: int, target: Any) -> float | None:
        if is_missing(target):
            return None
        excess = length - check_number(target, self.target_column or "target")
        return -self.coef * (abs(excess) if self.mode == "exact" else max(excess, 0.0))
