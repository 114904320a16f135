"""Budgets of searches, and the accounts of what a search has spent."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from ..utils.validation import check_count, check_positive

Limit = Literal["tokens", "scorer_tokens", "expansions", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one search for one prompt; ``None`` is no limit.

    The first three stop exactly: a search never spends more. Time is read between rounds, so the round that reaches
    ``seconds`` is completed, and the result then depends on the machine.

    Args:
        tokens: tokens sampled from the policy, at least 1.
        scorer_tokens: tokens read by the scorer, at least 1; a shared prefix counts once per call.
        expansions: nodes expanded, or samples drawn where there is no tree; at least 1.
        seconds: above 0.

    Raises:
        ValueError: a limit is out of range.

    Example:
        >>> Budget(tokens=4096).tokens
        4096
    """

    tokens: int | None = None
    scorer_tokens: int | None = None
    expansions: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "scorer_tokens", "expansions"):
            if (value := getattr(self, name)) is not None:
                check_count(f"budget.{name}", value, "leave it out for no limit")
        if self.seconds is not None:
            check_positive("budget.seconds", self.seconds, "leave it out for no limit")


@dataclass
class Account:
    """Spent part of a search's budget.

    Args:
        budget: its limits.
        tokens: tokens sampled from the policy.
        scorer_tokens: tokens read by the scorer.
        expansions: nodes expanded.
    """

    budget: Budget
    tokens: int = 0
    scorer_tokens: int = 0
    expansions: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.started

    def left(self, name: Limit) -> float:
        """Returns the rest of one limit; infinite without one."""
        limit = getattr(self.budget, name)
        return math.inf if limit is None else limit - getattr(self, name)

    def exhausted(self) -> Limit | None:
        """Returns the first limit that is used up, or ``None``."""
        names: tuple[Limit, ...] = ("tokens", "scorer_tokens", "expansions", "seconds")
        return next((name for name in names if self.left(name) <= 0), None)

    def affordable(self, samples: int, most: int) -> tuple[int, int]:
        """Returns how many samples of how many tokens each the rest pays for, at most the given numbers.

        Example:
            >>> Account(Budget(tokens=10)).affordable(4, 8)
            (4, 2)
            >>> Account(Budget(tokens=3)).affordable(4, 8)
            (3, 1)
        """
        left = self.left("tokens")
        if left >= samples * most:
            return samples, most
        samples = min(samples, int(left))
        return samples, int(left) // samples if samples else 0


@dataclass
class SearchCounts:
    """Counts of a strategy's searches since it was made.

    Attributes:
        searches: searches that ended, one per prompt.
        expansions: their nodes expanded, or samples drawn where there is no tree.
        scorer_tokens: tokens read by the scorer.
        scorer_calls: its calls, one per round of the searches that advance together.
        score_seconds: seconds of scoring.
    """

    searches: int = 0
    expansions: int = 0
    scorer_tokens: int = 0
    scorer_calls: int = 0
    score_seconds: float = 0.0
