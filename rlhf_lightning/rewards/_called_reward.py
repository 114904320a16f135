"""One reward function as it is called: its arguments, and the numbers in what it returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

RewardFunction = Callable[..., Sequence[Any]]

_RESERVED: Final = ("prompts", "completions")


class PartedScore(float):
    """A score with the values that it is made of, which are logged next to it and change no reward.

    The function that returns such scores names all parts in its attribute ``part_names``.

    Args:
        value: the score.
        parts: values by name, ``None`` where a part does not apply.

    Example:
        >>> score = PartedScore(0.25, {"short": 1.0, "polite": 0.0})
        >>> score + 1, score.parts["short"]
        (1.25, 1.0)
    """

    parts: Mapping[str, float | None]

    def __new__(cls, value: float, parts: Mapping[str, float | None]) -> PartedScore:
        """Makes the number and attaches its parts."""
        made = super().__new__(cls, value)
        made.parts = dict(parts)
        return made


@dataclass(frozen=True)
class StepReward:
    """A function that rewards every step of a completion instead of the completion as a whole.

    Args:
        function: returns, for each completion, a list with one number per step, or ``None``.
        separator: text between steps; empty steps are dropped.

    Example:
        >>> from rlhf_lightning.rewards import RewardSet
        >>> def lengths(completions): return [[len(step) for step in text.split(";")] for text in completions]
        >>> scores = RewardSet([StepReward(lengths, ";")])(["p", "p"], ["a;abc", "ab"])
        >>> scores.values.tolist(), scores.steps
        ([[2.0], [2.0]], {'lengths': [[1.0, 3.0], [2.0]]})
    """

    function: RewardFunction
    separator: str = "\n"

    def split(self, completion: str) -> list[str]:
        """The steps of a completion."""
        return [step for step in completion.split(self.separator) if step]


class BadValueError(ValueError):
    """A function returned an invalid reward."""


class CalledReward:
    """One function with its name and its parameters."""

    def __init__(self, given: RewardFunction | StepReward, name: str) -> None:
        self.of_steps = given if isinstance(given, StepReward) else None
        self.function = function = inner_function(given)
        self.name = name
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError as error:
            raise ValueError(f"reward {name!r} does not say what arguments it takes: wrap it in a function") from error
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.part_names = tuple(getattr(function, "part_names", ()))
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = {p.name for p in by_name}
        needed = [p.name for p in by_name if p.default is p.empty and p.name not in _RESERVED]
        self.required = (*needed, *getattr(function, "required_columns", ()))

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Checks that rows have the columns that the reward needs.

        Raises:
            ValueError: one is missing.
        """
        missing = [name for name in self.required if name not in columns]
        if missing:
            have = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"reward {self.name!r} needs the column {missing[0]!r}: the rows have {have}")

    def call(self, arguments: Mapping[str, Sequence[Any]], samples: Sequence[int]) -> list[Any]:
        """Calls the function on some of the samples; returns one value for each."""
        wanted = {key: values for key, values in arguments.items() if self.takes_all or key in self.accepted}
        returned = self.function(**{key: [values[n] for n in samples] for key, values in wanted.items()})
        try:
            values = list(returned)
        except TypeError:
            values = None
        if values is None or isinstance(returned, str | bytes | Mapping):
            one = "number" if self.of_steps is None else "list of numbers"
            raise BadValueError(
                f"reward {self.name!r} returned {_short(returned)}: return a list of one {one} or None per completion"
            )
        if len(values) != len(samples):
            raise BadValueError(
                f"reward {self.name!r} returned {len(values)} values for {len(samples)} completions: return one each"
            )
        return values

    def numbers(self, value: Any, sample: int, completion: str) -> list[float]:
        """Converts a returned value to one number, or one per step; empty for ``None``.

        Raises:
            Exception: the value itself if it is an exception: the function has failed on this sample.
            BadValueError: the value is not a valid reward.
        """
        if value is None:
            return []
        if isinstance(value, Exception):
            raise value
        if self.of_steps is None:
            number = _finite(value)
            if number is None:
                raise BadValueError(
                    f"reward {self.name!r} returned {_short(value)} for sample {sample}: "
                    "return a finite number, or None if unscorable"
                )
            return [number]

        # A tensor, an array or a list of one number per step.
        parts = value.tolist() if hasattr(value, "tolist") else value
        found = [_finite(part) for part in parts] if isinstance(parts, list | tuple) else None
        count = len(self.of_steps.split(completion))
        if found is None or None in found or len(found) != count:
            raise BadValueError(
                f"reward {self.name!r} returned {_short(value)} for the {count} steps of sample {sample}: "
                "return a list with one finite number per step, or None if unscorable"
            )
        return [number for number in found if number is not None]


def inner_function(given: RewardFunction | StepReward) -> RewardFunction:
    return given.function if isinstance(given, StepReward) else given


def _finite(value: Any) -> float | None:
    """Converts a value to a float; ``None`` if it is not a finite number."""
    # A tensor or array without dimensions.
    number = value.item() if not isinstance(value, Real) and getattr(value, "ndim", None) == 0 else value
    return float(number) if isinstance(number, Real) and math.isfinite(number) else None


def _short(value: Any) -> str:
    """A value and its type on one line."""
    return f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})"


def parts_of(value: Any) -> Mapping[str, float | None]:
    """Returns the parts of a returned value; none of one that is no ``PartedScore``."""
    return value.parts if isinstance(value, PartedScore) else {}
