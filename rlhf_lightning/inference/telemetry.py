"""The cost of sampling: tokens and seconds by phase, and the work of caches, drafts and searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Counts of an engine or strategy, since it was made or between two moments.

    Args:
        prompt_tokens: tokens of prompts, of a prompt that a call has several times once.
        reused_tokens: those whose keys and values a cache still had.
        new_tokens: tokens of completions, those of searches that were not chosen included.
        scorer_tokens: tokens read by scorers.
        scorer_calls: calls of scorers.
        expansions: nodes expanded by searches, or samples drawn where there is no tree.
        drafted: tokens guessed by speculation.
        accepted: guesses that were what the model drew.
        prefill_seconds: computing prompts and drawing first tokens.
        decode_seconds: drawing all other tokens.
        score_seconds: scoring candidates.

    Example:
        >>> earlier, later = Telemetry(new_tokens=3), Telemetry(new_tokens=7, drafted=4, accepted=3)
        >>> later.since(earlier).metrics()["generation/new_tokens"], later.acceptance_rate
        (4.0, 0.75)
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    scorer_tokens: int = 0
    scorer_calls: int = 0
    expansions: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    score_seconds: float = 0.0

    @classmethod
    def of(cls, engine: Any) -> Telemetry:
        """Reads the statistics of an engine or strategy; one that keeps none counts nothing."""
        tell = getattr(engine, "statistics", None)
        found: dict[str, Any] = tell() if callable(tell) else {}
        counts = {**found, **found.get("speculation", {}), **found.get("search", {})}
        return cls(**{field.name: counts.get(field.name, 0) for field in fields(cls)})

    def plus(self, other: Telemetry) -> Telemetry:
        """Adds other counts."""
        return Telemetry(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @classmethod
    def over_ranks(cls, parts: Sequence[Telemetry]) -> Telemetry:
        """Joins the counts of ranks that worked at the same time: sums of counts, the longest of each time.

        Example:
            >>> one, other = Telemetry(new_tokens=3, decode_seconds=1.0), Telemetry(new_tokens=4, decode_seconds=2.0)
            >>> Telemetry.over_ranks([one, other])  # doctest: +ELLIPSIS
            Telemetry(prompt_tokens=0, reused_tokens=0, new_tokens=7, ... decode_seconds=2.0, score_seconds=0.0)
        """
        joined = {}
        for field in fields(cls):
            join = max if field.name.endswith("_seconds") else sum
            joined[field.name] = join(getattr(part, field.name) for part in parts)
        return cls(**joined)

    def since(self, earlier: Telemetry) -> Telemetry:
        """Subtracts the counts of an earlier moment."""
        return Telemetry(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that were right; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompts' tokens that a cache still had; 0 without any."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def metrics(self, batches: int = 1) -> dict[str, float]:
        """Names the values as loggers get them: counts and seconds per batch; of what there was nothing, no value."""
        values = {
            "generation/prompt_tokens": self.prompt_tokens / batches,
            "generation/new_tokens": self.new_tokens / batches,
            "time/prefill": self.prefill_seconds / batches,
            "time/decode": self.decode_seconds / batches,
        }
        if self.reused_tokens:
            values["generation/cache_hit_rate"] = self.cache_hit_rate
        if self.drafted:
            values["generation/acceptance_rate"] = self.acceptance_rate
        if self.expansions:
            values["generation/expansions"] = self.expansions / batches
            values["generation/scorer_tokens"] = self.scorer_tokens / batches
            values["generation/scorer_calls"] = self.scorer_calls / batches
            values["time/score_candidates"] = self.score_seconds / batches
        return values if self.new_tokens else {}

    def __str__(self) -> str:
        """Says it in one line."""
        parts = [
            f"prompts {self.prompt_tokens:,} tokens ({self.prefill_seconds:.1f} s)",
            f"new {self.new_tokens:,} tokens ({self.decode_seconds:.1f} s)",
        ]
        if self.expansions:
            parts.append(f"scorer {self.scorer_tokens:,} tokens ({self.score_seconds:.1f} s)")
            parts.append(f"{self.expansions:,} expansions")
        if self.reused_tokens:
            parts.append(f"{self.cache_hit_rate:.0%} of the prompts' tokens found in the cache")
        if self.drafted:
            parts.append(f"{self.acceptance_rate:.0%} of {self.drafted:,} drafts accepted")
        return ", ".join(parts)
