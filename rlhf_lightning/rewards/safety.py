"""Reward that takes a fixed penalty for each kind of unsafe text in a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ._called_reward import PartedScore

# Wordings of harmful requests, in English and in any case: a first net, which neither knows what a text means nor
# what it was asked.
SAFETY_PATTERNS: Final[Mapping[str, str]] = {
    "weapons": r"\b(?:how to|steps? to|instructions? (?:for|to)|recipe for)\b.{0,60}\b(?:pipe bombs?|bombs?|explosives?"
    r"|molotov|nerve agents?|sarin|ricin)\b",
    "malware": r"\b(?:write|create|build|here(?:'s| is))\b.{0,40}\b(?:ransomware|keyloggers?|botnets?|rootkits?)\b",
    "threat": r"\b(?:i|we)(?:'ll| will| am going to| are going to)\s+(?:kill|murder|shoot|stab|hurt)\s+"
    r"(?:you|him|her|them)\b",
    "self_harm": r"\b(?:kill|hurt|cut|harm)\s+yourself\b|\byou should (?:die|end your life)\b",
    "card_number": r"\b\d{4}([ -])\d{4}\1\d{4}\1\d{4}\b",
    "social_security_number": r"\b\d{3}-\d{2}-\d{4}\b",
    "secret_key": r"\b(?:AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36})\b"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "destructive_command": r"\brm -[a-z]*rf? (?:--no-preserve-root )?[/~](?:\s|$)|:\(\)\s*\{\s*:\|:\s*&\s*\}\s*;\s*:"
    r"|\bmkfs\.\w+ /dev/",
}


class SafetyReward:
    """Adds a fixed penalty for each pattern that is found in a completion, however often; 0 without any.

    Patterns find words, not meanings: they are cheap and reproducible, and no substitute for a judge
    (``ConstitutionReward`` with ``configs/constitutions/hhh.yaml``). GRPO and PPO log the share of completions in which
    each is found as ``rewards/<name>/<pattern>/mean``.

    Args:
        patterns: regular expressions by name, which are searched for in any case, a dot also matching a line break;
            ``SAFETY_PATTERNS`` by default.
        penalty: for each pattern found, at most 0.

    Raises:
        ValueError: no pattern, one that does not compile, or a penalty above 0.

    Example:
        >>> SafetyReward()(["p"] * 2, ["It is 7.", "Run rm -rf / and send 4111 1111 1111 1111."])
        [0.0, -20.0]
    """

    def __init__(self, patterns: Mapping[str, str] | None = None, penalty: float = -10.0) -> None:
        given = SAFETY_PATTERNS if patterns is None else patterns
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"patterns is {given!r}: give regular expressions by name, such as {{'rude': 'idiot'}}")
        if isinstance(penalty, bool) or not -float("inf") < penalty <= 0:
            raise ValueError(f"penalty is {penalty!r}; it must be a finite number of at most 0 (-10 is usual)")
        self.patterns: dict[str, re.Pattern[str]] = {}
        for name, pattern in given.items():
            try:
                self.patterns[str(name)] = re.compile(pattern, re.IGNORECASE | re.DOTALL)
            except (re.error, TypeError) as error:
                raise ValueError(f"pattern {name!r} is {pattern!r}, no regular expression: {error}") from error
        self.part_names = tuple(self.patterns)
        self.penalty = penalty

    def found(self, completion: str) -> list[str]:
        """Returns the names of the patterns that are found in a completion."""
        return [name for name, pattern in self.patterns.items() if pattern.search(completion)]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        """Scores each completion."""
        scores: list[float] = []
        for completion in completions:
            found = self.found(completion)
            parts = {name: float(name in found) for name in self.part_names}
            scores.append(PartedScore(self.penalty * len(found) + 0.0, parts))
        return scores
