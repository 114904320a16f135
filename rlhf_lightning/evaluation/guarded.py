"""Verifiers and scorers that may fail: a sample on which they raise has no verdict, and failing on all is an error."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..rewards.exact_answer import check_verdicts
from ..utils.messages import one_line

# Failures in succession after which a reward is broken; one call may have a single sample.
_MOST_LOST = 8


class Guarded:
    """Calls a verifier or another reward function; samples on which it raises have no verdict.

    Where a call raises, each of its samples is tried alone. A function that fails on all samples of calls in
    succession, at least eight, is broken.

    Args:
        function: called as ``fn(prompts, completions, **columns)``.
        what: begins the messages, such as ``the verifier of task 'sums'``.
        model: name of the model whose answers it gets.

    Raises:
        ValueError: when called: it is broken, or does not return one finite number or ``None`` for each sample; NaN
            counts as ``None``.

    Example:
        >>> def verifier(prompts, completions):
        ...     return [1 / len(text) for text in completions]
        >>> guarded = Guarded(verifier, "the verifier of task 'short'", "sft")
        >>> guarded(["a", "b"], ["xx", ""])
        [0.5, None]
        >>> guarded.failed, guarded.reason
        (1, 'ZeroDivisionError: division by zero')
    """

    def __init__(self, function: Callable[..., Any], what: str, model: str) -> None:
        self.function, self.what, self.model = function, what, model
        self.asked = self.failed = self._lost = 0
        self.reason = ""
        # Only columns that the function takes are passed.
        with suppress(TypeError, ValueError):  # else nothing is known of it
            self.__signature__ = inspect.signature(function)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Returns one verdict for each sample."""
        given = self._tried(prompts, completions, columns)
        failures = [value for value in given if isinstance(value, Exception)]
        self.asked, self.failed = self.asked + len(completions), self.failed + len(failures)
        self._lost = self._lost + len(failures) if len(failures) == len(given) else 0
        if failures:
            self.reason = one_line(f"{type(failures[0]).__name__}: {failures[0]}")
        if self._lost >= _MOST_LOST:
            raise self._broken(self._lost)
        verdicts = [None if isinstance(value, Exception) else value for value in given]
        try:
            return check_verdicts(verdicts, len(completions))
        except ValueError as error:
            raise ValueError(f"{self.what}, on answers of {self.model!r}: {error}") from error

    def _tried(self, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, Any]) -> list[Any]:
        try:
            return list(self.function(prompts, completions, **columns))
        except Exception as error:
            if len(completions) < 2:
                return [error]
        alone = range(len(completions))
        parts = [{name: values[n : n + 1] for name, values in columns.items()} for n in alone]
        return [v for n in alone for v in self._tried(prompts[n : n + 1], completions[n : n + 1], parts[n])]

    def _broken(self, failed: int) -> ValueError:
        return ValueError(
            f"{self.what} failed on all of {failed} answers of {self.model!r}: {self.reason}; correct it, or the "
            "columns of its rows"
        )

    def close(self) -> None:
        """Tells how many samples have no verdict because the function failed.

        Raises:
            ValueError: all of them.
        """
        if self.failed and self.failed == self.asked:
            raise self._broken(self.failed)
        if self.failed:
            warnings.warn(
                f"{self.what} failed on {self.failed} of {self.asked} answers of {self.model!r}, which have none: "
                f"{self.reason}",
                stacklevel=2,
            )
