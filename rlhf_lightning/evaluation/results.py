"""Typed results of evaluations: every sample of every prompt, and what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from ..data.final_answer import answer_key
from ..metrics.at_k import majority_at_k, pass_at_k
from ..metrics.intervals import Comparison, Interval, mcnemar, mean_interval, paired_bootstrap, wilson_interval
from ..metrics.texts import distinct_n, length_statistics, repetition, unique_share
from .suite import Task


@dataclass(frozen=True)
class SampleResult:
    """A completion and its verdict.

    Attributes:
        text: the completion.
        reward: of the verifier; ``None`` without a verdict.
        num_tokens: sampled tokens.
        ended: whether the model ended it; else it was truncated at its limit.
    """

    text: str
    reward: float | None
    num_tokens: int
    ended: bool


@dataclass(frozen=True)
class PromptResult:
    """A prompt and its samples.

    Attributes:
        row_id: of the row; the same for every model.
        prompt: as text, or as messages.
        samples: completions.
    """

    row_id: str
    prompt: Any
    samples: tuple[SampleResult, ...]

    def right(self, success: float) -> list[bool]:
        """Whether each sample that has a verdict is right."""
        return [sample.reward >= success for sample in self.samples if sample.reward is not None]


@dataclass(frozen=True)
class TaskResult:
    """A model's results on a task.

    Attributes:
        model: name of the model.
        task: what was asked.
        prompts: results per prompt.
        seconds: of sampling and verifying.
    """

    model: str
    task: Task
    prompts: tuple[PromptResult, ...]
    seconds: float

    @cached_property
    def scores(self) -> dict[str, float]:
        """The share of right samples of each prompt that has a verdict, by row."""
        shares = {prompt.row_id: prompt.right(self.task.success) for prompt in self.prompts}
        return {row: fmean(right) for row, right in shares.items() if right}

    @property
    def accuracy(self) -> Interval:
        """The mean score with its 95 % interval: Wilson's where every prompt is right or wrong, else Student's."""
        values = list(self.scores.values())
        if all(value in (0.0, 1.0) for value in values):
            return wilson_interval(int(sum(values)), len(values))
        if len(values) == 1:
            return Interval(values[0], 0.0, 1.0)
        found = mean_interval(values)
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All numbers: ``accuracy`` and its interval, ``pass@k``, ``maj@k``, rewards, diversity, lengths."""
        samples = [sample for prompt in self.prompts for sample in prompt.samples]
        texts, rewards = [s.text for s in samples], [s.reward for s in samples if s.reward is not None]
        accuracy = self.accuracy
        found = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "reward": fmean(rewards),
            "prompts": len(self.scores),
            "without_verdict": len(self.prompts) - len(self.scores),
            **self._at_k(),
            **{f"length/{name}": value for name, value in length_statistics([s.num_tokens for s in samples]).items()},
            "truncated": fmean(not sample.ended for sample in samples),
            "repetition": fmean(map(repetition, texts)),
            "distinct_1": distinct_n(texts, 1),
            "distinct_2": distinct_n(texts, 2),
        }
        if self.task.num_samples > 1 and self.task.votes:
            shares = [unique_share([answer_key(s.text) for s in prompt.samples]) for prompt in self.prompts]
            found["unique_answers"] = fmean([share for share in shares if not math.isnan(share)] or [math.nan])
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _at_k(self) -> dict[str, float]:
        """Estimates pass@k and maj@k of several samples, over the prompts whose samples all have verdicts."""
        judged = [
            prompt
            for prompt in self.prompts
            if len(prompt.right(self.task.success)) == len(prompt.samples) == self.task.num_samples
        ]
        if self.task.num_samples == 1 or not judged:
            return {}
        found = {}
        for k in self.task.ks:
            counts = [sum(prompt.right(self.task.success)) for prompt in judged]
            found[f"pass@{k}"] = fmean(pass_at_k(self.task.num_samples, count, k) for count in counts)
            if self.task.votes:
                found[f"maj@{k}"] = fmean(majority_at_k(*_votes(prompt, self.task.success), k) for prompt in judged)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, which :meth:`read` takes."""
        prompts = [asdict(prompt) for prompt in self.prompts]
        return {"model": self.model, "task": self.task.as_dict(), "seconds": self.seconds, "prompts": prompts}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> TaskResult:
        """Makes a result of plain values."""
        prompts = [
            PromptResult(p["row_id"], p["prompt"], tuple(SampleResult(**s) for s in p["samples"]))
            for p in written["prompts"]
        ]
        return cls(written["model"], Task(**written["task"]), tuple(prompts), written["seconds"])


def _votes(prompt: PromptResult, success: float) -> tuple[list[Hashable | None], list[float]]:
    answers = [answer_key(sample.text) for sample in prompt.samples]
    return answers, [float((sample.reward or 0.0) >= success) for sample in prompt.samples]


@dataclass(frozen=True)
class PairedResult:
    """Two models on the prompts that both have a verdict for.

    Attributes:
        task: name of the task.
        model: the model.
        baseline: the one that it is compared with.
        prompts: number of prompts.
        comparison: the model's mean score less the baseline's.
        mcnemar: p-value of McNemar's exact test, where every prompt is right or wrong; else ``None``.
    """

    task: str
    model: str
    baseline: str
    prompts: int
    comparison: Comparison
    mcnemar: float | None


def compare(result: TaskResult, baseline: TaskResult, *, seed: int = 0) -> PairedResult:
    """Compares two models on the same prompts.

    Args:
        result: of the model.
        baseline: of the one that it is compared with, on the same task.
        seed: of the resamples; see ``paired_bootstrap``.

    Raises:
        ValueError: fewer than two prompts have verdicts in both.
    """
    rows = [row for row in baseline.scores if row in result.scores]
    if len(rows) < 2:
        raise ValueError(
            f"{result.model!r} and {baseline.model!r} share {len(rows)} prompts with verdicts in task "
            f"{result.task.name!r}: give both the same prompts, at least two"
        )
    ours, theirs = [result.scores[row] for row in rows], [baseline.scores[row] for row in rows]
    binary = all(value in (0.0, 1.0) for value in ours + theirs)
    test = mcnemar([value == 1 for value in ours], [value == 1 for value in theirs]) if binary else None
    compared = paired_bootstrap(ours, theirs, seed=seed)
    return PairedResult(result.task.name, result.model, baseline.model, len(rows), compared, test)


def compare_all(results: Sequence[TaskResult], *, seed: int = 0) -> list[PairedResult]:
    """Compares every model with the first one, task by task; pairs that share fewer than two prompts are left out."""
    first: dict[str, TaskResult] = {}
    found = []
    for result in results:
        baseline = first.setdefault(result.task.name, result)
        if baseline is not result and len(baseline.scores.keys() & result.scores.keys()) > 1:
            found.append(compare(result, baseline, seed=seed))
    return found
