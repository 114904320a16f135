"""Checks of a model by tasks: verdicts, perturbed prompts, paraphrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, ClassVar

from ..data.final_answer import answer_key
from ..evaluation import Task, TaskResult
from ..evaluation.running import run_task
from ..inference import Engine
from ..metrics.intervals import Interval, paired_bootstrap
from ..utils.option_groups import OptionGroup
from .corruption import PerturbedPrompt
from .findings import Finding, at_least, at_most, bounded_mean, check_share


@dataclass(frozen=True, kw_only=True)
class Verdicts(OptionGroup):
    """Checks that the accuracy on a task is not certain to be below a limit.

    The task's verifier may be a ``JudgePanel``, ``StaticCodeChecks`` or any other reward function.

    Args:
        task: a task of a suite, or a mapping of its options.
        min_accuracy: in [0, 1].
    """

    group: ClassVar[str] = "check"

    task: Any
    min_accuracy: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("min_accuracy", self.min_accuracy)

    def run(self, engine: Engine, seed: int) -> Finding:
        """Answers and verifies the task."""
        task = _task(self.task)
        found = run_task(task, engine, seed=seed)
        accuracy = found.accuracy
        wrong = [s.text for p in found.prompts for s in p.samples if s.reward is not None and s.reward < task.success]
        detail = f"{accuracy.value:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] of the answers to task "
        detail += f"{found.task.name!r} are right; at least {self.min_accuracy:.1%} are needed"
        return at_least(f"verdicts of {found.task.name}", accuracy, self.min_accuracy, detail, wrong)


@dataclass(frozen=True, kw_only=True)
class Robustness(OptionGroup):
    """Checks that the accuracy does not fall where prompts are perturbed: the worst perturbation counts.

    Each perturbation is compared with the plain prompts by a paired bootstrap, at a level divided by their number
    (Bonferroni), because the worst of several is chosen.

    Args:
        task: a task of a suite, or a mapping of its options.
        perturbations: as in ``PerturbedPrompt``, at least one.
        max_drop: largest fall of the accuracy, in [0, 1].
    """

    group: ClassVar[str] = "check"

    task: Any
    perturbations: tuple[str, ...] = ("typos", "spaces", "lower")
    max_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("max_drop", self.max_drop)
        _perturbed(self.perturbations)

    def run(self, engine: Engine, seed: int) -> Finding:
        """Answers the plain and the perturbed prompts."""
        task = _task(self.task)
        plain = run_task(task, engine, seed=seed)
        level = 1 - 0.05 / len(self.perturbations)
        drops = []
        for how in self.perturbations:
            other = run_task(task, engine, seed=seed, transform=PerturbedPrompt(how, seed))
            rows = [row for row in plain.scores if row in other.scores]
            before, after = [plain.scores[row] for row in rows], [other.scores[row] for row in rows]
            if len(rows) < 2:
                raise ValueError(f"task {task.name!r} has {len(rows)} prompts with verdicts: give at least two")
            found = paired_bootstrap(before, after, level=level, seed=seed)
            broken = [
                p.samples[0].text
                for p in other.prompts
                if other.scores.get(p.row_id, 1) < plain.scores.get(p.row_id, 0)
            ]
            drops.append((Interval(found.difference, found.low, found.high), how, broken))
        drop, how, broken = max(drops, key=lambda entry: entry[0].low)
        detail = f"with {how!r} the accuracy on task {task.name!r} falls by {drop.value:.1%} [{drop.low:.1%}, "
        detail += f"{drop.high:.1%}]; at most {self.max_drop:.1%} is allowed"
        return at_most("robustness", drop, self.max_drop, detail, broken)


@dataclass(frozen=True, kw_only=True)
class Consistency(OptionGroup):
    """Checks that paraphrases of a prompt get the same final answer.

    The agreement of a prompt is the share of pairs of its phrasings whose final answers (``data.answer_key``) are the
    same; an empty answer agrees with none.

    Args:
        task: a task of a suite, or a mapping of its options; answered greedily, whatever its sampling.
        templates: at least two, with the field ``{prompt}``.
        min_agreement: mean agreement that is needed, in [0, 1].
    """

    group: ClassVar[str] = "check"

    task: Any
    templates: tuple[str, ...] = ("{prompt}", "Please answer this: {prompt}")
    min_agreement: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("min_agreement", self.min_agreement)
        _perturbed(self.templates)
        if len(set(self.templates)) < 2:
            raise ValueError(
                f"{self.full_name('templates')} is {list(self.templates)}; give at least two different ones"
            )

    def run(self, engine: Engine, seed: int) -> Finding:
        """Answers every phrasing, and compares the answers."""
        given = _task(self.task)
        task = Task(
            **given.as_dict() | {"num_samples": 1, "strategy": None, "sampling": {**given.sampling, "temperature": 0.0}}
        )
        results = [run_task(task, engine, seed=seed, transform=PerturbedPrompt(t)) for t in self.templates]
        answers = [_first_answers(result) for result in results]
        rows = [row for row in answers[0] if all(row in other for other in answers)]
        keys = {row: [answer_key(other[row]) for other in answers] for row in rows}
        agreements = {row: fmean(a is not None and a == b for a, b in combinations(keys[row], 2)) for row in rows}
        found = bounded_mean(list(agreements.values()))
        split = [" | ".join(repr(other[row]) for other in answers) for row, share in agreements.items() if share < 1]
        detail = (
            f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}] of the pairs of phrasings of task {task.name!r} "
        )
        detail += f"get the same answer; at least {self.min_agreement:.1%} are needed"
        return at_least("consistency", found, self.min_agreement, detail, split)


def _task(given: Task | Mapping[str, Any]) -> Task:
    return given if isinstance(given, Task) else Task(**given)


def _perturbed(hows: Sequence[str]) -> list[PerturbedPrompt]:
    if not hows:
        raise ValueError("there is no perturbation: give at least one, such as typos")
    return [PerturbedPrompt(how) for how in hows]


def _first_answers(result: TaskResult) -> dict[str, str]:
    return {prompt.row_id: prompt.samples[0].text for prompt in result.prompts}
