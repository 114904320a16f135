"""Runs programs in a sandbox, and observes their results from outside."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from .inside.frames import ProtocolError, receive, send
from .isolation import IsolationChoice, Limits, plan
from .process import Sandboxed, wait_for

_STARTUP_SECONDS: Final = 20.0
_BETWEEN_LOOKS: Final = 0.1
_MOMENT: Final = 0.002
_MAX_PRINTED: Final = 8 * 2**20
_A_DAY: Final = 86_400


class Outcome(NamedTuple):
    """The result of a script.

    Attributes:
        ended: it ended without an error, within its limits.
        timed_out: it did not end in time.
        printed: its output.
    """

    ended: bool
    timed_out: bool
    printed: str


def run_script(program: str, text: str, choice: IsolationChoice, limits: Limits, timeout: float) -> Outcome:
    """Runs a program as a script, with a text as its input.

    Args:
        program: its source.
        text: its standard input.
        choice: the isolation.
        limits: its resource limits.
        timeout: seconds from its start.

    Raises:
        RuntimeError: the sandbox does not start.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(text.encode(errors="surrogatepass"))
        stdin.seek(0)
        with Sandboxed("script", plan(choice), limits, stdin, subprocess.PIPE) as process:
            process.wait_until_ready(_STARTUP_SECONDS)
            deadline = time.monotonic() + timeout
            try:
                send(process.control, {"program": program})
            except (OSError, ProtocolError):
                return Outcome(ended=False, timed_out=False, printed="")
            printed = _read_until_end(process, deadline)
            if printed is None:
                return Outcome(ended=False, timed_out=time.monotonic() >= deadline, printed="")
            return Outcome(ended=process.end() == 0, timed_out=False, printed=printed.decode(errors="replace"))


def _read_until_end(process: Sandboxed, deadline: float) -> bytes | None:
    """Reads its output until it ends; ``None`` if that takes too long or exceeds a limit."""
    assert process.process.stdout is not None  # a pipe was asked for
    descriptor, printed = process.process.stdout.fileno(), bytearray()
    looked, is_open = time.monotonic(), True
    while (now := time.monotonic()) < deadline:
        if now - looked > _BETWEEN_LOOKS:
            looked = now
            if process.is_beyond_limits():
                return None
        is_over = process.has_ended()
        if not is_open:
            time.sleep(0.0 if is_over else _MOMENT)
        elif wait_for(descriptor, 0.0 if is_over else min(deadline, now + _BETWEEN_LOOKS)):
            chunk = os.read(descriptor, 65536)
            printed += chunk
            is_open = bool(chunk)
            if len(printed) > _MAX_PRINTED:
                return None
            continue
        if is_over:  # orphaned processes may still hold the pipe open
            return bytes(printed)
    return None


class Judge:
    """Runs tests of programs in a process that no program can reach.

    Tests are code, and hold the expected values: they run in the judge's own sandbox, which calls the program's
    functions by name and arguments. See ``inside/judge.py``.

    Args:
        choice: the isolation of programs, and of the judge.
        limits: a program's resource limits.
        timeout: seconds for a program with all its tests.
        at_once: maximum number of programs judged at a time.
    """

    def __init__(self, choice: IsolationChoice, limits: Limits, timeout: float, at_once: int) -> None:
        self._choice, self._limits, self._timeout = choice, limits, timeout
        own = Limits(max(limits.memory_mb, 512), limits.disk_mb, 4 * at_once + 8, _A_DAY)
        self._process = Sandboxed("judge", plan(choice), own)
        try:
            self._process.wait_until_ready(_STARTUP_SECONDS)
        except BaseException:
            self._process.close()
            raise
        self._control = socket.socket(fileno=os.dup(self._process.control))

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *problem: object) -> None:
        self._control.close()
        self._process.close()

    def run(self, program: str, tests: Sequence[Any]) -> list[bool]:
        """Returns for each test whether the program passes it.

        Args:
            program: its source.
            tests: code, or mappings with ``call``, ``args``, ``kwargs`` and ``output``.

        Raises:
            RuntimeError: a sandbox does not start.
        """
        passed = [False] * len(tests)
        with Sandboxed("calls", plan(self._choice), self._limits) as process:
            process.wait_until_ready(_STARTUP_SECONDS)
            ours, theirs = socket.socketpair()
            try:
                send(process.control, {"program": program})
                socket.send_fds(self._control, [b"j"], [theirs.fileno(), process.control])
                theirs.close()
                # From here on only the judge talks to the program.
                os.close(process.control)
                process.control = -1
                send(ours.fileno(), {"tests": [*tests], "program": program, "seconds": math.ceil(self._timeout) + 2})
                self._collect(ours.fileno(), process, passed)
            except (OSError, ProtocolError, EOFError):
                self._check_judge()
            finally:
                ours.close()
                theirs.close()
        return passed

    def _collect(self, verdicts: int, process: Sandboxed, passed: list[bool]) -> None:
        deadline = time.monotonic() + self._timeout
        for _ in passed:
            while not wait_for(verdicts, min(deadline, time.monotonic() + _BETWEEN_LOOKS)):
                if time.monotonic() >= deadline or process.is_beyond_limits():
                    return
            verdict = receive(verdicts)
            passed[verdict["test"]] = verdict["passed"] is True

    def _check_judge(self) -> None:
        if self._process.has_ended():
            raise RuntimeError(f"the judge has ended with status {self._process.end()}")
