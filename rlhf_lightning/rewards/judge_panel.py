"""Reward by several judges, each asked about several named aspects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from ..utils.validation import check_choice, check_positive
from .constitution import QUESTION, ask, checked_question
from .judges import Judge, resolve_judge

Combination = Literal["mean", "min"]


class JudgePanel:
    """Rewards a completion with what a panel of judges says of its aspects.

    After Verga et al., 2024, "Replacing Judges with Juries" (arXiv:2404.18796): several small judges err less alike
    than one. Each judge says how true the statement of each aspect is, from 0 to 1; an aspect's value is the mean over
    the judges that answered, and the reward the weighted mean of the aspects, or the worst one (``min``).

    Args:
        judges: at least one, by name: anything that ``ConstitutionReward`` takes as its judge.
        aspects: at least one statement that should be true of a good answer, by name.
        weights: of the aspects' values in the mean, above 0; 1 each by default.
        combine: ``mean`` or ``min``.
        question: put to the judges, with the fields ``prompt``, ``completion`` and ``statement``.

    Raises:
        ValueError: no judge or aspect, or weights that do not fit.

    Example::

        JudgePanel({"small": "judge-1b", "other": "judge-2b"}, {"honest": "It claims nothing that it cannot know."})
    """

    def __init__(
        self,
        judges: Mapping[str, Any],
        aspects: Mapping[str, str],
        weights: Mapping[str, float] | None = None,
        combine: Combination = "mean",
        question: str = QUESTION,
    ) -> None:
        for name, given in (("judges", judges), ("aspects", aspects)):
            if not isinstance(given, Mapping) or not given:
                raise ValueError(f"{name} is {given!r}; give a mapping with at least one entry")
        check_choice("combine", combine, ("mean", "min"))
        if weights is not None:
            if weights.keys() != aspects.keys():
                raise ValueError(
                    f"weights are of {sorted(weights)}, and the aspects are {sorted(aspects)}: give one each"
                )
            if combine == "min":
                raise ValueError("weights are not read with combine='min': leave one of them out")
            for name, weight in weights.items():
                check_positive(f"the weight of aspect {name!r}", weight, "1 is usual")
        self.aspects = dict(aspects)
        self.weights = {name: 1.0 for name in aspects} if weights is None else dict(weights)
        self.combine = combine
        self.question = checked_question(question)
        self.judges: dict[str, Judge] = {name: resolve_judge(judge) for name, judge in judges.items()}

    def attach(self, module: Any) -> None:
        """Moves the judges to a policy's device."""
        for judge in self.judges.values():
            if callable(attach := getattr(judge, "attach", None)):
                attach(module)

    def verdicts(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[dict[str, dict[str, float | None]]]:
        """Asks each judge about all aspects of all completions, in one call.

        Returns:
            For each completion, by aspect and judge: a number from 0 to 1, ``None`` where the judge gave no verdict.
        """
        found: list[dict[str, dict[str, float | None]]] = [{aspect: {} for aspect in self.aspects} for _ in completions]
        samples = enumerate(zip(prompts, completions, strict=True))
        asked = [(n, aspect, pair) for n, pair in samples for aspect in self.aspects]
        questions = [ask(self.question, *pair, self.aspects[aspect]) for _, aspect, pair in asked]
        for name, judge in self.judges.items():
            for (n, aspect, _), verdict in zip(asked, judge(questions) if questions else [], strict=True):
                found[n][aspect][name] = None if isinstance(verdict, Exception) else float(verdict)
        return found

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion; ``None`` where an aspect has no verdict by any judge."""
        return [self._combined(row) for row in self.verdicts(prompts, completions)]

    def _combined(self, row: Mapping[str, Mapping[str, float | None]]) -> float | None:
        values = {}
        for aspect, by_judge in row.items():
            given = [value for value in by_judge.values() if value is not None]
            if not given:
                return None
            values[aspect] = fmean(given)
        if self.combine == "min":
            return min(values.values())
        total = math.fsum(self.weights.values())
        return math.fsum(self.weights[aspect] * value for aspect, value in values.items()) / total
