"""Reads columns of a batch for reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

LengthUnit = Literal["tokens", "words", "characters"]

LENGTH_UNITS: Final[tuple[LengthUnit, ...]] = get_args(LengthUnit)
TOKENS_COLUMN: Final = "completion_ids"


def read_column(columns: Mapping[str, Any], name: str, reward: object) -> Sequence[Any]:
    """Returns a column of the rows, or raises an error that lists the existing ones."""
    if name not in columns:
        have = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{type(reward).__name__} needs the column {name!r}: the rows have {have}")
    values: Sequence[Any] = columns[name]
    return values


def check_unit(unit: str) -> None:
    """Refuses an unknown unit of length."""
    if unit not in LENGTH_UNITS:
        raise ValueError(f"unknown unit {unit!r}: use one of {', '.join(LENGTH_UNITS)}")


def read_units(
    completions: Sequence[str], columns: Mapping[str, Any], unit: LengthUnit, reward: object
) -> list[Sequence[Any]]:
    """Splits each completion into tokens, words or characters."""
    if unit == "tokens":
        return list(read_column(columns, TOKENS_COLUMN, reward))
    return [completion.split() if unit == "words" else completion for completion in completions]
