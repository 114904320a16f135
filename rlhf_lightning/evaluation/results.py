"""Typed results of evaluations: every sample of every prompt, and what is computed from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import fsum
from typing import Any

from ..metrics.intervals import Comparison, Interval, mcnemar, paired_bootstrap, share_interval
from .samples import PromptResult, SampleResult
from .suite import AnyTask, task_of
from .tasks import Task

__all__ = ["PairedResult", "PromptResult", "SampleResult", "TaskResult", "compare", "compare_all"]


@dataclass(frozen=True)
class TaskResult:
    """A model's results on a task.

    Attributes:
        model: name of the model.
        task: what was asked.
        prompts: results per prompt.
        seconds: of sampling and verifying.
        token_seconds: of sampling, for each sampled token: the median over the batches of prompts that were answered
            together. A measurement, unlike all else: it depends on the machine. ``None`` where nothing was sampled, or
            by several processes.
        model_hash: of the model's contents; ``None`` where it is no folder or results are not kept.

    Raises:
        ValueError: two prompts have the same row id, so that results of one would count as those of the other.
    """

    model: str
    task: AnyTask
    prompts: tuple[PromptResult, ...]
    seconds: float
    token_seconds: float | None = None
    model_hash: str | None = None

    def __post_init__(self) -> None:
        counts = Counter(prompt.row_id for prompt in self.prompts)
        if repeated := [row_id for row_id, count in counts.items() if count > 1]:
            raise ValueError(
                f"{counts[repeated[0]]} rows of task {self.task.name!r} have the id {repeated[0]!r}, and results are "
                "compared by ids: give every row its own (an old result is computed again in another folder)"
            )

    @cached_property
    def scores(self) -> dict[str, float]:
        """The share of right samples of each prompt that has a verdict, by row."""
        shares = {prompt.row_id: self.task.share(prompt) for prompt in self.prompts}
        return {row: share for row, share in shares.items() if share is not None}

    @property
    def accuracy(self) -> Interval:
        """The mean score with its 95 % interval: Wilson's where every prompt is right or wrong."""
        return _interval(self.scores.values())

    @cached_property
    def at_k(self) -> dict[str, dict[str, float]]:
        """The estimates pass@k, maj@k and best@k of each prompt, by name and row."""
        return self.task.at_k(self.prompts) if isinstance(self.task, Task) else {}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All numbers: ``accuracy`` and its interval, numbers of prompts, and the metrics of the task."""
        accuracy = self.accuracy
        found = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "prompts": len(self.scores),
            "without_verdict": len(self.prompts) - len(self.scores),
            **self.task.metrics(self.prompts),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, which :meth:`read` takes."""
        prompts = [asdict(prompt) for prompt in self.prompts]
        times = {"seconds": self.seconds, "token_seconds": self.token_seconds}
        of = {"model": self.model, "model_hash": self.model_hash}
        return {**of, "task": self.task.as_dict(), **times, "prompts": prompts}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> TaskResult:
        """Makes a result of plain values."""
        prompts = tuple(map(PromptResult.read, written["prompts"]))
        times = written["seconds"], written.get("token_seconds")
        return cls(written["model"], task_of(written["task"]), prompts, *times, written.get("model_hash"))


def _interval(shares: Collection[float]) -> Interval:
    return share_interval(len(shares), fsum(shares), fsum(share * share for share in shares))


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
        differing: number of prompts on which the scores differ.
    """

    task: str
    model: str
    baseline: str
    prompts: int
    comparison: Comparison
    mcnemar: float | None
    differing: int


def compare(result: TaskResult, baseline: TaskResult, *, seed: int = 0) -> PairedResult:
    """Compares two models on the same prompts.

    Args:
        result: of the model.
        baseline: of the one that it is compared with, on the same task.
        seed: of the resamples; see ``paired_bootstrap``.

    Raises:
        ValueError: fewer than two prompts have verdicts in both.
    """
    return compare_scores(result.scores, baseline.scores, result.task.name, result.model, baseline.model, seed=seed)


def compare_scores(
    scores: Mapping[str, float], others: Mapping[str, float], task: str, model: str, baseline: str, *, seed: int = 0
) -> PairedResult:
    """Compares two models by their scores of the same prompts.

    Args:
        scores: of the model, by row.
        others: of the one that it is compared with.
        task: name of the task.
        model: name of the model.
        baseline: name of the other.
        seed: of the resamples; see ``paired_bootstrap``.

    Raises:
        ValueError: fewer than two prompts have scores in both.
    """
    rows = [row for row in others if row in scores]
    if len(rows) < 2:
        raise ValueError(
            f"{model!r} and {baseline!r} share {len(rows)} prompts with verdicts in task {task!r}: give both the same "
            "prompts, at least two"
        )
    ours, theirs = [scores[row] for row in rows], [others[row] for row in rows]
    binary = all(value in (0.0, 1.0) for value in ours + theirs)
    test = mcnemar([value == 1 for value in ours], [value == 1 for value in theirs]) if binary else None
    compared = paired_bootstrap(ours, theirs, seed=seed)
    differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return PairedResult(task, model, baseline, len(rows), compared, test, differing)


@dataclass(frozen=True)
class AtK:
    """An estimate at k with its interval, and compared with the first model's.

    Attributes:
        task: name of the task.
        model: name of the model.
        estimate: its name, such as ``pass@4``.
        interval: its mean over prompts, with the 95 % interval.
        paired: the comparison, of a model that is not the first and shares at least two prompts with it.
    """

    task: str
    model: str
    estimate: str
    interval: Interval
    paired: PairedResult | None


def at_k_of(results: Sequence[TaskResult], *, seed: int = 0) -> list[AtK]:
    """Computes intervals of all estimates at k over prompts, and compares every model with the first one.

    Args:
        results: of every model and task, the models in their order.
        seed: of the resamples; see ``paired_bootstrap``.
    """
    first: dict[str, TaskResult] = {}
    found = []
    for result in results:
        baseline, task = first.setdefault(result.task.name, result), result.task.name
        for name, values in result.at_k.items():
            others, paired = baseline.at_k.get(name, {}), None
            if baseline is not result and len(others.keys() & values.keys()) > 1:
                paired = compare_scores(values, others, task, result.model, baseline.model, seed=seed)
            found.append(AtK(task, result.model, name, _interval(values.values()), paired))
    return found


def compare_all(results: Sequence[TaskResult], *, seed: int = 0) -> list[PairedResult]:
    """Compares every model with the first one, task by task; pairs that share fewer than two prompts are left out."""
    first: dict[str, TaskResult] = {}
    found = []
    for result in results:
        baseline = first.setdefault(result.task.name, result)
        if baseline is not result and len(baseline.scores.keys() & result.scores.keys()) > 1:
            found.append(compare(result, baseline, seed=seed))
    return found
