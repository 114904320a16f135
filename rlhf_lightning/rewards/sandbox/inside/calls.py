"""The program's side of a test: executes the judge's requests on the program's functions and objects."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from .frames import ProtocolError, receive
from .peer import Peer, lineage

_OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    **{name: getattr(operator, name) for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift",
        "neg", "pos", "invert", "eq", "lt", "le", "gt", "ge", "getitem", "setitem", "delitem",
    )},
    **{name: getattr(builtins, name) for name in (
        "len", "iter", "next", "bool", "str", "repr", "int", "float", "abs", "round", "hash", "isinstance",
        "issubclass", "reversed", "getattr", "setattr", "dir",
    )},
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "lineage": lambda value: lineage(value) if isinstance(value, type) and issubclass(value, Exception) else None,
}  # fmt: skip


class _Callback:
    """Calls a function of the test."""

    def __init__(self, peer: ProgramPeer, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", target=self._number, **self._peer.arguments(arguments, named))


class ProgramPeer(Peer):
    """Answers for a program that has run to its end.

    Args:
        names: the program's names.
        channel: leads to the judge.
    """

    def __init__(self, channel: int, names: Mapping[str, Any]) -> None:
        super().__init__(channel)
        self._names = names

    def done(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Looks up names, calls functions, carries out operations; returns the reply."""
        if frame["do"] == "names":
            found = {name: self._names[name] for name in frame["names"] if name in self._names}
            return {"value": {"dict": [[name, self.encoded(value)] for name, value in found.items()]}}
        before = frame["arguments"]
        arguments, named = [self.decoded(item) for item in before], dict(self.decoded(frame["named"]))
        function = _OPERATIONS[frame["operation"]] if frame["do"] == "operation" else self.decoded(frame["target"])
        reply = {"value": self.encoded(function(*arguments, **named))}
        after = [self.encoded(item) for item in arguments]
        return reply if after == before else {**reply, "arguments": after}

    def arguments(self, arguments: Any, named: Any) -> dict[str, Any]:
        """Encodes arguments."""
        return {"arguments": [self.encoded(item) for item in arguments], "named": self.encoded(named)}

    def proxy(self, number: int) -> Any:
        """Returns a function that calls the test's."""
        return _Callback(self, number)

    def may_be_named(self, value: Any) -> bool:
        """True: the judge may refer to every object of the program."""
        return True

    def number_of(self, value: Any) -> int | None:
        """The number of a function of the test."""
        return value._number if type(value) is _Callback else None


def serve(channel: int, names: Mapping[str, Any]) -> None:
    """Answers until the judge closes the channel."""
    peer = ProgramPeer(channel, names)
    try:
        while True:
            peer.answer(receive(channel))
    except (EOFError, OSError, ProtocolError):
        return
