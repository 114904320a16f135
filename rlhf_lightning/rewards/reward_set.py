"""Runs several reward functions on a batch; a failing function loses only the samples that it fails on."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.imports import load_attribute
from ._called_reward import BadValueError, CalledReward, RewardFunction, StepReward, inner_function, parts_of
from ._time_limit import CallTimeoutError, call_with_limit

_RESERVED: Final = ("prompts", "completions")

log = logging.getLogger(__name__)


class RewardScores(NamedTuple):
    """Scores of a batch by several functions.

    Attributes:
        values: (num_samples, num_functions), NaN where a function could not score a sample.
        names: of the functions and parts, in the order of the columns.
        failures: by function, number of samples on which it raised, timed out or returned an invalid value; ``None`` is
            not a failure.
        errors: by failed function, its first message.
        steps: by step reward, one list of rewards per sample, empty for unscored samples.
    """

    values: npt.NDArray[np.float64]
    names: tuple[str, ...]
    failures: dict[str, int]
    errors: dict[str, str]
    steps: dict[str, list[list[float]]]


def resolve_reward(spec: str | RewardFunction) -> RewardFunction:
    """Loads a reward function by the dotted path of a function or of a class without required arguments.

    Args:
        spec: a function, or ``package.module.name``.

    Returns:
        The function; for a class, an instance of it.

    Raises:
        ValueError: for a path that cannot be imported, or to an object that is not callable.

    Example:
        >>> resolve_reward("rlhf_lightning.rewards.FormatReward")([""], ["<think>1</think>2"])
        [1.0]
    """
    found = load_attribute(spec) if isinstance(spec, str) else spec
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(f"reward {spec!r} needs arguments: give class_path and init_args ({error})") from error
    if not callable(found):
        raise ValueError(f"reward {spec!r} is a {type(found).__name__}: give a function or the dotted path of one")
    function: RewardFunction = found
    return function


def _name(function: RewardFunction) -> str:
    inner = getattr(function, "func", function)  # functools.partial
    return getattr(inner, "__name__", None) or type(inner).__name__


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(result)


class RewardSet:
    """Calls several weighted reward functions on a batch.

    A function is called once for the batch, by keyword, with the arguments that it names among ``prompts``,
    ``completions`` and the rows' columns, or all of them if it takes ``**columns``. If that raises or exceeds
    ``timeout``, it is called again for each sample alone with ``sample_timeout``, and only the samples on which it
    fails again are lost: NaN in the result, counted, and logged once per function and kind of error. A function may
    return exceptions as values of the samples on which it failed. One with a true attribute ``bounds_its_time`` has no
    time limit here: it scores late answers itself.

    A ``StepReward`` counts as the mean over the steps of each completion. A function with ``part_names``, such as
    ``ConstitutionReward``, has further columns ``<name>/<part>`` after its own, of weight 0.

    Args:
        rewards: functions, dotted paths of functions or classes, or ``StepReward`` of these.
        weights: one per function, finite; ``None`` for 1 each. They are not applied here.
        names: one per function, all different, for metrics; ``None`` takes the functions' own.
        timeout: seconds that a call for the batch may take, above 0; ``None`` for no limit.
        sample_timeout: the same for a call for one sample.
        on_bad_value: for the wrong number of values, a string, NaN or an infinity: ``error`` raises, ``skip`` counts a
            failure on those samples.

    Raises:
        ValueError: for no functions, or lists that do not match.

    Example:
        >>> def length(completions): return [float(len(text)) for text in completions]
        >>> def picky(completions): return [1.0 / (len(text) - 1) for text in completions]
        >>> scores = RewardSet([length, picky], weights=[1.0, 0.5])(["p", "p"], ["a", "abc"])
        >>> scores.values.tolist(), scores.failures
        ([[1.0, nan], [3.0, 0.5]], {'length': 0, 'picky': 1})
    """

    def __init__(
        self,
        rewards: Sequence[str | RewardFunction | StepReward],
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        timeout: float | None = 60.0,
        sample_timeout: float | None = 10.0,
        on_bad_value: Literal["error", "skip"] = "error",
    ) -> None:
        if isinstance(rewards, str) or not rewards:
            raise ValueError(f"rewards={rewards!r}: give a list of at least one function or dotted path")
        for name, given in (("weights", weights), ("names", names)):
            if given is not None and len(given) != len(rewards):
                raise ValueError(f"{name} has {len(given)} entries for {len(rewards)} rewards: give one each")
        for name, seconds in (("timeout", timeout), ("sample_timeout", sample_timeout)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name}={seconds} is not a finite number above 0: null turns it off")
        if on_bad_value not in ("error", "skip"):
            raise ValueError(f"unknown on_bad_value {on_bad_value!r}: use one of error, skip")

        # Names appear in logs, so that each has to be unique.
        functions = [spec if isinstance(spec, StepReward) else resolve_reward(spec) for spec in rewards]
        own_names = _unique(_name(inner_function(function)) for function in functions)
        self.function_names = own_names if names is None else tuple(names)
        if len(set(self.function_names)) != len(self.function_names):
            raise ValueError(f"names={list(self.function_names)} has one name twice: give each function its own")
        weights_K = np.ones(len(functions)) if weights is None else np.asarray(weights, dtype=np.float64)
        if not np.isfinite(weights_K).all():
            raise ValueError(f"weights={weights_K.tolist()}: all must be finite numbers")
        self.timeout = timeout
        self.sample_timeout = sample_timeout
        self.on_bad_value = on_bad_value
        named = zip(functions, self.function_names, strict=True)
        self._rewards = [CalledReward(function, name) for function, name in named]

        # Parts follow the score that they are parts of, with weight 0.
        self.names = tuple(n for r in self._rewards for n in (r.name, *(f"{r.name}/{part}" for part in r.part_names)))
        weighted = zip(self._rewards, weights_K.tolist(), strict=True)
        self.weights = np.array([w for r, weight in weighted for w in (weight, *(0.0 for _ in r.part_names))])
        self._reported: set[tuple[str, str]] = set()

    @property
    def functions(self) -> list[RewardFunction]:
        """The functions, in order."""
        return [reward.function for reward in self._rewards]

    @property
    def step_separators(self) -> list[str | None]:
        """The step separator of each function; ``None`` for a function of whole completions."""
        return [None if reward.of_steps is None else reward.of_steps.separator for reward in self._rewards]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> RewardScores:
        """Scores every completion with every function.

        Args:
            prompts: one per completion.
            completions: the texts to score.
            columns: the rows' other columns, each with one value per completion.

        Returns:
            The scores and the failures.

        Raises:
            ValueError: for a missing column, lengths that do not match, or, with ``on_bad_value="error"``, an invalid
                reward.
        """
        columns = {key: given for key, given in (columns or {}).items() if key not in _RESERVED}
        for key, given in {"prompts": prompts, **columns}.items():
            if len(given) != len(completions):
                raise ValueError(f"{key!r} has {len(given)} values for {len(completions)} completions: give one each")
        arguments: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": completions, **columns}

        # Check before the first call: a missing column should be reported before a slow judge has run.
        for reward in self._rewards:
            reward.check_columns(columns)

        values = np.full((len(completions), len(self.names)), np.nan)
        failures: dict[str, int] = {}
        errors: dict[str, str] = {}
        steps: dict[str, list[list[float]]] = {}
        for reward in self._rewards:
            found, parts, problems = self._score(reward, arguments, len(completions))
            column = self.names.index(reward.name)
            values[:, column] = [sum(numbers) / len(numbers) if numbers else math.nan for numbers in found]
            for place, part in enumerate(reward.part_names, start=column + 1):
                values[:, place] = [math.nan if given.get(part) is None else given[part] for given in parts]
            if reward.of_steps is not None:
                steps[reward.name] = found
            failures[reward.name] = len(problems)
            if problems:
                errors[reward.name] = self._report(reward.name, problems, len(completions))
        return RewardScores(values, self.names, failures, errors, steps)

    def _score(
        self, reward: CalledReward, arguments: Mapping[str, Sequence[Any]], num_samples: int
    ) -> tuple[list[list[float]], list[Mapping[str, Any]], list[Exception]]:
        """One list of numbers per sample, their parts, and the exceptions."""
        if num_samples == 0:
            return [], [], []
        problems: list[Exception] = []
        try:
            raw = self._call(reward, arguments, range(num_samples), self.timeout)
        except Exception as error:
            # Call again sample by sample, so that only the failing samples are lost.
            self._raise_if_bad(error)
            if num_samples == 1 and not isinstance(error, CallTimeoutError):
                return [[]], [{}], [error]
            raw = []
            for sample in range(num_samples):
                try:
                    raw += self._call(reward, arguments, [sample], self.sample_timeout)
                except Exception as sample_error:
                    self._raise_if_bad(sample_error)
                    problems.append(sample_error)
                    raw.append(None)

        # Values are checked one by one: an invalid one loses its own sample, or ends the run.
        found: list[list[float]] = []
        for sample, value in enumerate(raw):
            try:
                found.append(reward.numbers(value, sample, arguments["completions"][sample]))
            except Exception as error:
                self._raise_if_bad(error)
                problems.append(error)
                found.append([])
        return found, [parts_of(value) for value in raw], problems

    def _call(
        self,
        reward: CalledReward,
        arguments: Mapping[str, Sequence[Any]],
        samples: Sequence[int],
        seconds: float | None,
    ) -> list[Any]:
        def call() -> list[Any]:
            try:
                return reward.call(arguments, samples)
            except SystemExit as error:
                raise RuntimeError(f"called sys.exit({error.code!r})") from error

        # Rewards that run programs limit the time of each sample themselves.
        bounds_its_time = getattr(reward.function, "bounds_its_time", False)
        values: list[Any] = call_with_limit(call, None if bounds_its_time else seconds)
        return values

    def _raise_if_bad(self, error: Exception) -> None:
        if isinstance(error, BadValueError) and self.on_bad_value == "error":
            raise error

    def _report(self, name: str, problems: Sequence[Exception], num_samples: int) -> str:
        first = problems[0]
        kind = type(first).__name__
        message = " ".join(f"{kind}: {first}".split())
        # Once per kind of failure: a reward may fail in every step.
        if (name, kind) not in self._reported:
            self._reported.add((name, kind))
            log.warning("reward %r failed on %d of %d samples: %s", name, len(problems), num_samples, message)
        return message
