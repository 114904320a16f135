"""Starts, watches, kills and cleans up a process in a sandbox, with all its children."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from .inside.frames import ProtocolError, receive
from .isolation import Limits, Plan

_MAX_FILES: Final = 10_000
_MAX_DEPTH_OF_PATH: Final = 2000  # characters


class Sandboxed:
    """An interpreter in a sandbox.

    Args:
        role: ``script``, ``calls`` or ``judge``; see ``inside/start.py``.
        plan: how it is isolated.
        limits: its resource limits.
        stdin: a file to read from.
        stdout: a file or pipe to write to.

    Attributes:
        control: the descriptor that sends it its work.
    """

    def __init__(
        self, role: str, plan: Plan, limits: Limits, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.DEVNULL
    ) -> None:
        self._limits = limits
        self.folder: Path | None = None
        if plan.isolation != "bubblewrap":
            self.folder = Path(tempfile.mkdtemp(prefix="program-"))
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                plan.command(role, theirs.fileno(), limits, self.folder),
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=self.folder or "/",
                env=plan.environment(self.folder),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            self._remove_folder()
            raise
        finally:
            theirs.close()
        self.control = ours.detach()

    def __enter__(self) -> Sandboxed:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Waits until it has dropped its privileges.

        Raises:
            RuntimeError: it does not get there.
        """
        if not wait_for(self.control, time.monotonic() + seconds):
            raise RuntimeError(f"the sandbox does not start within {seconds:g} s")
        try:
            receive(self.control)
        except (EOFError, OSError, ProtocolError):
            code = self.end()
            raise RuntimeError(
                f"the sandbox does not start with memory_mb={self._limits.memory_mb}: it ends with status {code}"
            ) from None

    def is_beyond_limits(self) -> bool:
        """Whether all processes together exceed the limits on memory, files or processes."""
        processes = _descendants(self.process.pid)
        if len(processes) > self._limits.processes + 4:  # 4 more for the sandbox itself
            return True
        if sum(map(_memory_kb, processes)) > self._limits.memory_mb * 1024:
            return True
        if self.folder is not None:
            return _is_larger(self.folder, self._limits.disk_mb * 2**20)
        with contextlib.suppress(OSError):  # it may be gone by now
            room = os.statvfs(f"/proc/{processes[-1]}/root/tmp")
            return room.f_files - room.f_ffree > _MAX_FILES
        return False

    def has_ended(self) -> bool:
        """Whether its first process has ended."""
        if not hasattr(os, "waitid"):
            return self.process.poll() is not None
        # WNOWAIT leaves it a zombie, so that its id is not reused before its group is killed.
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> int:
        """Kills it and all that it has started; returns the status of its first process."""
        if self.process.returncode is None:
            # Its group: the sandbox's own process, which takes all others with it, or all of the program's processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def close(self) -> None:
        """Kills it, and removes the files that it has written."""
        self.end()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.control >= 0:
            os.close(self.control)
            self.control = -1
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self.folder is not None:
            remove_tree(self.folder)


def wait_for(descriptor: int, deadline: float) -> bool:
    """Waits until there is something to read, at most until ``deadline`` (``time.monotonic``); returns whether."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))


def _descendants(pid: int) -> list[int]:
    """The ids of a process and its visible descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def _memory_kb(pid: int) -> int:
    """A process's own memory and the shared memory that it has mapped, in KiB."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return 0


def _is_larger(folder: Path, size: int) -> bool:
    """Whether the files of a folder that is being written exceed ``size`` bytes or the maximum number."""
    waiting, files = [str(folder)], 0
    while waiting:
        place = waiting.pop()
        if len(place) > _MAX_DEPTH_OF_PATH:
            return True
        with contextlib.suppress(OSError):
            for entry in os.scandir(place):
                files += 1
                with contextlib.suppress(OSError):
                    size -= entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if files > _MAX_FILES or size < 0:
                    return True
    return False


def remove_tree(folder: Path) -> None:
    """Removes a folder that no process writes to any more, whatever its depth and modes.

    Folders within folders are moved up to the top first, so that no path is too long and nothing recurses.
    """
    number = 0
    with contextlib.suppress(FileNotFoundError):
        os.chmod(folder, 0o700)
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for child in list(os.scandir(entry.path)):
                    if child.is_dir(follow_symlinks=False):
                        os.chmod(child.path, 0o700)  # moving a folder writes to it
                        number += 1
                        os.rename(child.path, folder / f".removed-{number}")
                    else:
                        os.unlink(child.path)
                os.rmdir(entry.path)
        os.rmdir(folder)
