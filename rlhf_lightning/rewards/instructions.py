"""Rewards completions that keep constraints which can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..data.cell_checks import is_missing
from ..data.tasks.constraints import kept, read_constraints
from ..utils.validation import check_choice
from ._columns import read_column


class InstructionReward:
    """Rewards completions by the constraints of their rows that they keep.

    The column ``constraints`` has kinds with values, such as ``[{"lines": 2}, {"no_commas": true}]``; the kinds
    are in ``data.tasks.constraints.CONSTRAINTS``, and ``instructions:prompts`` makes such rows. Instruction following
    with constraints that a program checks is the idea of IFEval (Zhou et al., 2023, arXiv:2311.07911); the constraints
    and their wording are our own.

    Args:
        count: ``all``: 1 for keeping all constraints, else 0; ``share``: the share that is kept.

    Raises:
        ValueError: another ``count``.

    Example:
        >>> constraints = [{"words_at_most": 3}, {"lower_case": True}]
        >>> given = (["Say hello."] * 2, ["hello there", "Hello there"])
        >>> InstructionReward()(*given, constraints=[constraints] * 2)
        [1.0, 0.0]
        >>> InstructionReward("share")(*given, constraints=[constraints] * 2)
        [1.0, 0.5]
    """

    required_columns = ("constraints",)

    def __init__(self, count: Literal["all", "share"] = "all") -> None:
        check_choice("count", count, ("all", "share"))
        self.count = count

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion; ``None`` for rows without constraints.

        Raises:
            ValueError: there is no such column, an unknown constraint, or a value that does not fit it.
        """
        rows = read_column(columns, "constraints", self)
        return [self._score(text, given) for text, given in zip(completions, rows, strict=True)]

    def _score(self, text: str, given: Any) -> float | None:
        constraints = [] if is_missing(given) else read_constraints(given)
        if not constraints:
            return None
        found = kept(text, constraints)
        return float(all(found)) if self.count == "all" else sum(found) / len(found)
