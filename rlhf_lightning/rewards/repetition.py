"""Penalty for repeated n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._columns import TOKENS_COLUMN, LengthUnit, check_unit, read_units


class RepetitionReward:
    """Penalizes a completion by the share of its n-grams that occurred before.

    Paper: Demystifying Long Chain-of-Thought Reasoning (Yeo et al., 2025, arXiv:2502.03373), appendix C.2:
    -penalty * (1 - distinct n-grams / n-grams). A completion shorter than an n-gram repeats nothing.

    Args:
        ngram_size: n, at least 1.
        penalty: penalty of a completion that only repeats, at least 0.
        unit: ``tokens`` (reads the column ``completion_ids``), ``words`` or ``characters``.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> RepetitionReward(ngram_size=2, unit="words")(["p", "p"], ["a b a b a", "a b c"])
        [-0.5, 0.0]
    """

    def __init__(self, ngram_size: int = 3, penalty: float = 1.0, unit: LengthUnit = "tokens") -> None:
        check_unit(unit)
        if ngram_size < 1:
            raise ValueError(f"ngram_size={ngram_size} is below 1: 3 is usual")
        if not penalty >= 0:
            raise ValueError(f"penalty={penalty} is below 0: it is subtracted, 1.0 is usual")
        self.ngram_size = ngram_size
        self.penalty = penalty
        self.unit = unit
        self.required_columns = (TOKENS_COLUMN,) if unit == "tokens" else ()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        return [self._score(units) for units in read_units(completions, columns, self.unit, self)]

    def _score(self, units: Sequence[Any]) -> float:
        num_ngrams = len(units) - self.ngram_size + 1
        if num_ngrams < 1:
            return 0.0
        # All but the first occurrence of an n-gram are repetitions.
        distinct = {tuple(units[start : start + self.ngram_size]) for start in range(num_ngrams)}
        repeated = num_ngrams - len(distinct)
        return -self.penalty * repeated / num_ngrams if repeated else 0.0
