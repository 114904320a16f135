"""One of two ranks killed at any moment: the other one ends, and the run ends as if nothing had happened.

Once for every strategy; ``RLHF_LIGHTNING_KILLS=20`` kills so many times. A flaky case is repeated until it
does, and what ranks said last is in the report::

    for n in $(seq 40 46); do RLHF_LIGHTNING_KILLS=$n make test-slow ARGS="-x -k fsdp2-sft-1" || break; done

These 301 kills, each at a moment of its own, were clean on two busy cores.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from rlhf_lightning.core.checkpoint_io import damage

from ..integration import kill_worker
from ..integration.test_kill import steps
from ..integration.test_resume import assert_same

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("RLHF_LIGHTNING_KILLS", "1"))
STEPS = 8
# In which the surviving rank ends; on a quiet machine it is a second.
BOUND = 60.0
LIVES = ("", 0, 0)
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(180 + 60 * KILLS)]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that need not import everything again: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_worker.__name__])
    return context


def start(context: ForkServerContext, *args: object) -> list[BaseProcess]:
    """Two ranks that nobody looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=kill_worker.start_rank, args=(rank, port, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def exit_codes(ranks: list[BaseProcess]) -> list[int | None]:
    """Waits for two ranks that may die: the other one has ``BOUND`` seconds from then on."""
    try:
        first = multiprocessing.connection.wait([process.sentinel for process in ranks], 3 * BOUND)
        assert first, "neither rank ends"
        deadline = time.monotonic() + BOUND
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, "a rank waits for one that is dead"
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def fate(chance: random.Random, kind: str, made: int) -> tuple[str, int, int]:
    """Ends a run after so many steps, before its own end: kind, number, victim."""
    left = STEPS - made
    if kind == "step":
        return kind, made + chance.randint(1, left - 2), chance.randint(0, 1)
    writes = 2 if kind == "flush" else 1  # of each checkpoint: the file, and its entry in the folder
    return kind, chance.randint(1, writes * (left - 1)), int(kind == "peer")


def made_steps(folder: Path) -> int:
    return max(steps(folder), default=0)


def assert_nothing_half_written(folder: Path, kind: str) -> None:
    assert [damage(path) for path in (folder / "checkpoints").glob("*.ckpt")] == [None] * len(steps(folder))
    if kind == "half":
        assert damage(next((folder / "checkpoints").glob(".*.partial")))


def assert_ends_as(folder: Path, whole: Path) -> None:
    names = [f"step={n}.ckpt" for n in (STEPS - 1, STEPS)]
    for place in (folder, whole):
        assert sorted(path.name for path in (place / "checkpoints").iterdir()) == names
    found, expected = (torch.load(p / "checkpoints" / names[-1], weights_only=True) for p in (folder, whole))
    for name in ("state_dict", "optimizer_states", "post_training"):
        assert_same(found[name], expected[name], name)


@pytest.mark.parametrize(("strategy", "method", "first"), [("ddp", "dpo", 0), ("fsdp2", "sft", 0), ("fsdp2", "sft", 1)])
def test_the_other_rank_ends_and_the_run_is_taken_up(processes, tiny_model_folder, tmp_path, strategy, method, first):
    model, chance = str(tiny_model_folder()), random.Random(f"{strategy}{KILLS}")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    assert exit_codes(start(processes, method, model, str(whole), strategy, *LIVES)) == [0, 0]
    for number in range(KILLS):
        kind = ("step", "half", "peer", "flush")[(number + first) % 4]
        if made_steps(folder) > STEPS - 3:
            shutil.rmtree(folder / "checkpoints")
        before = made_steps(folder)
        (folder / "started").unlink(missing_ok=True)
        kind, at, victim = fate(chance, kind, before)
        codes = exit_codes(start(processes, method, model, str(folder), strategy, kind, at, victim))
        assert codes[victim] == -signal.SIGKILL, (kind, at, codes)
        assert codes[1 - victim] == 1, (kind, at, codes)
        assert int((folder / "started").read_text()) == before, "not the newest checkpoint"
        assert_nothing_half_written(folder, kind)
    assert exit_codes(start(processes, method, model, str(folder), strategy, *LIVES)) == [0, 0]
    assert_ends_as(folder, whole)


def named(folder: Path) -> list[int]:
    """The processes whose command line has the folder in it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.skipif("RLHF_LIGHTNING_KILLS" not in os.environ, reason="takes minutes: set RLHF_LIGHTNING_KILLS=1")
@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="processes are looked for in /proc")
def test_torchrun_leaves_no_process(processes, tiny_model_folder, tmp_path):
    model, chance = str(tiny_model_folder()), random.Random(KILLS)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    for number in range(KILLS):
        if made_steps(folder) > STEPS - 3:
            shutil.rmtree(folder / "checkpoints")
        kind, at, victim = fate(chance, ("peer", "step", "half", "flush")[number % 4], made_steps(folder))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", kill_worker.__name__, "dpo", model, str(folder), "ddp", kind, str(at), str(victim)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3 * BOUND, check=False
            )
        finally:
            left = named(folder)
            for process in left:
                os.kill(process, signal.SIGKILL)
        assert not left, f"{len(left)} processes outlive the run that started them"
        assert done.returncode == 1, done.stderr[-3000:]
        assert "SIGKILL" in done.stderr
        assert_nothing_half_written(folder, kind)
    for place in (folder, whole):
        assert exit_codes(start(processes, "dpo", model, str(place), "ddp", *LIVES)) == [0, 0]
    assert_ends_as(folder, whole)
