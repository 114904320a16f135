"""Two processes that call each other's functions, over one channel, and know of each other's objects by number."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .frames import ProtocolError, receive, send
from .values import OBJECT, RETURNED, decode, encode

_MAX_OBJECTS: Final = 100_000
_MAX_TEXT: Final = 1000


class GoneError(BaseException):
    """The other process is gone or does not keep to the protocol; no handler of a program's or a test's takes it."""


class Peer:
    """One end of the channel.

    A request is ``{"do": what, ...}``; its reply ``{"value": ...}`` or ``{"raised": [names of classes], "text": ...}``.
    While one waits for a reply it answers the other's requests, so that a function may call back.
    """

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.is_gone = False
        self._objects: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._classes: dict[str, type[Exception]] = {}

    def ask(self, what: str, **parts: Any) -> Any:
        """Asks for something, and returns or raises what comes back."""
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
        """Does what a request asks for, and replies."""
        try:
            reply = self.done(frame)
        except GoneError:
            raise
        except BaseException as error:
            reply = {"raised": lineage(type(error)), "text": _text_of(error)}
        send(self.channel, reply)

    def done(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """What is replied to a request."""
        raise NotImplementedError

    def replied(self, frame: Mapping[str, Any]) -> None:
        """Takes note of a reply."""

    def stand_in(self, number: int) -> Any:
        """What stands for an object of the other process."""
        raise NotImplementedError

    def may_be_named(self, value: Any) -> bool:
        """Whether the other process may know of an object that it cannot have."""
        raise NotImplementedError

    def number_of(self, value: Any) -> int | None:
        """The number of an object of the other process, if this stands for one."""
        raise NotImplementedError

    def encoded(self, value: Any) -> Any:
        """A value as data."""
        return encode(value, self._name)

    def decoded(self, data: Any) -> Any:
        """Data as a value."""
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
            raise ProtocolError(f"{number!r} is no number of an object")
        if tag == OBJECT:
            return self.stand_in(number)
        if number not in self._objects:
            raise ProtocolError(f"there is no object {number}")
        return self._objects[number]

    def _exception(self, frame: Mapping[str, Any]) -> Exception:
        """An exception like the one that was raised over there; its class is found or made by its name."""
        names = frame["raised"]
        if not isinstance(names, list) or not 0 < len(names) <= 32 or not all(isinstance(name, str) for name in names):
            raise ProtocolError("no names of classes")
        return self.exception_class(names)(str(frame.get("text", "")))

    def exception_class(self, names: Sequence[str]) -> type[Exception]:
        """The class of exceptions with these names, from itself to the built-in one that it descends from."""
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
    """Names of a class of exceptions and of those that it descends from, up to the first that is built in."""
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
