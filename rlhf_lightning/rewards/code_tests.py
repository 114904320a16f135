"""Reward for completions whose program passes the row's tests."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

from ..data.cell_checks import is_missing
from ._columns import read_column
from .sandbox import IsolationChoice, Judge, resolve_isolation, run_script
from .sandbox.isolation import Limits

# The only fence of a line, perhaps after other text: its backticks, the language, and the rest of the line.
_FENCE: Final = re.compile(r"(?P<before>(?:(?!```).)*)(?P<ticks>`{3,})[ \t]*[{.]*(?P<tag>[\w+#-]*)(?P<rest>[^`]*)")
# Deeper than this within its block, a fence is content: that of a docstring, for instance (as in CommonMark).
_MAX_INDENT: Final = 3
_PYTHON: Final = frozenset({"python", "python3", "py"})
_SCRIPT_KEYS: Final = frozenset({"input", "output"})
_CALL_KEYS: Final = frozenset({"call", "args", "kwargs", "output"})


def extract_program(completion: str, *, require_fence: bool = False) -> str | None:
    r"""Extracts the last fenced block of Python from a completion, or takes all of it.

    Blocks in other languages do not count, nor untagged ones that are no program (such as its output), unless there is
    no other.

    Args:
        completion: the completion's text.
        require_fence: treat a completion without a fenced block as one without a program.

    Returns:
        The program, or ``None`` for none.

    Example:
        >>> fence = "`" * 3
        >>> extract_program(f"Here:\n{fence}python\nx = 1\n{fence}\nDone.")
        'x = 1\n'
    """
    blocks = [(tag, code) for tag, code in _fenced_blocks(completion) if not tag or tag in _PYTHON]
    for tag, code in reversed(blocks):
        if tag or _is_program(code):
            return code
    if blocks:
        return blocks[-1][1]
    return None if require_fence else completion


def parse_program(program: str) -> ast.Module | None:
    """Parses a foreign program; ``None`` if it is no Python."""
    try:
        # Parsing may also end at a program's depth, or at a null byte.
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_program(code: str) -> bool:
    """Whether a block does something, unlike a printed value such as ``[1, 2]``."""
    tree = parse_program(code)
    if tree is None:
        return False
    return any(not isinstance(node, ast.Expr) for node in tree.body) or any(
        isinstance(node, ast.Call) for node in ast.walk(tree)
    )


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Finds the closed fenced blocks of all languages: each one's tag in lower case, and its content."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    content: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = _FENCE.fullmatch(line)
        alone = fence is not None and not fence["before"].strip()
        if opened is None:
            # Text may come before the fence, but none between its language and the end of the line.
            if fence is not None and (alone or not fence["rest"].strip()):
                opened, content = fence, []
            continue

        indent = 0 if opened["before"].strip() else len(opened["before"])
        if fence is not None:
            is_deep = alone and len(fence["before"].expandtabs(4)) > indent + _MAX_INDENT
            if is_deep or len(fence["ticks"]) < len(opened["ticks"]):
                fence = None

        # A block ends with its last line, perhaps after code; a fence with a language begins another.
        if fence is not None and not fence["tag"] and not fence["rest"].strip():
            if not alone:
                content.append(_unindented(fence["before"], indent))
            blocks.append((opened["tag"].lower(), "".join(f"{each}\n" for each in content)))
            opened = None
        elif fence is not None and alone:
            opened, content = fence, []
        else:
            content.append(_unindented(line, indent))
    return blocks


def _unindented(line: str, indent: int) -> str:
    """A line without the blanks by which its block is indented."""
    return line[min(indent, len(line) - len(line.lstrip(" \t"))) :]


class CodeTestsReward:
    """Rewards a completion whose program passes the row's tests.

    **It runs model-written code.** A program runs in its own process, which the operating system isolates from files,
    network and other processes (for the values of ``isolation`` see
    :func:`~rlhf_lightning.rewards.sandbox.resolve_isolation`). Nothing in that process decides the reward:
    tests, later inputs and expected values are outside, and the program's output is compared there.

    A test is one of

    - ``{"input": text, "output": text}``: the program's output for an input. Blanks at the ends of lines and empty
      lines at the end are not compared; the program must end without an error.
    - ``{"call": name, "args": [...], "kwargs": {...}, "output": value}``: the return value of a function of the
      program, compared as data, with tuples as lists; ``Class.method`` calls a method of a new object. Keyword
      arguments that are null are left out, since tables give each test those of all others.
    - Python code that raises where the program is wrong (``assert add(1, 2) == 3``). It runs outside, where the
      program's functions and classes can be called by their names with plain values (numbers, text, lists, sets,
      dictionaries, dates, arrays) and functions of the test, and return plain values. Any other object stays in the
      program: its methods can be called; it equals no plain value, whatever the program claims. Arguments that a test
      passes *to* the program are visible to it: expected values belong on the other side of ``==``.

    A program fails if it does not end in time, exceeds a limit on memory, files, processes or output, or leaves the
    tests without an answer.

    Args:
        tests_column: the column with a test or a list of tests per row; a row without any cannot be scored.
        passed: reward for passing all tests.
        failed: reward for passing none, or for no program.
        partial_credit: give a share of the reward for a share of the tests, instead of ``failed`` for any failure.
        require_fence: only a fenced block of Python is a program; otherwise a completion without one is taken whole.
        timeout: seconds for a program and its tests, above 0; with inputs, for each of them. After an input that takes
            longer, the others are not tried.
        memory_mb: megabytes of address space, and of memory for all its processes, at least 64.
        disk_mb: megabytes of files, at least 1.
        processes: processes and threads at a time, at least 1.
        num_workers: programs that run at a time, at least 1.
        isolation: ``bubblewrap``, ``landlock``, ``none``, or ``auto`` for the first of bubblewrap and landlock that
            works on this machine.

    Raises:
        ValueError: for numbers out of range, or an isolation that does not work on this machine.

    Example:
        >>> programs = ["def f(x): return x + 1", "def f(x): return x"]
        >>> CodeTestsReward()(["p", "p"], programs, tests=["assert f(1) == 2"] * 2)  # doctest: +SKIP
        [1.0, 0.0]
    """

    bounds_its_time = True

    def __init__(
        self,
        tests_column: str = "tests",
        passed: float = 1.0,
        failed: float = 0.0,
        partial_credit: bool = False,
        require_fence: bool = False,
        timeout: float = 5.0,
        memory_mb: int = 512,
        disk_mb: int = 64,
        processes: int = 32,
        num_workers: int = 2,
        isolation: IsolationChoice = "auto",
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout} is not above 0: 5.0 is usual")
        if memory_mb < 64:
            raise ValueError(f"memory_mb={memory_mb} is below 64: an interpreter alone needs that much address space")
        for name, value in (("disk_mb", disk_mb), ("processes", processes), ("num_workers", num_workers)):
            if value < 1:
                raise ValueError(f"{name}={value} is below 1: use 1 or more")
        resolve_isolation(isolation)
        self.tests_column = tests_column
        self.passed = passed
        self.failed = failed
        self.partial_credit = partial_credit
        self.require_fence = require_fence
        self.timeout = timeout
        self.limits = Limits(memory_mb, disk_mb, processes, cpu_seconds=int(timeout) + 2)
        self.num_workers = num_workers
        self.isolation = isolation
        self.required_columns = (tests_column,)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores each completion."""
        tests = [_tests(value) for value in read_column(columns, self.tests_column, self)]
        with ExitStack() as stack:
            # The judge's process is started only where a test needs it.
            judge = None
            if any("input" not in test for row in tests for test in row):
                judge = stack.enter_context(Judge(self.isolation, self.limits, self.timeout, self.num_workers))
            pool = stack.enter_context(ThreadPoolExecutor(self.num_workers))
            return list(pool.map(lambda completion, row: self._score(completion, row, judge), completions, tests))

    def _score(self, completion: str, tests: Sequence[str | Mapping[str, Any]], judge: Judge | None) -> float | None:
        if not tests:
            return None
        program = extract_program(completion, require_fence=self.require_fence)
        if program is None:
            return self.failed
        scripts = [test for test in tests if isinstance(test, Mapping) and "input" in test]
        calls = [test for test in tests if isinstance(test, str) or "input" not in test]
        num_passed = 0
        if calls:
            assert judge is not None  # there is one as soon as any row has such a test
            num_passed += sum(judge.run(program, calls))
        # Scripts run only while all tests can still pass.
        if self.partial_credit or num_passed == len(calls):
            num_passed += self._run_scripts(program, scripts)
        share = num_passed / len(tests)
        if not self.partial_credit:
            share = float(num_passed == len(tests))
        return self.failed + share * (self.passed - self.failed)

    def _run_scripts(self, program: str, tests: Sequence[Mapping[str, Any]]) -> int:
        """The number of inputs with the right output, among those tried."""
        num_passed = 0
        for test in tests:
            outcome = run_script(program, str(test["input"]), self.isolation, self.limits, self.timeout)
            is_right = outcome.ended and _lines(outcome.printed) == _lines(str(test["output"]))
            num_passed += is_right
            if outcome.timed_out or not (is_right or self.partial_credit):
                break
        return num_passed


def _tests(value: Any) -> list[str | Mapping[str, Any]]:
    """Reads a row's tests.

    Raises:
        ValueError: for an invalid test.
    """
    if is_missing(value):
        return []
    tests = [value] if isinstance(value, str | Mapping) else list(value)
    return [test if isinstance(test, str) else _mapping(test) for test in tests]


def _mapping(test: Any) -> dict[str, Any]:
    """Removes the nulls that tables store for missing keys from a test, and checks it."""
    if isinstance(test, Mapping):
        given = {key: value for key, value in test.items() if value is not None or key == "output"}
        if isinstance(given.get("kwargs"), Mapping):
            given["kwargs"] = {name: value for name, value in given["kwargs"].items() if value is not None}
        if given.keys() == _SCRIPT_KEYS or {"call", "output"} <= given.keys() <= _CALL_KEYS:
            return given
    raise ValueError(
        f"test {test!r} is neither code nor a mapping with 'input' and 'output', or with 'call', 'args' and 'output'"
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
