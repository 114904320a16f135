"""A reward for keeping to a list of principles, each with a weight and a check."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._loading import load_attribute

Predicate = Callable[[str, str], bool | float | None]


@dataclass(frozen=True)
class Principle:
    """One rule that completions should keep, given by exactly one of its three checks.

    Args:
        name: what the rule is called in messages.
        weight: how much it counts, above 0.
        require: a regular expression that must be found in the completion.
        forbid: a regular expression that must not be found in it.
        predicate: a function of prompt and completion, or the dotted path of one, that says how well the rule is kept:
            true, false, a number from 0 to 1, or ``None`` where the rule does not apply.

    Raises:
        ValueError: for none or several checks, an expression that does not compile, or a weight of 0 or below.
    """

    name: str
    weight: float = 1.0
    require: str | None = None
    forbid: str | None = None
    predicate: str | Predicate | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("require", "forbid", "predicate") if getattr(self, name) is not None]
        if len(given) != 1:
            have = " and ".join(given) or "no check"
            raise ValueError(f"principle {self.name!r} has {have}: give exactly one of require, forbid, predicate")
        if not self.weight > 0:
            raise ValueError(f"principle {self.name!r} has the weight {self.weight}: write a number above 0")
        pattern = self.require if self.require is not None else self.forbid
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"principle {self.name!r}: {pattern!r} is not a regular expression: {error}"
                ) from error

    def check(self) -> Predicate:
        """The principle as a function of prompt and completion."""
        if self.require is not None:
            required = re.compile(self.require, re.DOTALL)
            return lambda prompt, completion: required.search(completion) is not None
        if self.forbid is not None:
            forbidden = re.compile(self.forbid, re.DOTALL)
            return lambda prompt, completion: forbidden.search(completion) is None
        loaded = load_attribute(self.predicate) if isinstance(self.predicate, str) else self.predicate
        if not callable(loaded):
            raise ValueError(f"principle {self.name!r}: {self.predicate!r} is not a function of prompt and completion")
        predicate: Predicate = loaded
        return predicate


class ConstitutionReward:
    """The weighted share of a list of principles that a completion keeps.

    Paper: after Constitutional AI (Bai et al., 2022, arXiv:2212.08073). Departure: the principles are predicates, so
    that the reward is cheap and reproducible. sum_i w_i kept_i / sum_i w_i over the principles that apply.

    Args:
        principles: at least one, with different names.

    Raises:
        ValueError: for no principles, or two of the same name.

    Example:
        >>> polite = Principle("polite", weight=3.0, require="please")
        >>> short = Principle("short", predicate=lambda prompt, completion: len(completion) < 20)
        >>> ConstitutionReward([polite, short])(["p", "p"], ["please wait", "wait"])
        [1.0, 0.25]
    """

    def __init__(self, principles: list[Principle]) -> None:
        if not principles:
            raise ValueError("principles is empty: give at least one principle")
        names = [principle.name for principle in principles]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two principles are called {repeated!r}: give each its own name")
        self.principles = principles
        self._checks = [(principle, principle.check()) for principle in principles]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion; one to which no principle applies cannot be scored."""
        return [self._score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def _score(self, prompt: str, completion: str) -> float | None:
        kept = total = 0.0
        for principle, check in self._checks:
            verdict = check(prompt, completion)
            if verdict is None:
                continue
            if not 0 <= verdict <= 1:
                raise ValueError(f"principle {principle.name!r} returned {verdict!r}: return a number from 0 to 1")
            kept += principle.weight * float(verdict)
            total += principle.weight
        return kept / total if total else None
