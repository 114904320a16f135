"""Builds the dataclasses of a pipeline from what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ..utils.messages import UsageError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], written: Any, where: str) -> T:
    """Makes a dataclass of a mapping.

    Args:
        cls: the dataclass.
        written: its options by name.
        where: begins the messages of errors.

    Raises:
        UsageError: naming an unknown or missing key.
    """
    if not isinstance(written, Mapping):
        raise UsageError(f"{where} is {written!r}: write a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in written:
        if key not in fields:
            raise UsageError(f"{where} has no key {key!r}{did_you_mean(str(key), fields)}")
    # Required keys, and lists and mappings by their kind; the other types are checked where they are used.
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and written.get(key) is None:
            raise UsageError(f"{where} needs {key!r}")
        if isinstance(f.default_factory, type) and key in written and not isinstance(written[key], f.default_factory):
            raise UsageError(f"{where}: {key} is {written[key]!r}; it must be a {f.default_factory.__name__}")
    return cls(**written)


def whole(name: str, value: Any, least: int) -> int:
    """Checks a whole number.

    Raises:
        UsageError: it is not such a number, or smaller than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value
