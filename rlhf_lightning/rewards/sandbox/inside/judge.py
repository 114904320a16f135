"""The judge's side of a test: runs the test outside the program's process, and calls the program from there.

Only names and arguments are sent to the program. Its return values are compared here, as plain data. Any other object
of the program is represented by a proxy, which equals no plain value, whatever the program claims.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from typing import Any, Final

from .frames import ProtocolError, receive, send
from .peer import GoneError, Peer

# Predicates that would let the program decide about its own value: allowed on plain values only.
_PREDICATES: Final = frozenset(
    name for kind in (str, bytes, set, int, float) for name in dir(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
) | {"equals"}  # fmt: skip
_SPECIAL: Final = ("__name__", "__qualname__", "__doc__")
_ALIASES: Final = {"np": "numpy", "pd": "pandas", "numpy": "numpy", "pandas": "pandas", "torch": "torch"}
_BUILTINS: Final = frozenset(dir(builtins))


class Remote:
    """Proxy for an object of the program."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: JudgePeer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the object."""
        return self._peer.call("call", arguments, named, target={"returned": self._number})

    def __getattr__(self, name: str) -> Any:
        # Libraries look for protocols under such names, and would trust the result (memory addresses, for instance).
        if name.startswith("__") and name not in _SPECIAL:
            raise AttributeError(name)
        if name in _PREDICATES:
            raise TypeError(f"an object of the program's is not asked for {name}: compare plain values")
        return self._peer.operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.operate("setattr", self, name, value)

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        # Expected values are never sent to the program: an object does not equal a plain value.
        return bool(self._peer.operate("eq", self, other)) if isinstance(other, Remote) else NotImplemented

    def __contains__(self, item: Any) -> bool:
        return any(item is found or item == found for found in self)

    def __iter__(self) -> Iterator[Any]:
        values = self._peer.operate("iter", self)
        while True:
            try:
                yield self._peer.operate("next", values)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._peer.operate("next", self)

    def __enter__(self) -> Any:
        return self._peer.operate("enter", self)

    def __exit__(self, *problem: object) -> None:
        self._peer.operate("exit", self)

    def __instancecheck__(self, value: Any) -> bool:
        return bool(self._peer.operate("isinstance", value, self))

    def __subclasscheck__(self, kind: Any) -> bool:
        return bool(self._peer.operate("issubclass", kind, self))

    def __getitem__(self, place: Any) -> Any:
        return self._peer.operate("getitem", self, place)

    def __setitem__(self, place: Any, value: Any) -> None:
        self._peer.operate("setitem", self, place, value)

    def __delitem__(self, place: Any) -> None:
        self._peer.operate("delitem", self, place)

    def __round__(self, digits: int | None = None) -> Any:
        return self._peer.operate("round", self, digits)


def _unary(name: str, kind: type | None) -> Callable[[Remote], Any]:
    def method(self: Remote) -> Any:
        found = self._peer.operate(name, self)
        if kind is not None and type(found) is not kind:
            raise TypeError(f"{name} of the program's object is a {type(found).__name__}")
        return found

    return method


def _binary(name: str, *, reflected: bool) -> Callable[[Remote, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        if not isinstance(other, Remote):  # it may be an expected value
            return NotImplemented
        return self._peer.operate(name, other, self) if reflected else self._peer.operate(name, self, other)

    return method


for _name, _kind in (
    ("len", int),
    ("bool", bool),
    ("str", str),
    ("repr", str),
    ("int", int),
    ("float", float),
    ("hash", int),
):
    setattr(Remote, f"__{_name}__", _unary(_name, _kind))
for _name in ("neg", "pos", "invert", "abs", "reversed"):
    setattr(Remote, f"__{_name}__", _unary(_name, None))
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "lshift",
    "rshift",
):
    setattr(Remote, f"__{_name.rstrip('_')}__", _binary(_name, reflected=False))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _binary(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _binary(_name, reflected=False))


class JudgePeer(Peer):
    """The judge's end of the channel to a program."""

    def __init__(self, channel: int) -> None:
        super().__init__(channel)
        self._proxies: dict[int, Remote] = {}
        self._after: list[Any] | None = None

    def call(self, what: str, arguments: Sequence[Any], named: Mapping[str, Any], **parts: Any) -> Any:
        """Has the program do something, and repeats its changes of lists, sets and dictionaries here."""
        written = [self.encoded(item) for item in arguments]
        self._after = None
        found = self.ask(what, arguments=written, named=self.encoded(dict(named)), **parts)
        after, self._after = self._after, None
        if after is not None and len(after) == len(arguments):
            for before, now, data in zip(arguments, after, written, strict=True):
                if data != now:
                    _change(before, self.decoded(now))
        return found

    def operate(self, operation: str, *arguments: Any) -> Any:
        """Has the program carry out an operation."""
        return self.call("operation", arguments, {}, operation=operation)

    def names(self, names: Sequence[str]) -> dict[str, Any]:
        """Looks up the program's objects of these names, as far as they exist."""
        found = self.ask("names", names=[*names])
        if not isinstance(found, dict) or not set(found) <= set(names):
            self.is_gone = True
            raise GoneError("no names")
        return {name: self._or_exception(value) for name, value in found.items()}

    def _or_exception(self, value: Any) -> Any:
        """Converts a proxy of an exception class to a class that can be caught; returns anything else unchanged."""
        names = self.operate("lineage", value) if isinstance(value, Remote) else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return self.exception_class(names)
        return value

    def replied(self, frame: Mapping[str, Any]) -> None:
        """Keeps the arguments as the program has changed them."""
        after = frame.get("arguments")
        self._after = after if isinstance(after, list) else None

    def done(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Calls a function that the test has passed; the program can reach nothing else of the test."""
        function = self.decoded({"returned": frame.get("target")})
        arguments = [self.decoded(item) for item in frame.get("arguments", ())]
        return {"value": self.encoded(function(*arguments, **dict(self.decoded(frame.get("named")))))}

    def proxy(self, number: int) -> Remote:
        """One proxy for each object, so that ``is`` works."""
        return self._proxies.setdefault(number, Remote(self, number))

    def may_be_named(self, value: Any) -> bool:
        """Only functions, which may be called; attributes of objects must not be read."""
        return callable(value)

    def number_of(self, value: Any) -> int | None:
        """The number of an object of the program."""
        return object.__getattribute__(value, "_number") if type(value) is Remote else None


def _change(value: Any, now: Any) -> None:
    """Copies the program's changes to a container."""
    if type(value) is not type(now):
        return
    if isinstance(value, MutableSequence):
        value[:] = now
    elif isinstance(value, MutableMapping | MutableSet):
        value.clear()
        value |= now


def judge(tests: Sequence[Any], program: str, channel: int, tell: Callable[[int, bool], None]) -> None:
    """Runs tests against a program.

    Args:
        tests: code that raises where the program is wrong, or ``call``, ``args``, ``kwargs``, ``output``.
        program: its source; only the imports are read.
        channel: leads to the program.
        tell: called with the number of each test and whether it passed.
    """
    peer = JudgePeer(channel)
    imports = _imports(program)
    for number, test in enumerate(tests):
        try:
            if isinstance(test, str):
                _run(test, peer, program, imports)
            else:
                _compare(test, peer)
            passed = True
        except BaseException:
            passed = False
        # A test that continues without the program has not been passed by it.
        tell(number, passed and not peer.is_gone)


def _compare(test: Mapping[str, Any], peer: JudgePeer) -> None:
    name, _, method = str(test["call"]).partition(".")
    function = peer.names([name])[name]
    if method:
        function = getattr(function() if name[:1].isupper() else function, method)
    returned = function(*test.get("args", ()), **test.get("kwargs", {}))
    if _as_lists(returned) != _as_lists(test["output"]):
        raise AssertionError


def _as_lists(value: Any) -> Any:
    """Replaces tuples by lists, which tests in JSON cannot distinguish."""
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_lists(item) for key, item in value.items()}
    return value


def _run(test: str, peer: JudgePeer, program: str, imports: Mapping[str, ast.stmt]) -> None:
    tree = ast.parse(test)
    wanted = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    libraries = _libraries(tree)
    names: dict[str, Any] = {"__name__": "test"}
    # The real library, whatever the program has defined under its name.
    for statement in ({name: imports[name] for name in imports.keys() & wanted} | libraries).values():
        with contextlib.suppress(Exception):
            exec(compile(ast.Module([statement], []), "import", "exec"), names)
    asked = sorted(wanted - names.keys() - libraries.keys())
    plain = [name for name in asked if name not in _BUILTINS]
    # A built-in name means the program's function only if the test uses no other: `assert sum(10, 15) == 6`.
    names |= peer.names(plain if plain or len(asked) != 1 else asked)
    exec(compile(tree, "test", "exec"), names)


def _libraries(tree: ast.AST) -> dict[str, ast.stmt]:
    """Imports of libraries that a test uses without importing them: ``math.isclose``, ``np.allclose``."""
    used = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    found: dict[str, ast.stmt] = {}
    for name in used:
        if name in sys.stdlib_module_names or name in _ALIASES:
            alias = ast.alias(_ALIASES.get(name, name), name)
            found[name] = ast.fix_missing_locations(ast.Import([alias]))
    return found


def _imports(program: str) -> dict[str, ast.stmt]:
    """The program's imports by the names that they bind: ``import a``, ``import a as b``, ``from a import b``."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                one = ast.Import([alias])
                found[alias.asname or alias.name.partition(".")[0]] = ast.copy_location(one, statement)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if alias.asname in (None, alias.name):  # under another name it is the program's
                    one_name = ast.ImportFrom(statement.module, [alias], 0)
                    found[alias.name] = ast.copy_location(one_name, statement)
    return found


def serve(control: int) -> None:
    """Forks a judge for every two descriptors received: one for tests and verdicts, one to the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped automatically
    connection = socket.socket(fileno=control)
    while True:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        if len(descriptors) != 2:
            return
        if os.fork() == 0:
            try:
                connection.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer_job(*descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _answer_job(verdicts: int, channel: int) -> None:
    try:
        job = receive(verdicts)
        signal.alarm(job["seconds"])
        judge(
            job["tests"], job["program"], channel, lambda test, passed: send(verdicts, {"test": test, "passed": passed})
        )
    except (OSError, EOFError, ProtocolError):
        return
