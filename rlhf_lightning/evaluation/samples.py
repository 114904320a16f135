"""Typed results of one prompt, or of one row that a reward model scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SampleResult:
    """A completion, or a step of one, and its verdict.

    Attributes:
        text: the completion or step.
        reward: of the verifier or reward model; ``None`` without a verdict.
        num_tokens: sampled tokens; 0 of a given completion.
        ended: whether the model ended it; else it was truncated at its limit.
        score: of the task's scorer, by which the best of several is chosen; ``None`` without one.

    Example:
        >>> SampleResult("4", reward=1.0, num_tokens=2, ended=True).reward
        1.0
    """

    text: str
    reward: float | None
    num_tokens: int
    ended: bool
    score: float | None = None


@dataclass(frozen=True)
class PromptResult:
    """A prompt and its samples.

    Attributes:
        row_id: of the row; the same for every model.
        prompt: as text, or as messages.
        samples: completions, none where the prompt leaves no room for one; of a pair the chosen one first; of a
            solution its steps.
        section: the part of the rows that it belongs to, if they have parts.
        expected: number of the first wrong step, -1 for none, of a solution that is marked so.

    Example:
        >>> samples = (SampleResult("4", 1.0, 2, True), SampleResult("5", 0.0, 2, True))
        >>> PromptResult("rows:0", "2+2=", samples).right(0.5)
        [True, False]
    """

    row_id: str
    prompt: Any
    samples: tuple[SampleResult, ...]
    section: str | None = None
    expected: int | None = None

    def right(self, success: float) -> list[bool]:
        """Whether each sample that has a verdict is right."""
        return [sample.reward >= success for sample in self.samples if sample.reward is not None]

    @classmethod
    def read(cls, written: dict[str, Any]) -> PromptResult:
        """Makes a result of plain values."""
        return cls(**{**written, "samples": tuple(SampleResult(**sample) for sample in written["samples"])})
