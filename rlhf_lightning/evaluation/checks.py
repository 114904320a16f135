"""Checks suites without loading a model: by ``evaluate``, by stages before the first one runs, and by plans."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.formats import prompt_only
from ..data.sources import open_source
from ..inference.answering import StrategyOption
from ..models import load_tokenizer
from ..utils.imports import load_attribute
from .answers import load_verifier
from .suite import Suite
from .tasks import Task

# Classes of the package whose options name a folder or hub id; those of others may name models on servers.
_WITH_MODEL = {"RewardModelReward": "model", "ProcessModelReward": "model", "ModelJudge": "model"}
_PACKAGE = __name__.partition(".")[0]


def check_suite(source: Suite | Mapping[str, Any] | str | Path, awaited: Sequence[str] = ()) -> Suite:
    """Reads a suite, and checks all that can be checked before a model is loaded, of all of its tasks.

    Verifiers, scorers, judges and strategies must exist and take their options; the models that they name must be
    there; and the first row of the prompts must have the columns that a verifier or a section reads.

    Args:
        source: as in ``Suite.read``.
        awaited: folders that other stages will write: what is read from there is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a mistake; the message names the task.

    Example:
        >>> check_suite({"name": "small", "tasks": [{"name": "sums", "prompts": "sums:prompts?rows=8"}]}).name
        'small'
    """
    suite = Suite.read(source)
    for task in suite.tasks:
        for check in _checks_of(task) if isinstance(task, Task) else [task.check_rows]:
            try:
                check()
            except (ValueError, OSError, ImportError, TypeError) as error:
                if not any(place in str(error) for place in awaited):
                    raise ValueError(f"task {task.name!r}: {error}") from error
    return suite


def _checks_of(task: Task) -> Iterator[Callable[[], object]]:
    judge = None if task.win_rate is None else task.wins.judge
    yield partial(check_scorer, task.verifier)
    if task.scorer is not None:
        yield partial(check_scorer, task.scorer, "scorer")
    if isinstance(judge, Mapping):
        yield partial(_check_object, judge, "judge")
    # Models last: one that is awaited hides no other mistake.
    yield partial(StrategyOption, task.strategy)
    yield partial(_check_first_row, task)
    yield partial(_check_models, task.verifier, "verifier")
    yield partial(_check_models, task.scorer, "scorer")
    yield partial(_check_judge, judge)


def check_scorer(spec: str | Mapping[str, Any], what: str = "verifier") -> None:
    """Checks a reward's specification without loading the models that it names.

    Args:
        spec: a dotted path, or ``class_path`` and ``init_args``.
        what: what the messages call it.

    Raises:
        ValueError: it cannot be imported, or its arguments do not fit.

    Example:
        >>> check_scorer({"class_path": "rlhf_lightning.rewards.RewardModelReward", "init_args": {"folder": "x"}})
        Traceback (most recent call last):
        ValueError: verifier rlhf_lightning.rewards.RewardModelReward: missing a required argument: 'model'
    """
    if isinstance(spec, str):
        load_verifier(spec)
        return
    _check_object(spec, what)


def _check_object(spec: Mapping[str, Any], what: str) -> None:
    path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    if not isinstance(path, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"{what} is {dict(spec)!r}; write a dotted path, or class_path and init_args")
    found = load_attribute(path)
    try:
        if inspect.isclass(found):
            inspect.signature(found).bind(**arguments)
        else:
            inspect.signature(found).bind_partial(**arguments)
    except TypeError as error:
        raise ValueError(f"{what} {path}: {error}") from error


def _check_models(spec: Any, what: str) -> None:
    """Looks for the models that the options of a reward or judge name."""
    if not isinstance(spec, Mapping):
        return
    found, arguments = load_attribute(spec["class_path"]), spec.get("init_args") or {}
    key = _WITH_MODEL.get(found.__name__) if inspect.isclass(found) and found.__module__.startswith(_PACKAGE) else None
    if key is not None and isinstance(arguments.get(key), str):
        _check_model(f"{what} {found.__name__}", arguments[key])
    _check_judge(arguments.get("judge"))


def _check_judge(spec: Any) -> None:
    """Looks for the model of a judge."""
    if isinstance(spec, str):
        _check_model("judge", spec)
    else:
        _check_models(spec, "judge")


def _check_model(what: str, place: str) -> None:
    try:
        load_tokenizer(place)
    except (ValueError, OSError) as error:
        raise ValueError(f"{what}: {error}") from error


def _check_first_row(task: Task) -> None:
    """Opens the prompts of a task, and compares the columns of the first with what is read of them."""
    source = open_source(task.prompts, columns=task.columns or None)
    first = next(iter(source), None)
    if first is None:
        raise ValueError(f"it has no prompts: {task.prompts!r} is empty")
    row_id, columns = first
    try:
        fields = prompt_only(columns).fields
    except ValueError as error:
        raise ValueError(f"{row_id}: {error}") from error
    check_columns(task, None if isinstance(task.verifier, Mapping) else load_attribute(task.verifier), fields)


def check_columns(task: Task, verifier: Any, row: Mapping[str, Any]) -> None:
    """Refuses a section, or a verifier that must be given a column, that the prompts lack.

    Args:
        task: the task.
        verifier: a function that verifies its answers; ``None`` or a class: only the section is looked at.
        row: the columns of a prompt, with ``prompt``.

    Raises:
        ValueError: naming the task and the column.
    """
    have = ", ".join(sorted(set(row) - {"prompt"})) or "none"
    if task.section is not None and task.section not in row:
        raise ValueError(f"the section of task {task.name!r} is the column {task.section!r}: its prompts have {have}")
    if verifier is None or inspect.isclass(verifier):
        return
    try:
        parameters = inspect.signature(verifier).parameters.values()
    except (TypeError, ValueError):  # nothing is known of it
        return
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for name in required[2:] if required[:2] == ["prompts", "completions"] else ():
        if name not in row:
            raise ValueError(f"the verifier of task {task.name!r} reads the column {name!r}: its prompts have {have}")
