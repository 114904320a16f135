"""Calls between two processes over one channel, with each other's objects referred to by number."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .frames import ProtocolError, receive, send
from .values import OBJECT, RETURNED, decode, encode

_MAX_OBJECTS: Final = 100_000
_MAX_TEXT: Final = 1000


class GoneError(BaseException):
    """The other process is gone or violates the protocol; not caught by handlers of programs or tests."""


class Peer:
    """One end of the channel.

    A request is ``{"do": what, ...}``; its reply ``{"value": ...}`` or ``{"raised": [names of classes], "text": ...}``.
    While a side waits for a reply it answers the other's requests, so that a function may call back.
    """

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.is_gone = False
        self._objects: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._classes: dict[str, type[Exception]] = {}

    def ask(self, what: str, **parts: Any) -> Any:
        """Sends a request, and returns its result or raises its exception."""
        try:
            send(self.channel, {"do": what, **parts})
            while "do" in (frame := receive(self.channel)):
                self.answer(frame)
            if "raised" not in frame:
                self.replied(frame)
                return self.decoded(frame.get("value"))
            error = self._exception(frame)
        except (OSError, EOFError, ProtocolError, RecursionError) as failure:
            self.is_gone = True
            raise GoneError(str(failure)) from None
        raise error

    def answer(self, frame: Mapping[str, Any]) -> None:
        """Executes a request, and replies."""
        try:
            reply = self.done(frame)
        except GoneError:
            raise
        except BaseException as error:
            reply = {"raised": lineage(type(error)), "text": _text_of(error)}
        send(self.channel, reply)

    def done(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Executes a request; returns the reply."""
        raise NotImplementedError

    def replied(self, frame: Mapping[str, Any]) -> None:
        """Reads further parts of a reply; does nothing here."""

    def proxy(self, number: int) -> Any:
        """Returns the proxy for an object of the other process."""
        raise NotImplementedError

    def may_be_named(self, value: Any) -> bool:
        """Whether a reference to an object may be given to the other process."""
        raise NotImplementedError

    def number_of(self, value: Any) -> int | None:
        """The number of the other process's object, if ``value`` is its proxy."""
        raise NotImplementedError

    def encoded(self, value: Any) -> Any:
        """Encodes a value."""
        return encode(value, self._name)

    def decoded(self, data: Any) -> Any:
        """Decodes a value."""
        return decode(data, self._find)

    def _name(self, value: Any) -> dict[str, Any]:
        number = self.number_of(value)
        if number is not None:
            return {RETURNED: number}
        if not self.may_be_named(value):
            raise TypeError(f"a {type(value).__name__} cannot be given to a program: give plain values or a function")
        number = self._numbers.get(id(value))
        if number is None:
            if len(self._objects) >= _MAX_OBJECTS:
                raise MemoryError("too many objects")
            number = self._numbers[id(value)] = len(self._objects)
            self._objects[number] = value  # kept, so that its id stays its own
        return {OBJECT: number}

    def _find(self, tag: str, number: Any) -> Any:
        if type(number) is not int:
            raise ProtocolError(f"{number!r} is not the number of an object")
        if tag == OBJECT:
            return self.proxy(number)
        if number not in self._objects:
            raise ProtocolError(f"there is no object {number}")
        return self._objects[number]

    def _exception(self, frame: Mapping[str, Any]) -> Exception:
        """Rebuilds an exception of the other process; its class is found or created by name."""
        names = frame["raised"]
        if not isinstance(names, list) or not 0 < len(names) <= 32 or not all(isinstance(name, str) for name in names):
            raise ProtocolError("no names of classes")
        return self.exception_class(names)(str(frame.get("text", "")))

    def exception_class(self, names: Sequence[str]) -> type[Exception]:
        """Finds or creates an exception class by the names of its lineage, from itself to a built-in class."""
        found: type[Exception] = RuntimeError
        for name in reversed(names):
            own = getattr(builtins, name, None)
            if isinstance(own, type) and issubclass(own, Exception):
                found = own
            elif own is None and name.isidentifier():
                known = self._classes.get(name)
                found = self._classes[name] = known or type(name, (found,), {})
        return found


def lineage(kind: type) -> list[str]:
    """Names of an exception class and its ancestors, up to the first built-in one."""
    names = []
    for ancestor in kind.__mro__:
        names.append(str(ancestor.__name__)[:_MAX_TEXT])
        if ancestor.__module__ == "builtins":
            break
    return names[-32:]


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except BaseException:
        return ""
