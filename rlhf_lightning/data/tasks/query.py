"""Parses and checks the ``key=value`` part of a task string; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qsl


class Query:
    """Holds the keys of one task string; each is read once, by type, and :meth:`done` refuses unread ones.

    Args:
        source: the whole task string, for messages.
        keys: its part after the ``?``.

    Raises:
        ValueError: for a part that is not ``key=value``, and for a key given twice.

    Example:
        >>> query = Query("sums:prompts?rows=8", "rows=8")
        >>> query.integer("rows", 1000, low=1), query.integer("seed", 0, low=0)
        (8, 0)
        >>> query.done()
    """

    def __init__(self, source: str, keys: str) -> None:
        self.source = source
        self._asked: list[str] = []
        try:
            # In a form "+" means a space; in a folder's name it means "+".
            pairs = parse_qsl(keys.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(keys))
        except ValueError as error:
            raise ValueError(f"cannot read {keys!r} in {source!r}: write key=value&key=value") from error
        self._values = dict(pairs)
        if len(self._values) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise ValueError(f"key {twice!r} is given twice in {source!r}: give it once")

    def integer(self, key: str, default: int, *, low: int, high: int | None = None) -> int:
        """Reads a whole number in ``low..high``."""
        value = self.text(key, str(default))
        allowed = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
        digits = value.isascii() and value.isdigit()
        if not digits or int(value) < low or (high is not None and int(value) > high):
            raise self.refusal(key, value, allowed)
        return int(value)

    def fraction(self, key: str, default: float) -> float:
        """Reads a number in ``0..1``."""
        value = self.text(key, str(default))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0.0 <= number <= 1.0:
            raise self.refusal(key, value, "a number from 0 to 1")
        return number

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """Reads one of a few words."""
        value = self.text(key, default)
        if value not in allowed:
            raise self.refusal(key, value, " or ".join(allowed))
        return value

    def text(self, key: str, default: str) -> str:
        """Reads any text."""
        self._asked.append(key)
        return self._values.get(key, default)

    def refusal(self, key: str, value: object, allowed: str) -> ValueError:
        """Builds the error for a value that is not allowed."""
        return ValueError(f"{key}={value} in {self.source!r}: {key} is {allowed}")

    def done(self) -> None:
        """Raises ``ValueError`` if a key was given that has not been read."""
        for key in self._values:
            if key not in self._asked:
                raise ValueError(f"unknown key {key!r} in {self.source!r}: allowed are {', '.join(self._asked)}")
