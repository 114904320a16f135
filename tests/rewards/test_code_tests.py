"""Programs that are right, wrong, stuck or greedy; hostile ones are in tests/faults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.rewards import CodeTestsReward, RewardSet
from rlhf_lightning.rewards.code_tests import extract_program
from rlhf_lightning.rewards.sandbox import isolation as isolations
from rlhf_lightning.rewards.sandbox import resolve_isolation

FENCE = "`" * 3
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


# Without either, what is tested is what there is: no isolation.
try:
    ISOLATION: Any = resolve_isolation("auto")
except ValueError:
    ISOLATION = "none"


def score(program: str, tests: Any, **options: Any) -> float | None:
    return CodeTestsReward(**{"isolation": ISOLATION, **options})(["p"], [program], tests=[tests])[0]


@pytest.fixture(params=["bubblewrap", "landlock", "none"])
def isolation(request: pytest.FixtureRequest) -> str:
    """Every way of keeping a program, as far as this system has it."""
    try:
        return resolve_isolation(request.param)
    except ValueError as error:
        pytest.skip(str(error))


class TestVerdicts:
    def test_right_wrong_and_unscorable(self, isolation: str) -> None:
        programs = [ADD, "def add(a, b):\n    return a - b", "def add(a, b)", "no code at all", ADD]
        got = CodeTestsReward(isolation=isolation)(["p"] * 5, programs, tests=[TESTS, TESTS, TESTS, TESTS, None])
        assert got == [1.0, 0.0, 0.0, 0.0, None]

    def test_partial_credit_is_the_share_of_tests(self) -> None:
        tests = [*TESTS, "assert add(1, 1) == 3", "raise SystemExit"]
        assert score(ADD, tests) == 0.0
        assert score(ADD, tests, partial_credit=True) == 0.5
        assert score(ADD, tests, partial_credit=True, passed=3.0, failed=-1.0) == 1.0

    def test_a_test_may_be_several_statements_and_does_not_leak_into_the_next(self) -> None:
        check = "def check(f):\n    assert f(2, 2) == 4\nadd2 = add\ncheck(add2)"
        assert score(ADD, check) == 1.0
        assert score(ADD, ["add = None", "assert add(1, 2) == 3"]) == 1.0

    def test_input_and_output(self) -> None:
        program = "n = int(input())\nprint(sum(int(x) for x in input().split()))\nprint('done')"
        right = {"input": "2\n3 4\n", "output": "7  \ndone"}
        wrong = {"input": "2\n3 4\n", "output": "8\ndone"}
        assert score(program, right) == 1.0
        assert score(program, [right, wrong], partial_credit=True) == 0.5
        assert score(program + "\n1 / 0", right) == 0.0
        assert score("print('7\\ndone')\nimport sys\nsys.exit(0)", right) == 1.0
        assert score("print('7\\ndone')\nimport sys\nsys.exit(1)", right) == 0.0

    def test_input_and_output_together_with_code(self) -> None:
        program = ADD + "if __name__ == '__main__':\n    print(add(int(input() or 0), 1))"
        assert score(program, [{"input": "4", "output": "5"}]) == 1.0

    def test_the_last_fenced_block_counts(self) -> None:
        text = f"First\n{FENCE}python\ndef add(a, b): return 0\n{FENCE}\nbetter\n{FENCE}\n{ADD}{FENCE}\nbye"
        assert extract_program(text) == ADD
        assert score(text, TESTS) == 1.0
        assert score(ADD, TESTS, require_fence=True) == 0.0

    def test_an_event_loop_works(self) -> None:
        program = "import asyncio\nasync def g():\n    return 5\ndef f():\n    return asyncio.run(g())"
        assert score(program, "assert f() == 5") == 1.0


class TestLimits:
    def test_a_program_that_hangs_costs_its_time_and_no_more(self, isolation: str) -> None:
        start = time.monotonic()
        programs = ["while True: pass", "import time\ntime.sleep(60)", ADD]
        got = CodeTestsReward(timeout=0.5, num_workers=3, isolation=isolation)(["p"] * 3, programs, tests=[TESTS] * 3)
        assert got == [0.0, 0.0, 1.0]
        assert time.monotonic() - start < 5

    def test_tests_before_one_that_hangs_still_count(self) -> None:
        got = score(ADD, [TESTS[0], "while True: pass"], timeout=0.5, partial_credit=True)
        assert got == 0.5

    def test_memory(self) -> None:
        program = "def add(a, b):\n    return a + b\nhoard = bytearray(10**9)"
        assert score(program, TESTS, memory_mb=256) == 0.0
        assert score("def add(a, b): return a + b\ntry: bytearray(10**9)\nexcept MemoryError: pass", TESTS) == 1.0

    def test_recursion_and_crashes_are_failures(self) -> None:
        assert score("def add(a, b): return add(a, b)", TESTS) == 0.0
        assert score("import os\nos.abort()", TESTS) == 0.0

    def test_a_flood_of_output_is_cut(self) -> None:
        program = "import sys\nwhile True: sys.stdout.write('x' * 2**20)"
        start = time.monotonic()
        assert score(program, {"input": "", "output": "y"}, timeout=2.0) == 0.0
        assert time.monotonic() - start < 6

    def test_a_sandbox_that_does_not_start_is_an_error_and_not_a_verdict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reward = CodeTestsReward(isolation=ISOLATION)
        monkeypatch.setattr(isolations, "_LAUNCH", "raise SystemExit(3)")
        for tests in (TESTS, {"input": "", "output": ""}):
            with pytest.raises(
                RuntimeError, match="the sandbox does not start with memory_mb=512: it ends with status"
            ):
                reward(["p"], [ADD], tests=[tests])

    def test_nothing_remains(self, isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        descriptors = set(Path("/proc/self/fd").iterdir())
        program = "open('mine', 'w').write('x')\nassert open('mine').read() == 'x'\n" + ADD
        assert score(program, TESTS, isolation=isolation) == 1.0
        assert score("while True: pass", TESTS, timeout=0.2, isolation=isolation) == 0.0
        assert score("print(1)", {"input": "", "output": "1"}, isolation=isolation) == 1.0
        assert list(tmp_path.iterdir()) == []
        assert set(Path("/proc/self/fd").iterdir()) == descriptors

    def test_a_deep_tree_is_removed(self, isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        deep = "import os\nfor _ in range(1900):\n    os.mkdir('d')\n    os.chdir('d')\n    open('f', 'w')\n"
        closed = "os.chdir('/')\nos.chmod(os.environ['HOME'] + '/d', 0)\n"
        score(deep + closed, {"input": "", "output": ""}, isolation=isolation)
        assert list(tmp_path.iterdir()) == []

    def test_hanging_is_as_wrong_as_wrong(self, isolation: str) -> None:
        rewards = RewardSet([CodeTestsReward(timeout=0.6, isolation=isolation)], timeout=0.5, sample_timeout=0.2)
        programs = ["while True: pass", "import time\ntime.sleep(60)", "x = 1", ADD]
        scores = rewards(["p"] * 4, programs, {"tests": [TESTS, [{"input": "", "output": "1"}] * 30, TESTS, TESTS]})
        assert scores.values[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]
        assert scores.failures == {"CodeTestsReward": 0}


class TestHonestPrograms:
    """Attacks that hooks of the interpreter stopped, or that a test outside could not see."""

    @pytest.mark.parametrize(
        "program",
        [
            "import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nprint(os.listdir('d') == ['f'])",
            "import tempfile, shutil\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w')\nprint(True)",
            "import numpy as np\nprint(bool((np.arange(3) @ np.arange(3)) == 5))",
            "import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'print(1)']) == b'1\\n')",
            "import os\nprint(os.popen('echo x').read() == 'x\\n')",
            "import asyncio\nasync def g(): return True\nprint(asyncio.run(g()))",
            "from concurrent.futures import ThreadPoolExecutor as P\nprint(list(P(4).map(abs, [-1])) == [1])",
            "import sqlite3\nprint(sqlite3.connect(':memory:').execute('select 1').fetchall() == [(1,)])",
            "import sys\nsys.setrecursionlimit(10**5)\nprint(sys.stdin.read() == '' and __name__ == '__main__')",
            "import ctypes, hashlib, decimal, zoneinfo, uuid, secrets\nprint(uuid.uuid4() != uuid.uuid4())",
        ],
    )
    def test_they_run(self, program: str, isolation: str) -> None:
        assert score(program, {"input": "", "output": "True"}, isolation=isolation, memory_mb=1024, timeout=20.0) == 1.0

    def test_sympy(self, isolation: str) -> None:
        pytest.importorskip("sympy")
        program = "import sympy\ndef f(): return str(sympy.factor(sympy.Symbol('x')**2 - 1))"
        tests = ["assert f() == '(x - 1)*(x + 1)'"]
        assert score(program, tests, isolation=isolation, memory_mb=1024, timeout=30.0) == 1.0

    def test_several_processes(self, isolation: str) -> None:
        if isolation == "landlock":
            pytest.skip("semaphores have names in /dev/shm, which a program does not have to itself there")
        program = "import multiprocessing as m\nif __name__ == '__main__':\n    print(m.Pool(2).map(abs, [-1, 2]))"
        assert score(program, {"input": "", "output": "[1, 2]"}, isolation=isolation, timeout=20.0) == 1.0
        spawned = program.replace("m.Pool(2)", "m.get_context('spawn').Pool(2)").replace("abs", "f")
        spawned = spawned.replace("\nif", "\ndef f(x): return abs(x)\nif")
        assert score(spawned, {"input": "", "output": "[1, 2]"}, isolation=isolation, timeout=20.0) == 1.0


VALUES = """
import collections, datetime, decimal, fractions, math
import numpy as np
def same(x): return x
def kind(x): return type(x).__name__
class Stack:
    size = 0
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise EmptyError("nothing")
        return self.items.pop()
    def is_empty(self): return not self.items
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return self.items == other.items
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __repr__(self): return f"Stack{tuple(self.items)}"
class EmptyError(LookupError): pass
class Deep(Stack): pass
def sort(items): items.sort()
def tell(d): d["x"] = 1
def apply(f, items): return [f(x) for x in items]
def count(n):
    for i in range(n): yield i
def divide(a, b): return a / b
def sum(a, b): return a * b
def grid(): return np.eye(2)
"""


class TestCalls:
    @pytest.mark.parametrize(
        "test",
        [
            "for x in (None, True, 1, -2**70, 1.5, 'é\\ud800', b'x', [1, [2]], (1, (2,)), {1, 2}, {1: 'a', (1,): 3}):\n"
            "    assert same(x) == x and type(same(x)) is type(x), x",
            "assert same(float('inf')) == float('inf') and same(float('nan')) != same(float('nan'))",
            "import decimal, fractions, datetime\nfor x in (decimal.Decimal('1.10'), fractions.Fraction(1, 3), 1j,"
            " range(3), datetime.date(2020, 1, 2), datetime.timedelta(1, 2), frozenset([1]), bytearray(b'x')):\n"
            "    assert same(x) == x and kind(x) == type(x).__name__, x",
            "s = Stack(1, 2)\nassert s.push(3).pop() == 3 and len(s) == 2 and list(s) == [1, 2] and not s.is_empty()",
            "s = Stack()\ns.size = 4\nassert s.size == 4 and Stack.size == 0 and s.items == [] and str(s) == 'Stack()'",
            "assert Stack(1) == Stack(1) and Stack(1) != Stack(2) and Stack(1) + Stack(2) == Stack(1, 2)",
            "assert isinstance(Deep(), Stack) and not isinstance(Stack(), Deep) and issubclass(Deep, Stack)",
            "try: Stack().pop()\nexcept EmptyError as error: assert str(error) == 'nothing'\nelse: assert False",
            "try: Stack().pop()\nexcept LookupError: pass\nelse: assert False",
            "try: divide(1, 0)\nexcept ZeroDivisionError: pass\nelse: assert False",
            "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]\nd = {}\ntell(d)\nassert d == {'x': 1}",
            "assert apply(lambda x: x + 1, [1, 2]) == [2, 3] and apply(str, [1]) == ['1'] and apply(same, [1]) == [1]",
            "assert apply(len, ['ab']) == [2] and apply(lambda x: same(x), [1]) == [1] and same(int) is int",
            "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and 2 in count(3)",
            "assert sum(10, 15) == 150",
            "assert (grid() == np.eye(2)).all() and grid().shape == (2, 2)",
            "assert collections.Counter(same([1, 1]))[1] == 2 and math.isclose(divide(1, 3), 1 / 3)",
            "def check(f):\n    assert f(1) == 1\n    assert f(2) == 2\ncheck(same)",
            {"call": "divide", "args": [1, 2], "output": 0.5},
            {"call": "divide", "args": [1], "kwargs": {"b": 2}, "output": 0.5},
            {"call": "same", "args": [[[1, 2]]], "output": [[1, 2]], "input": None},
            {"call": "Stack.is_empty", "output": True, "args": None},
        ],
    )
    def test_what_programs_do_is_seen_from_outside(self, test: Any) -> None:
        assert score(VALUES, test, timeout=20.0, memory_mb=1024) == 1.0

    @pytest.mark.parametrize(
        "test",
        [
            "assert same(1) == 2",
            "assert Stack(1) == [1]",
            "assert divide(1, 0)",
            "assert missing(1)",
            "same(object())",
            "assert False",
            {"call": "divide", "args": [1, 2], "output": 1},
            {"call": "missing", "args": [], "output": None},
            "syntax error",
        ],
    )
    def test_what_they_do_not_do_fails(self, test: Any) -> None:
        assert score(VALUES, test, timeout=20.0, memory_mb=1024) == 0.0


class TestIsolation:
    def test_without_any_it_refuses_unless_told_not_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(isolations.shutil, "which", lambda name: None)
        monkeypatch.setattr(isolations, "landlock_abi", lambda: 3)
        isolations.plan.cache_clear()
        try:
            for choice in ("auto", "bubblewrap", "landlock"):
                with pytest.raises(ValueError, match=r"does not work here \(.*: install bubblewrap .* isolation: none"):
                    CodeTestsReward(isolation=choice)  # type: ignore[arg-type]
            assert score(ADD, TESTS, isolation="none") == 1.0
        finally:
            isolations.plan.cache_clear()

    def test_the_choice_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        if ISOLATION == "none":
            pytest.skip("this system has neither bubblewrap nor Landlock")
        isolations.plan.cache_clear()
        with caplog.at_level("INFO"):
            CodeTestsReward()
        assert f"isolation: programs run within {ISOLATION}" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0 is not above 0"),
        ({"memory_mb": 8}, "memory_mb=8 is below 64"),
        ({"num_workers": 0}, "num_workers=0 is below 1"),
        ({"disk_mb": 0}, "disk_mb=0 is below 1"),
        ({"processes": 0}, "processes=0 is below 1"),
        ({"isolation": "some"}, "isolation='some' is not allowed: use one of auto, bubblewrap, landlock, none"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeTestsReward(**options)


def test_missing_column_and_malformed_test() -> None:
    with pytest.raises(ValueError, match=r"^CodeTestsReward needs the column 'tests': the rows have answer, id$"):
        CodeTestsReward(isolation=ISOLATION)(["p"], [ADD], id=[1], answer=[2])
    for test in (
        {"in": "1"},
        {"input": "1"},
        {"call": "add", "args": [1]},
        {"input": "", "call": "f", "output": ""},
        3,
    ):
        with pytest.raises(ValueError, match="is neither code nor a mapping with 'input' and 'output'"):
            score(ADD, [test])


def test_an_interpreter_below_the_folder_of_programs_can_be_reached(monkeypatch):
    """As with an environment that was made in `/tmp`, where programs have a folder in memory."""
    monkeypatch.setattr(isolations, "_roots", lambda: ("/tmp/project/.venv",))
    limits = isolations.Limits(memory_mb=64, disk_mb=1, processes=1, cpu_seconds=1)
    command = " ".join(map(str, isolations.Plan("bubblewrap", drops_user=False)._bubblewrap(limits)))
    assert "--perms 0755 --dir /tmp/project --ro-bind /tmp/project/.venv /tmp/project/.venv" in command
    assert "--dir /tmp " not in command


@pytest.mark.parametrize(
    "text",
    [
        f"{FENCE}bash\npip install numpy\n{FENCE}\nThen:\n{FENCE}python\n{ADD}{FENCE}",
        f"{FENCE}python\n{ADD}{FENCE}\nprints\n{FENCE}text\n3\n{FENCE}\nand as JSON\n{FENCE}json\n{{}}\n{FENCE}",
        f"{FENCE}Python\n{ADD}{FENCE}",
        f"{FENCE}python\n{ADD}{FENCE}\n".replace("\n", "\r\n"),
        f'{FENCE}python title="a.py"\n{ADD}{FENCE}',
        f"{FENCE}python\n{ADD}{FENCE}\nOutput:\n{FENCE}\n3\n{FENCE}",
        f"{FENCE}\n{ADD}{FENCE}\nOutput:\n{FENCE}\n[1, 2]\n{FENCE}",
        f"1. so\n   {FENCE}py\n   def add(a, b):\n       return a + b\n   {FENCE}",
        f"Never closed\n{FENCE}json\n{{\n{FENCE}python\n{ADD}{FENCE}",
        f"Here: {FENCE}python\n{ADD.rstrip()}{FENCE}",
        f"{FENCE}`python\n{ADD}{FENCE}`",
    ],
)
def test_blocks_of_other_languages_and_outputs_are_no_programs(text: str) -> None:
    assert extract_program(text) == ADD


def test_a_fence_within_a_docstring_ends_no_block() -> None:
    program = f'def f():\n    """\n    {FENCE}python\n    f()\n    {FENCE}\n    """\n    return 1\n'
    assert extract_program(f"{FENCE}python\n{program}{FENCE}\n") == program


def test_nulls_of_tables_are_no_keyword_arguments_and_no_tests() -> None:
    test = {"call": "f", "args": [1], "kwargs": {"a": 1, "b": None}, "output": 2}
    assert score("def f(x, a=0): return x + a", [test]) == 1.0
    assert score(ADD, float("nan")) is None
