"""Asks questions to a child process, one JSON line each, and kills it when an answer takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from ._time_limit import CallTimeoutError


class LineWorkerError(RuntimeError):
    """The child process does not start."""


class LineWorkerDiedError(RuntimeError):
    """The child process died while answering a question."""


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    # A fork inherits the object but must leave its parent's child alone.
    if owner == os.getpid():
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            # Closing flushes buffered input, which no process reads any more.
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class LineWorker:
    """Runs a script that prints ``ready`` and then answers each JSON line on its input with one on its output.

    A time limit needs a separate process for code that does not return to the interpreter (a power of huge numbers,
    for instance). It is started with the first question, and again after it was killed.

    Args:
        script: the script; it runs without the current folder on its path.
        timeout: seconds for an answer.
        startup_timeout: seconds until it is ready, imports included.
        memory_mb: address space that it may take; passed to the script as its argument.
    """

    def __init__(self, script: Path, *, timeout: float, memory_mb: int, startup_timeout: float = 60.0) -> None:
        self._script = script
        self._timeout = timeout
        self._startup_timeout = startup_timeout
        self._memory_mb = memory_mb
        self._reset()

    def _reset(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._buffer = b""
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process starts a child of its own.
        return {key: getattr(self, key) for key in ("_script", "_timeout", "_startup_timeout", "_memory_mb")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def ask(self, question: Any) -> Any:
        """Asks a question and returns the answer.

        Raises:
            CallTimeoutError: when it took too long; the process is then gone.
            LineWorkerDiedError: when the process died over it.
            LineWorkerError: when it does not start.
        """
        with self._lock:
            # After any interruption, an alarm of the caller included, the pending answer would be read as the next
            # question's.
            try:
                process = self._running()
                self._write_line(process, json.dumps(question).encode())
                return json.loads(self._read_line(process, self._timeout))
            except BaseException:
                self._stop()
                raise

    def close(self) -> None:
        """Ends the process; the next question starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        # The child has ended, or belongs to the process that this one was forked from.
        self._stop()
        # A session of its own, so that Ctrl-C reaches only the trainer; -P: no imports from the current folder.
        process = subprocess.Popen(
            [sys.executable, "-P", str(self._script), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _kill, process, self._owner)
        try:
            greeting = self._read_line(process, self._startup_timeout)
        except (CallTimeoutError, LineWorkerDiedError) as error:
            raise LineWorkerError(f"{self._script.name} does not start: {error}") from error
        if greeting != b"ready":
            raise LineWorkerError(f"{self._script.name} does not start: it answered {greeting!r}")
        return process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer, self._buffer = None, None, b""

    def _write_line(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None  # a pipe was asked for
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise LineWorkerDiedError("the process died before the question") from None

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None  # a pipe was asked for
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        # poll() instead of a blocking read, which no timeout would interrupt.
        while b"\n" not in self._buffer:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise CallTimeoutError(f"took longer than {seconds:g} s")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise LineWorkerDiedError("the process died over the question")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
