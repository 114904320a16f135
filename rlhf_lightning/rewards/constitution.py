"""Reward for keeping a list of principles, each with a weight and a check; a model may judge some of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data.messages import as_lines
from ..utils.imports import load_attribute
from ..utils.packaged_configs import packaged_config
from ._called_reward import PartedScore
from .judges import resolve_judge

Predicate = Callable[[str, str], bool | float | None]

QUESTION = (
    "Someone was asked:\n{prompt}\n\nThey answered:\n{completion}\n\nIs this true of the answer: {statement}\n"
    "Reply with yes or no.\n"
)


_CHECKS = ("require", "forbid", "predicate", "statement")


@dataclass(frozen=True)
class Principle:
    """One rule for completions, given by exactly one of four checks.

    Args:
        name: name of the rule in messages.
        weight: weight of the rule, above 0.
        require: a regular expression that must be found in the completion.
        forbid: a regular expression that must not be found in it.
        predicate: a function of prompt and completion, or its dotted path, that returns how well the rule is kept:
            true, false, a number from 0 to 1, or ``None`` where the rule does not apply.
        statement: a sentence that should be true of the completion, for a model to judge.

    Raises:
        ValueError: for none or several checks, an expression that does not compile, or a weight of 0 or below.
    """

    name: str
    weight: float = 1.0
    require: str | None = None
    forbid: str | None = None
    predicate: str | Predicate | None = None
    statement: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _CHECKS if getattr(self, name) is not None]
        if len(given) != 1:
            have = " and ".join(given) or "no check"
            raise ValueError(f"principle {self.name!r} has {have}: give exactly one of {', '.join(_CHECKS)}")
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
        """Returns the principle as a function of prompt and completion."""
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
    """Rewards a completion with the weighted share of the principles that it keeps.

    Paper: after Constitutional AI (Bai et al., 2022, arXiv:2212.08073). sum_i w_i kept_i / sum_i w_i over the
    principles that apply, kept_i from 0 to 1. Departure: a principle may be a predicate, which is cheap and
    reproducible; only principles with a statement are put to a model, the judge.

    Args:
        principles: at least one, with different names; a ``Principle``, or a dictionary of its arguments; or the path
            of a YAML file with a list of such dictionaries, such as ``configs/constitutions/hhh.yaml`` (helpful, honest
            and harmless answers, for a judge).
        judge: for principles with a statement: the folder or hub id of a language model, whose verdict is P(yes)
            relative to P(no) (``ModelJudge``); an engine or any object with its method ``generate``, whose answers are
            parsed (``EngineJudge``); an instance of either judge; or ``class_path`` and ``init_args``.
        question: the question to the judge, with the fields ``prompt``, ``completion`` and ``statement``.

    Raises:
        ValueError: for no principles, two of the same name, a statement without a judge, or a file that is no list.

    Each score carries the verdict on every principle (``score.parts``), which GRPO and PPO log as
    ``rewards/<name>/<principle>/mean``; :meth:`verdicts` returns these alone.

    Example:
        >>> polite = Principle("polite", weight=3.0, require="please")
        >>> short = Principle("short", predicate=lambda prompt, completion: len(completion) < 20)
        >>> ConstitutionReward([polite, short])(["p", "p"], ["please wait", "wait"])
        [1.0, 0.25]
    """

    def __init__(
        self, principles: str | Sequence[Principle | Mapping[str, Any]], judge: Any = None, question: str = QUESTION
    ) -> None:
        if not principles:
            raise ValueError("principles is empty: give at least one principle")
        given = _stored(principles) if isinstance(principles, str) else principles
        self.principles = [_principle(each) for each in given]
        names = [principle.name for principle in self.principles]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two principles are called {repeated!r}: give each its own name")
        self.part_names = tuple(names)
        self._checks = [(p, p.check()) for p in self.principles if p.statement is None]
        self._judged = [p for p in self.principles if p.statement is not None]
        if self._judged and judge is None:
            raise ValueError(
                f"principle {self._judged[0].name!r} has a statement: give a judge, such as a model's folder"
            )

        self.question = checked_question(question)
        self.judge = resolve_judge(judge) if self._judged else None

    def attach(self, module: Any) -> None:
        """Moves the judge to a policy's device."""
        attach = getattr(self.judge, "attach", None)
        if callable(attach):
            attach(module)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | Exception | None]:
        """Scores each completion; ``None`` without an applicable principle.

        Args:
            prompts: texts, or lists of chat messages.
            completions: as many.
            columns: the rows' other columns, which are not read.

        Returns:
            Numbers from 0 to 1, ``None`` where no principle applies, and the exception where a check failed.
        """
        weights = {principle.name: principle.weight for principle in self.principles}
        found = self.verdicts(prompts, completions)
        return [row if isinstance(row, Exception) else _share(row, weights) for row in found]

    def verdicts(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[dict[str, float | None] | Exception]:
        """Judges each completion by each principle.

        Args:
            prompts: texts, or lists of chat messages.
            completions: as many.

        Returns:
            By the principle's name a number from 0 to 1, ``None`` where it does not apply; or the exception where a
            check failed.
        """
        samples = list(zip(prompts, completions, strict=True))
        kept: list[dict[str, float | None]] = [dict.fromkeys(self.part_names) for _ in samples]
        failed: dict[int, Exception] = {}
        for number, (prompt, completion) in enumerate(samples):
            try:
                kept[number] |= self._rule_verdicts(prompt, completion)
            except Exception as error:  # of a user's predicate: only this sample is lost
                failed[number] = error

        # All questions at once, so that the judge can batch them.
        asked = [(n, principle) for n in range(len(samples)) if n not in failed for principle in self._judged]
        questions = [ask(self.question, *samples[n], str(principle.statement)) for n, principle in asked]
        verdicts = self.judge(questions) if self.judge is not None and questions else []
        for (number, principle), verdict in zip(asked, verdicts, strict=True):
            if isinstance(verdict, Exception):
                failed.setdefault(number, ValueError(f"principle {principle.name!r}: {verdict}"))
            else:
                kept[number][principle.name] = verdict
        return [failed.get(number, row) for number, row in enumerate(kept)]

    def _rule_verdicts(self, prompt: Any, completion: str) -> dict[str, float | None]:
        """The verdicts of the applicable principles that need no judge."""
        found: dict[str, float | None] = {}
        for principle, check in self._checks:
            verdict = check(prompt, completion)
            if verdict is None:
                continue
            if not 0 <= verdict <= 1:
                raise ValueError(f"principle {principle.name!r} returned {verdict!r}: return a number from 0 to 1")
            found[principle.name] = float(verdict)
        return found


def checked_question(question: str) -> str:
    """Returns a question with fields; a wrong field is found before training.

    Raises:
        ValueError: a field that is not filled in.
    """
    try:
        ask(question, "", "", "")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"question has the wrong field {error}: its fields are {{prompt}}, {{completion}} and {{statement}}"
        ) from error
    return question


def ask(question: str, prompt: Any, completion: str, statement: str) -> str:
    """Fills in the fields of a question; messages are written line by line."""
    if not isinstance(prompt, str):
        prompt = as_lines(prompt)
    return question.format(prompt=prompt, completion=completion, statement=statement)


def _principle(given: Principle | Mapping[str, Any]) -> Principle:
    if isinstance(given, Principle):
        return given
    try:
        return Principle(**given)
    except TypeError as error:
        raise ValueError(f"a principle is {given!r}: {' '.join(str(error).split())}") from error


def _stored(path: str) -> list[Any]:
    """Reads a file of principles."""
    place = packaged_config(path) or Path(path).expanduser()
    if not place.is_file():
        raise ValueError(f"there is no file of principles {path!r}: give one, or a list of principles")
    try:
        found = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path!r} has {type(found).__name__}, expected a list of principles: - {{name: ..., ...}}")
    return found


def _share(verdicts: Mapping[str, float | None], weights: Mapping[str, float]) -> PartedScore | None:
    applying = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    total = sum(weights[name] for name in applying)
    share = sum(weights[name] * verdict for name, verdict in applying.items())
    return PartedScore(share / total, verdicts) if applying else None
