"""Win rates of every model of a report against the first one, task by task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..rewards.judges import Judge
from ..utils.messages import one_line
from .results import TaskResult
from .samples import PromptResult
from .tasks import Task
from .win_rate import UndecidedError, WinRate, rate_of, win_rate


@dataclass(frozen=True)
class Wins:
    """A model's win rate against the first model on a task.

    Attributes:
        task: name of the task.
        model: the model.
        baseline: the one that it is compared with.
        rate: the win rate of the model's answers; ``None`` where fewer than two prompts were decided.
        undecided: the reason where ``rate`` is ``None``, else empty.
    """

    task: str
    model: str
    baseline: str
    rate: WinRate | None
    undecided: str = ""

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Wins:
        """Makes a result of plain values."""
        rate = written["rate"]
        return cls(**{**written, "rate": None if rate is None else WinRate(**rate)})

    def cells(self) -> list[str]:
        """Formats the win rate: its value, interval, counts, the rate at equal lengths, and a judge's consistency."""
        rate = self.rate
        if rate is None:
            return ["undecided", self.undecided, *[""] * (len(COLUMNS) - 2)]
        return [
            f"{rate.value:.1%}",
            f"{rate.low:.1%} to {rate.high:.1%}",
            *(str(count) for count in (rate.wins, rate.ties, rate.losses, rate.undecided)),
            f"{rate.length_controlled:.1%}",
            "" if rate.consistent is None else f"{rate.consistent:.1%}",
        ]


# Headings of the cells.
COLUMNS = (
    "win rate",
    "95 % interval",
    "wins",
    "ties",
    "losses",
    "undecided",
    "at equal lengths",
    "same in both orders",
)
# Returns what was computed before for a key, or computes it.
Keep = Callable[[Sequence[Any], Callable[[], dict[str, Any]]], dict[str, Any]]


def wins_of(result: TaskResult, baseline: TaskResult, judge: Judge | None) -> WinRate:
    """Compares the first answers of two models to the prompts that they share.

    Args:
        result: of the model, on a task with ``win_rate``.
        baseline: of the other, on the same task.
        judge: compares the answers; without one the rewards or scores of the results do.

    Raises:
        UndecidedError: fewer than two prompts were decided.
        ValueError: a judge failed.
    """
    pairs, options = _pairs(result, baseline), _task(result).wins
    ours, theirs = [one.samples[0] for one, _ in pairs], [other.samples[0] for _, other in pairs]
    texts, others = [sample.text for sample in ours], [sample.text for sample in theirs]
    try:
        if judge is not None:
            prompts = [one.prompt for one, _ in pairs]
            return win_rate(
                prompts, texts, others, judge=judge, question=options.question, tie_margin=options.tie_margin
            )
        values, against = [[getattr(s, options.by) for s in samples] for samples in (ours, theirs)]
        differences = [None if a is None or b is None else a - b for a, b in zip(values, against, strict=True)]
        return rate_of(differences, texts, others, options.margin)
    except Exception as error:
        kind = UndecidedError if isinstance(error, UndecidedError) else ValueError
        said = error if isinstance(error, ValueError) else f"the judge failed: {type(error).__name__}: {error}"
        raise kind(one_line(f"win rate of {result.model!r} on task {result.task.name!r}: {said}")) from error


def all_wins(
    results: Sequence[TaskResult],
    judges: Mapping[str, Judge | None],
    keep: Keep = lambda key, compute: compute(),
) -> tuple[Wins, ...]:
    """Compares every model with the first one on each task that has ``win_rate``.

    Where fewer than two prompts were decided there is no win rate; the result says so, and a warning.

    Args:
        results: of every model and task, the models in their order.
        judges: of tasks by name; ``None`` where rewards or scores decide.
        keep: finds what was computed before for a key.

    Raises:
        ValueError: a judge failed.
    """
    first: dict[str, TaskResult] = {}
    found = []
    for result in results:
        baseline, name = first.setdefault(result.task.name, result), result.task.name
        if baseline is result or not isinstance(result.task, Task) or result.task.win_rate is None:
            continue

        # The answers of all models are worth more than a rate that two of them lack.
        rate, undecided = None, ""
        try:
            rate = _rate(result, baseline, judges[name], asdict(result.task.wins), keep)
        except UndecidedError as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            undecided = str(error.__cause__ or error)
        found.append(Wins(name, result.model, baseline.model, rate, undecided))
    return tuple(found)


def _rate(
    result: TaskResult, baseline: TaskResult, judge: Judge | None, options: dict[str, Any], keep: Keep
) -> WinRate:
    if judge is None:
        return wins_of(result, baseline, None)
    # A judge is not asked again about the same answers.
    texts = [[a.prompt, a.samples[0].text, b.samples[0].text] for a, b in _pairs(result, baseline)]
    return WinRate(**keep([options, texts], partial(_plain_wins, result, baseline, judge)))


def _plain_wins(result: TaskResult, baseline: TaskResult, judge: Judge) -> dict[str, Any]:
    return asdict(wins_of(result, baseline, judge))


def _pairs(result: TaskResult, baseline: TaskResult) -> list[tuple[PromptResult, PromptResult]]:
    others = {prompt.row_id: prompt for prompt in baseline.prompts}
    shared = ((prompt, others[prompt.row_id]) for prompt in result.prompts if prompt.row_id in others)
    # Prompts without samples did not fit one of the models.
    return [(prompt, other) for prompt, other in shared if prompt.samples and other.samples]


def _task(result: TaskResult) -> Task:
    assert isinstance(result.task, Task)
    return result.task
