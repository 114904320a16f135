"""Encodes values as JSON between a trusted process and an untrusted one.

Plain values (numbers, text, bytes, lists, tuples, sets, dictionaries, dates, arrays of numbers) are written out; any
other object is sent as a number that identifies it to its owner.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import math
import sys
from collections.abc import Callable
from typing import Any, Final

from .frames import ProtocolError

# Larger numbers are written in base 16, in time linear in their length.
_PLAIN_INTEGER: Final = 2**63
_CONTAINERS: Final[dict[str, type[Any]]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
# Objects that both sides know by name: `len` in a test never calls the program.
_NAMED: Final = (type, type(len))
_ARRAY_KINDS: Final = "biufcU"
_TEXT_FORMS: Final[dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]]] = {
    "int": (int, hex, lambda text: int(text, 16)),
    "float": (float, repr, float),
    "complex": (complex, repr, complex),
    "bytes": (bytes, lambda value: value.hex(), bytes.fromhex),
    "bytearray": (bytearray, lambda value: value.hex(), bytearray.fromhex),
    "fraction": (
        fractions.Fraction,
        lambda value: f"{value.numerator:x}/{value.denominator:x}",
        lambda text: fractions.Fraction(*(int(part, 16) for part in text.split("/"))),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}

OBJECT: Final = "object"  # owned by the sender
RETURNED: Final = "returned"  # owned by the receiver
BUILTIN: Final = "builtin"


def encode(value: Any, name: Callable[[Any], dict[str, Any]]) -> Any:
    """Encodes a value as JSON.

    Args:
        value: any value.
        name: encodes objects that are not plain values.
    """
    if value is None or value is True or value is False or type(value) is str:
        return value
    if type(value) is int and -_PLAIN_INTEGER < value < _PLAIN_INTEGER:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is list:
        return [encode(item, name) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, name), encode(item, name)] for key, item in dict.items(value)]}
    for tag, kind in _CONTAINERS.items():
        if type(value) is kind or (kind is tuple and isinstance(value, tuple)):
            return {tag: [encode(item, name) for item in kind.__iter__(value)]}
    for tag, (form, write, _) in _TEXT_FORMS.items():
        if type(value) is form:
            return {tag: write(value)}
    return _encode_rare(value, name)


def _encode_rare(value: Any, name: Callable[[Any], dict[str, Any]]) -> Any:
    if isinstance(value, datetime.timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, range):
        return {"range": [encode(part, name) for part in (value.start, value.stop, value.step)]}
    called = value.__name__ if type(value) in _NAMED else ""
    if called and vars(builtins).get(called) is value:
        return {BUILTIN: called}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in _ARRAY_KINDS:
        return encode(value.item(), name)
    if numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in _ARRAY_KINDS:
        return {"array": [value.dtype.str, list(value.shape), encode(value.ravel().tolist(), name)]}
    return name(value)


def decode(data: Any, find: Callable[[str, Any], Any]) -> Any:
    """Decodes a value from JSON.

    Args:
        data: the result of :func:`encode`, perhaps forged.
        find: looks up an object by its tag (``OBJECT``, ``RETURNED``) and number.

    Raises:
        ProtocolError: the data is not a valid value.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ProtocolError(f"a {type(data).__name__} does not encode a value")
    ((tag, content),) = data.items()
    try:
        return _decode_tagged(tag, content, find)
    except (ValueError, TypeError, ArithmeticError, AttributeError, ImportError, MemoryError, RecursionError) as error:
        raise ProtocolError(f"no {tag}: {error}") from None


def _decode_tagged(tag: str, content: Any, find: Callable[[str, Any], Any]) -> Any:
    if tag in (OBJECT, RETURNED):
        return find(tag, content)
    if tag == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if tag in _CONTAINERS and isinstance(content, list):
        return _CONTAINERS[tag](decode(item, find) for item in content)
    if tag in _TEXT_FORMS and isinstance(content, str):
        return _TEXT_FORMS[tag][2](content)
    if tag == "timedelta":
        days, seconds, microseconds = map(int, content)
        return datetime.timedelta(days, seconds, microseconds)
    if tag == "range":
        return range(*(decode(part, find) for part in content))
    if tag == BUILTIN and isinstance(content, str) and type(found := getattr(builtins, content)) in _NAMED:
        return found
    if tag == "array":
        import numpy as np

        kind, shape, flat = content
        if not isinstance(kind, str) or np.dtype(kind).kind not in _ARRAY_KINDS:
            raise ValueError(f"dtype {kind!r}")
        # Take the width of texts from the texts themselves: the claimed one may be forged.
        found = np.array(decode(flat, find), dtype=str if np.dtype(kind).kind == "U" else kind)
        return found.reshape([int(size) for size in shape])
    raise ProtocolError(f"{tag!r} does not encode a value")
