"""Whether the program in a completion passes the row's tests."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

from ._columns import read_column

_SCRIPT: Final = Path(__file__).with_name("_sandbox.py")
_FENCED: Final = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL)
_STARTUP_SECONDS: Final = 20.0
_FILE_MB: Final = 8
_NAMESPACES: Final = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child=SIGKILL")


@functools.cache
def network_isolation() -> Literal["namespace", "guard"]:
    """How programs are kept from the network on this machine.

    ``namespace``: in network and process namespaces of their own, made by ``unshare``, where there is no network and
    nothing outlives the program. ``guard``: where the system does not allow that, by the interpreter's audit hook
    alone, which stops Python code but not compiled code that a program might load.

    Returns:
        Which of the two.

    Example:
        >>> network_isolation() in ("namespace", "guard")
        True
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return "guard"
    try:
        done = subprocess.run([unshare, *_NAMESPACES, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "guard"
    return "namespace" if done.returncode == 0 else "guard"


def extract_program(completion: str, *, require_fence: bool = False) -> str | None:
    r"""The last fenced block of Python in a completion, or all of it.

    Args:
        completion: what a model wrote.
        require_fence: a completion without a fenced block has no program.

    Returns:
        The program, or ``None`` for none.

    Example:
        >>> fence = "`" * 3
        >>> extract_program(f"Here:\n{fence}python\nx = 1\n{fence}\nDone.")
        'x = 1\n'
    """
    blocks = _FENCED.findall(completion)
    if blocks:
        return str(blocks[-1])
    return None if require_fence else completion


class CodeTestsReward:
    """Rewards a completion whose program passes the row's tests.

    A test is either Python code that raises where the program is wrong (``assert add(1, 2) == 3``), run after the
    program in its names, or a mapping with ``input`` and ``output``: what the program must print for that input, up to
    white space at the ends of lines and of the text.

    Each completion runs in a process of its own with limits on wall time, processor time, memory and size of files, in
    an empty temporary folder, without environment variables, without network (see ``network_isolation``), and with an
    audit hook that refuses starting processes and writing elsewhere. Its verdict cannot be had by exiting early. This
    stops accidents and lazy cheating, not a determined attacker: run untrusted models in a container.

    Args:
        tests_column: the column with each row's tests: a list, or one test; a row without tests cannot be scored.
        passed: reward of a completion that passes all tests.
        failed: reward of one that does not, or that has no program.
        partial_credit: reward the share of tests passed, between the two.
        require_fence: the program must be in a fenced block; else a completion without one is a program as a whole.
        timeout: seconds for a program and its tests, above 0; for each input and output by itself.
        memory_mb: megabytes of address space, at least 64.
        num_workers: programs that run at a time, at least 1.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> programs = ["def f(x): return x + 1", "def f(x): return x"]
        >>> CodeTestsReward()(["p", "p"], programs, tests=["assert f(1) == 2"] * 2)
        [1.0, 0.0]
    """

    def __init__(
        self,
        tests_column: str = "tests",
        passed: float = 1.0,
        failed: float = 0.0,
        partial_credit: bool = False,
        require_fence: bool = False,
        timeout: float = 5.0,
        memory_mb: int = 512,
        num_workers: int = 2,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} is not above 0: 5.0 is usual")
        if memory_mb < 64:
            raise ValueError(f"memory_mb={memory_mb} is below 64: an interpreter alone needs that much address space")
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers} is below 1: use 1 or more")
        self.tests_column = tests_column
        self.passed = passed
        self.failed = failed
        self.partial_credit = partial_credit
        self.require_fence = require_fence
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.num_workers = num_workers
        self.required_columns = (tests_column,)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        tests = read_column(columns, self.tests_column, self)
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self._score, completions, tests))

    def _score(self, completion: str, tests: Any) -> float | None:
        if not tests:
            return None
        tests = [tests] if isinstance(tests, str | Mapping) else list(tests)
        program = extract_program(completion, require_fence=self.require_fence)
        if program is None:
            return self.failed
        snippets = [test for test in tests if isinstance(test, str)]
        pairs = [test for test in tests if not isinstance(test, str)]
        num_passed = self._run(program, snippets)[0] if snippets else 0
        for pair in pairs:
            if not isinstance(pair, Mapping) or not {"input", "output"} <= set(pair):
                raise ValueError(f"test {pair!r} is neither code nor a mapping with 'input' and 'output'")
            ended, printed = self._run(program, [], text=str(pair["input"]))[1:]
            num_passed += ended and _lines(printed) == _lines(str(pair["output"]))
        share = num_passed / len(tests)
        if not self.partial_credit:
            share = float(num_passed == len(tests))
        return self.failed + share * (self.passed - self.failed)

    def _run(self, program: str, tests: Sequence[str], text: str = "") -> tuple[int, bool, str]:
        """Number of tests passed, whether the program ended without an error, and what it printed."""
        token = secrets.token_hex(16)
        job = {
            "token": token,
            "program": program,
            "tests": list(tests),
            "memory_mb": self.memory_mb,
            "cpu_seconds": int(self.timeout) + 2,
            "file_mb": _FILE_MB,
        }
        with tempfile.TemporaryDirectory(prefix="program-") as outer:
            folder = Path(outer) / "work"
            folder.mkdir()
            (Path(outer) / "input").write_text(text)
            printed = Path(outer) / "printed"
            with (Path(outer) / "input").open("rb") as stdin, printed.open("wb") as stdout:
                reports = _run_sandbox(job, folder, stdin, stdout, self.timeout)
            words = [line.removeprefix(token).strip() for line in reports.splitlines() if line.startswith(token)]
            if "ready" not in words:
                raise RuntimeError(f"the sandbox does not start with memory_mb={self.memory_mb}")
            return words.count("passed"), "ran" in words, printed.read_text(errors="replace")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _run_sandbox(job: Mapping[str, Any], folder: Path, stdin: Any, stdout: Any, timeout: float) -> str:
    """Starts the sandbox, gives it the job, and collects its reports until it ends or time is up."""
    job_read, job_write = os.pipe()
    report_read, report_write = os.pipe()
    command = [sys.executable, "-I", "-B", str(_SCRIPT), str(job_read), str(report_write)]
    if network_isolation() == "namespace":
        command = [str(shutil.which("unshare")), *_NAMESPACES, *command]
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=(job_read, report_write),
            start_new_session=True,
        )
    except BaseException:
        os.close(job_write)
        os.close(report_read)
        raise
    finally:
        os.close(job_read)
        os.close(report_write)
    try:
        with os.fdopen(job_write, "wb") as stream:
            stream.write(json.dumps(job).encode())
        return _collect(report_read, str(job["token"]), timeout)
    except BrokenPipeError:
        return ""
    finally:
        os.close(report_read)
        # All of its session: in namespaces, its end is the end of everything in them.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _collect(report_fd: int, token: str, timeout: float) -> str:
    poll = select.poll()
    poll.register(report_fd, select.POLLIN)
    received = b""
    deadline = time.monotonic() + _STARTUP_SECONDS
    is_ready = False
    while poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        chunk = os.read(report_fd, 65536)
        if not chunk:
            break
        # What a program writes here without the token is dropped; what it floods here is not kept either.
        received = (received + chunk)[: 2**20]
        if not is_ready and token.encode() in received:
            is_ready = True
            deadline = time.monotonic() + timeout
    return received.decode(errors="replace")
