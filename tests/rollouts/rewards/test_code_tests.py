"""Programs that are right, wrong, stuck, greedy or up to no good."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.rollouts.rewards import CodeTestsReward, code_tests
from rlhf_lightning.rollouts.rewards.code_tests import extract_program, network_isolation

FENCE = "`" * 3
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def score(program: str, tests: Any, **options: Any) -> float | None:
    return CodeTestsReward(**options)(["p"], [program], tests=[tests])[0]


@pytest.fixture(params=["namespace", "guard"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of keeping a program from the network, the first only where the system has it."""
    if request.param == "namespace" and network_isolation() != "namespace":
        pytest.skip("this system does not allow namespaces of one's own")
    monkeypatch.setattr(code_tests, "network_isolation", lambda: request.param)
    return str(request.param)


class TestVerdicts:
    def test_right_wrong_and_unscorable(self, isolation: str) -> None:
        programs = [ADD, "def add(a, b):\n    return a - b", "def add(a, b)", "no code at all", ADD]
        got = CodeTestsReward()(["p"] * 5, programs, tests=[TESTS, TESTS, TESTS, TESTS, None])
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

    def test_input_and_output_beside_code(self) -> None:
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
        got = CodeTestsReward(timeout=0.5, num_workers=3)(["p"] * 3, programs, tests=[TESTS] * 3)
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

    def test_no_room_for_the_interpreter_is_an_error_and_not_a_verdict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reward = CodeTestsReward()
        monkeypatch.setattr(code_tests, "_SCRIPT", Path("/nonexistent.py"))
        with pytest.raises(RuntimeError, match="the sandbox does not start"):
            reward(["p"], [ADD], tests=[TESTS])

    def test_nothing_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        descriptors = set(Path("/proc/self/fd").iterdir())
        assert score("open('mine', 'w').write('x')\nassert open('mine').read() == 'x'\n" + ADD, TESTS) == 1.0
        assert score("while True: pass", TESTS, timeout=0.2) == 0.0
        assert list(tmp_path.iterdir()) == []
        assert set(Path("/proc/self/fd").iterdir()) == descriptors


@pytest.fixture
def listener() -> Iterator[tuple[int, list[Any]]]:
    """A server on the loopback interface, and whom it has heard from."""
    heard: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    continue
                heard.append(address)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], heard
        stop.set()
        thread.join()


class TestMischief:
    def test_no_network(self, isolation: str, listener: tuple[int, list[Any]]) -> None:
        port, heard = listener
        socket.create_connection(("127.0.0.1", port)).close()
        for _ in range(50):
            if heard:
                break
            time.sleep(0.02)
        assert len(heard) == 1, "the listener hears who is not kept from it"
        program = f"import socket\ns = socket.create_connection(('127.0.0.1', {port}), timeout=1)\n{ADD}"
        assert score(program, TESTS) == 0.0
        time.sleep(0.2)
        assert len(heard) == 1

    def test_namespaces_alone_keep_the_network_away(
        self, listener: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if network_isolation() != "namespace":
            pytest.skip("this system does not allow namespaces of one's own")
        script = tmp_path / "sandbox.py"
        script.write_text(code_tests._SCRIPT.read_text().replace("    _install_guard(folder)\n", ""))
        monkeypatch.setattr(code_tests, "_SCRIPT", script)
        port, heard = listener
        program = f"import socket\ns = socket.create_connection(('127.0.0.1', {port}), timeout=1)\n{ADD}"
        assert score(program, TESTS) == 0.0
        assert score(ADD, TESTS) == 1.0
        assert heard == []

    @pytest.mark.parametrize(
        "attempt",
        [
            "import os\nos.system('true')",
            "import subprocess\nsubprocess.run(['true'])",
            "import os\nos.fork()",
            "import ctypes\nctypes.CDLL(None).getpid()",
            "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
            "open('/tmp/should-not-be-there', 'w')",
            "import os\nos.open('/tmp/should-not-be-there', os.O_CREAT | os.O_WRONLY)",
            "import os\nos.mkdir('/tmp/should-not-be-there')",
            "import os\nos.symlink('/etc', 'etc')\nopen('etc/should-not-be-there', 'w')",
        ],
    )
    def test_refused(self, attempt: str, isolation: str) -> None:
        assert score(f"{attempt}\n{ADD}", TESTS) == 0.0
        assert not Path("/tmp/should-not-be-there").exists()
        assert not Path("/etc/should-not-be-there").exists()

    def test_files_elsewhere_stay(self, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_text("x")
        for attempt in (
            f"os.remove({str(precious)!r})",
            f"os.rename({str(precious)!r}, 'mine')",
            f"os.truncate({str(precious)!r}, 0)",
            f"shutil.rmtree({str(tmp_path)!r})",
            f"os.unlink('precious', dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
            f"os.chmod({str(precious)!r}, 0)",
        ):
            assert score(f"import os, shutil\n{attempt}\n{ADD}", TESTS) == 0.0, attempt
            assert precious.read_text() == "x", attempt

    def test_the_environment_is_not_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VERY_SECRET", "token")
        assert score("import os\nassert 'VERY_SECRET' not in os.environ\n" + ADD, TESTS) == 1.0

    @pytest.mark.parametrize(
        "cheat",
        [
            "import os\nos._exit(0)",
            "raise SystemExit(0)",
            "print('passed\\nran passed')\nimport os\nos.write(1, b'passed')\nos._exit(0)",
            "import builtins\nbuiltins.exec = lambda *_: None\nbuiltins.compile = lambda *_: None",
            "import os\nfor n in range(3, 99):\n    try: os.write(n, b'passed\\n' * 2)\n    except OSError: pass",
            "class AssertionError(Exception): pass",
        ],
    )
    def test_a_verdict_cannot_be_had_cheaply(self, cheat: str) -> None:
        assert score(cheat, TESTS) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0 is not above 0"),
        ({"memory_mb": 8}, "memory_mb=8 is below 64"),
        ({"num_workers": 0}, "num_workers=0 is below 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeTestsReward(**options)


def test_missing_column_and_malformed_test() -> None:
    with pytest.raises(ValueError, match=r"^CodeTestsReward needs the column 'tests': the rows have answer, id$"):
        CodeTestsReward()(["p"], [ADD], id=[1], answer=[2])
    with pytest.raises(ValueError, match="is neither code nor a mapping with 'input' and 'output'"):
        score(ADD, [{"in": "1"}])
