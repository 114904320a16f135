"""Pairs of solutions in steps, for process reward models that learn from preferences alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .cell_checks import is_list, is_missing
from .formats import Row, stepwise


def is_step_pair(columns: Mapping[str, Any]) -> bool:
    """Tells whether a row is a pair of solutions, and not one with labelled steps."""
    return not is_missing(columns.get("chosen")) and not is_missing(columns.get("rejected"))


def step_pair(columns: Mapping[str, Any], separator: str) -> tuple[Row, Row]:
    r"""Reads a pair of solutions, the better one first.

    Args:
        columns: ``prompt``, ``chosen`` and ``rejected``: lists of steps, or texts whose steps end with the separator;
            ``system`` and ``history`` come before the prompt. Other columns become fields.
        separator: ends a step of a text; blank steps are left out.

    Returns:
        Two rows whose completions are the steps.

    Raises:
        ValueError: saying what is wrong with the row.

    Example:
        >>> row = {"prompt": "1+2+3=?", "chosen": "1+2=3\n3+3=6", "rejected": ["1+2=4", "4+3=7"]}
        >>> [solution.completions for solution in step_pair(row, "\n")]
        [('1+2=3', '3+3=6'), ('1+2=4', '4+3=7')]
    """
    return _solution(columns, "chosen", separator), _solution(columns, "rejected", separator)


def _solution(columns: Mapping[str, Any], name: str, separator: str) -> Row:
    rest = {key: value for key, value in columns.items() if key not in ("chosen", "rejected", "labels")}
    steps = columns[name]
    if isinstance(steps, str):
        steps = _listed(steps) or [step for step in steps.split(separator) if step.strip()]
    count = len(steps) if is_list(steps) else 1
    try:
        row = stepwise({**rest, "completions": steps, "labels": [0] * count})
    except ValueError as error:
        raise ValueError(f"{name!r} is no solution in steps: {error}") from error
    row.fields.pop("labels")
    return row


def _listed(text: str) -> list[Any] | None:
    """Reads a list that a table holds as JSON; ``None`` for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(step, str) for step in found) else None
