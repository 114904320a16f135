"""Reward for completions in a given format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

# One block of thoughts and then an answer, without another block.
THINK_THEN_ANSWER: Final = r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)+"


class FormatReward:
    """Rewards a completion that matches a regular expression from its first to its last character.

    Args:
        pattern: the expression; a dot also matches a line break. By default ``<think>...</think>`` and an answer.
        matched: reward of a completion that matches.
        unmatched: reward of one that does not.

    Raises:
        ValueError: for an expression that does not compile.

    Example:
        >>> FormatReward()(["p", "p"], ["<think>3+4=7</think>7", "7"])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str = THINK_THEN_ANSWER, matched: float = 1.0, unmatched: float = 0.0) -> None:
        try:
            self._expression = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        self.pattern = pattern
        self.matched = matched
        self.unmatched = unmatched

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        return [
            self.matched if self._expression.fullmatch(completion) else self.unmatched for completion in completions
        ]
