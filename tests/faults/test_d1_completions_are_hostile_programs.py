"""No program reaches what is not its own, outlives its verdict, or decides it: in every isolation that there is."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlhf_lightning
from rlhf_lightning.rewards import CodeTestsReward
from rlhf_lightning.rewards.sandbox import isolation as isolations
from rlhf_lightning.rewards.sandbox import runs
from rlhf_lightning.rewards.sandbox.isolation import Plan

from .hostile import FORGE, GREED, KERNEL, NETWORK, NO_EFFECT, READ, SURVIVE, WRITE, Attack

WORKED = {"input": "", "output": "worked"}
MARK = f"survivor-{os.getpid()}"
MODES = {
    "bubblewrap": None,
    "landlock": None,
    "user namespace": Plan("bubblewrap", drops_user=False),
}


def plan_of(mode: str) -> Plan:
    """How programs are kept in a mode; the test is skipped where the machine cannot."""
    try:
        if MODES[mode] is None:
            return isolations.plan(mode)
        problem = isolations._problem(MODES[mode])
    except ValueError as error:
        pytest.skip(f"no {mode} here: {error}")
    if problem:
        pytest.skip(f"no {mode} here: {problem}")
    return MODES[mode]


@pytest.fixture(params=["bubblewrap", "landlock", pytest.param("user namespace", marks=pytest.mark.slow)])
def reward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CodeTestsReward:
    plan = plan_of(request.param)
    monkeypatch.setattr(runs, "plan", lambda choice: plan)
    return CodeTestsReward(isolation=plan.isolation, memory_mb=512, timeout=5.0)


@pytest.fixture(
    params=["bubblewrap", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES if mode != "bubblewrap")]
)
def judged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CodeTestsReward:
    """As ``reward``; what comes from the limits and the judge is the same in all of them."""
    plan = plan_of(request.param)
    monkeypatch.setattr(runs, "plan", lambda choice: plan)
    return CodeTestsReward(isolation=plan.isolation)


class Target:
    """Targets of the attacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "precious"
        self.folder.mkdir()
        self.secret = self.folder / "secret"
        self.secret.write_text("hidden")
        os.utime(self.secret, (1_000_000_000, 1_000_000_000))
        self.database = self.folder / "database"
        with sqlite3.connect(self.database) as connection:
            connection.execute("create table t as select 1")
        connection.close()
        self.sibling = Path(tempfile.mkdtemp(prefix="program-")) / "answer"
        self.sibling.write_text("x")
        self.shared = f"shared-{os.getpid()}"
        Path("/dev/shm", self.shared).write_bytes(b"x" * 4096)
        sleeper = "import time; time.sleep(300)"
        self.victim = subprocess.Popen([sys.executable, "-c", sleeper], env={"VERY_SECRET": "x"})
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "socket"))
        self.abstract.bind(f"\0abstract-{os.getpid()}")
        for server in (self.unix, self.abstract):
            server.listen()
        self.names: dict[str, Any] = {
            "folder": str(self.folder),
            "secret": str(self.secret),
            "database": str(self.database),
            "sibling": str(self.sibling),
            "shared": self.shared,
            "victim": self.victim.pid,
            "repository": str(Path(rlhf_lightning.__file__)),
            "home": str(Path.home()),
            "entry": next((p.name for p in Path.home().iterdir() if p.name not in sys.base_prefix), "nothing"),
            "port": self.tcp.getsockname()[1],
            "unix": str(folder / "socket"),
            "abstract": f"abstract-{os.getpid()}",
            "sleeper": f"import time; time.sleep(300)  # {MARK}",
        }
        self.before = self.state()

    def state(self) -> Any:
        victim = self.victim.pid
        return (
            {p.name: (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime) for p in self.folder.iterdir()},
            os.listxattr(self.secret),
            self.victim.poll(),
            os.getpriority(os.PRIO_PROCESS, victim),
            os.sched_getaffinity(victim),
            Path(f"/proc/{victim}/limits").read_text(),
        )

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for server in (self.tcp, self.unix, self.abstract):
            server.close()
        self.sibling.unlink()
        self.sibling.parent.rmdir()
        Path("/dev/shm", self.shared).unlink()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("target"))
    yield target
    target.close()


def survivors() -> list[int]:
    """Processes with the mark that are there after a second."""
    for _ in range(20):
        found = [
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and MARK.encode() in _command_line(p) and int(p.name) != os.getpid()
        ]
        if not found:
            return []
        time.sleep(0.05)
    return found


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def programs(attack: Attack, target: Target) -> list[str]:
    end = "\nprint('worked')" if "__main__" not in attack.code else "\nif __name__ == '__main__': print('worked')"
    return [text.format(**target.names) + end for text in (attack.code, attack.control)]


def names(attacks: list[Attack]) -> Any:
    return pytest.mark.parametrize("attack", attacks, ids=[attack.name for attack in attacks])


@names([*READ, *WRITE, *NETWORK, *KERNEL])
def test_attacks_fail_and_the_same_program_without_its_attack_passes(
    attack: Attack, reward: CodeTestsReward, target: Target
) -> None:
    assert reward(["p"] * 2, programs(attack, target), tests=[WORKED] * 2) == [0.0, 1.0]
    assert target.state() == target.before


@names([READ[0], READ[5], READ[11], NETWORK[0], NETWORK[4]])
def test_these_attacks_work_where_nothing_keeps_them(attack: Attack, target: Target) -> None:
    reward = CodeTestsReward(isolation="none")
    assert reward(["p"], programs(attack, target)[:1], tests=[WORKED]) == [1.0]


@names(NO_EFFECT)
def test_attempts_have_no_effect(attack: Attack, reward: CodeTestsReward, target: Target) -> None:
    reward(["p"], programs(attack, target)[:1], tests=[WORKED])
    assert target.state() == target.before


@names(GREED)
def test_greed_fails_in_time_and_costs_no_other_program(
    attack: Attack, judged: CodeTestsReward, target: Target
) -> None:
    reward = CodeTestsReward(isolation=judged.isolation, memory_mb=256, disk_mb=16, processes=16, timeout=3.0)
    start = time.monotonic()
    assert reward(["p"] * 2, programs(attack, target), tests=[WORKED] * 2) == [0.0, 1.0]
    assert time.monotonic() - start < 15


@names(SURVIVE)
def test_nothing_survives_the_verdict(attack: Attack, reward: CodeTestsReward, target: Target) -> None:
    reward(["p"], programs(attack, target)[:1], tests=[WORKED])
    assert survivors() == []


RIGHT = "def f(x): return {2: 1.5, 3: [1, 2], 4: 'abc'}[x]"
ASSERTIONS = [
    "expected = 'expected-1.5'\nassert f(2) == float(expected[9:])",
    "assert f(3) == [1, 2]",
    "assert abs(f(2) - 1.5) < 1e-6",
    "assert 1 <= f(2) <= 2",
    "import math\nassert math.isclose(f(2), 1.5)",
    "assert math.isclose(f(2), 1.5)",
    "assert f(4).startswith('ab')",
    "assert 'b' in f(4)",
    "assert len(f(3)) == 2 and f(3)[1] == 2",
    "assert f(2) in (1.5, 2.5)",
    "import numpy as np\nassert np.allclose(f(3), [1.0, 2.0])",
    "assert round(f(2), 1) == 1.5 and round(f(2)) == 2",
    {"call": "f", "args": [2], "output": 1.5},
    {"call": "f", "args": [3], "output": [1, 2]},
]


def test_the_program_that_is_asked_for_passes(reward: CodeTestsReward) -> None:
    reward = CodeTestsReward(isolation=reward.isolation, timeout=20.0)
    for program in (RIGHT, "import math, os\n" + RIGHT, "print('x')\nclass C: pass\n" + RIGHT):
        assert reward(["p"], [program], tests=[ASSERTIONS]) == [1.0]


@names(FORGE)
def test_no_verdict_can_be_forged(attack: Attack, judged: CodeTestsReward) -> None:
    reward = CodeTestsReward(isolation=judged.isolation, partial_credit=True, timeout=1.5)
    assert reward(["p"], [attack.code.format()], tests=[ASSERTIONS]) == [0.0]


def test_a_killed_trainer_leaves_no_program(reward: CodeTestsReward) -> None:
    program = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # {MARK}"])
if "SCRIPT": time.sleep(300)
"""
    limits = isolations.Limits(512, 16, 16, 60)
    trainer = os.fork()
    if trainer == 0:
        threading.Thread(target=runs.run_script, args=(program, "", "auto", limits, 60.0)).start()
        with runs.Judge("auto", limits, 60.0, 2) as judge:
            judge.run(program.replace("SCRIPT", ""), ["import time; time.sleep(300)"])
    try:
        deadline = time.monotonic() + 60
        while sum(MARK.encode() in _command_line(p) for p in Path("/proc").iterdir()) < 2:
            assert time.monotonic() < deadline, "the programs do not start"
            time.sleep(0.05)
    finally:
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
    assert survivors() == []
