"""Checks the types of the options of tasks, which may come from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any

_WORDS: dict[Any, str] = {bool: "true or false", Mapping: "a mapping", str | None: "the name of a column, or null"}


def check_options(task: Any, types: Mapping[str, type | UnionType], names: Sequence[str] = ()) -> None:
    """Refuses options of other types.

    Args:
        task: the task, with a name.
        types: of its options by name.
        names: options that are mappings of texts to texts.

    Raises:
        ValueError: naming the task, the option, its value and what is allowed.

    Example:
        >>> from types import SimpleNamespace
        >>> check_options(SimpleNamespace(name="sums", votes="no"), {"votes": bool})
        Traceback (most recent call last):
        ValueError: votes of task 'sums' is 'no'; it must be true or false
    """
    for option, kind in types.items():
        value = getattr(task, option)
        if not isinstance(value, kind):
            raise ValueError(f"{option} of task {task.name!r} is {value!r}; it must be {_WORDS[kind]}")
    for option in names:
        value = getattr(task, option)
        texts = [*value, *value.values()] if isinstance(value, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{option} of task {task.name!r} is {value!r}; it must be a mapping of names, such as "
                "{prompt: question}"
            )
