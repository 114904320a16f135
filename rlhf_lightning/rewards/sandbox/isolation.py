"""Isolates programs from the rest of the machine, by the means that work on it."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

from .inside.confine import LANDLOCK_ABI, landlock_abi

Isolation = Literal["bubblewrap", "landlock", "none"]
IsolationChoice = Literal["auto", "bubblewrap", "landlock", "none"]

INSIDE: Final = Path(__file__).with_name("inside")
_SYSTEM: Final = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix/store", "/gnu/store")
_SETTINGS: Final = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
# Within bubblewrap: the folder of the scripts, and a program's working folder.
_SCRIPTS, _FOLDER = "/run/sandbox", "/tmp"
_LAUNCH: Final = "import sys; sys.path.insert(0, sys.argv[2]); from inside.start import main; main()"


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program and all its processes.

    Args:
        memory_mb: megabytes of address space for each process, and of memory for all of them.
        disk_mb: megabytes of files.
        processes: processes and threads at a time.
        cpu_seconds: seconds of computing for each process.
    """

    memory_mb: int
    disk_mb: int
    processes: int
    cpu_seconds: int


@dataclass(frozen=True)
class Plan:
    """How a program is isolated on this machine.

    Args:
        isolation: the means.
        drops_user: root switches to a user that owns nothing before the program begins.
    """

    isolation: Isolation
    drops_user: bool

    def command(self, role: str, control: int, limits: Limits, folder: Path | None) -> list[str]:
        """The command that starts an interpreter in the sandbox.

        Args:
            role: ``script``, ``calls`` or ``judge``.
            control: the descriptor that sends it its work.
            limits: its resource limits.
            folder: the folder that it may write to; bubblewrap provides its own.
        """
        user = 2**30 + secrets.randbelow(2**29) if self.drops_user else None
        if user is not None and folder is not None:
            os.chown(folder, user, user)
        inside = _SCRIPTS if self.isolation == "bubblewrap" else str(INSIDE.parent)
        spec = {
            "role": role,
            "control": control,
            "isolation": self.isolation,
            "user": user,
            "limits": self._resource_limits(limits),
            "readable": [*_SYSTEM, *_SETTINGS, *_roots(), str(INSIDE), "/sys/devices/system/cpu"],
            "writable": [] if folder is None else [str(folder)],
            "inside": inside,
            "packages": _packages(),
            "trainer": os.getpid(),
        }
        python = [sys.executable, "-I", "-S", "-B", "-c", _LAUNCH, json.dumps(spec), inside]
        return python if self.isolation != "bubblewrap" else [*self._bubblewrap(limits), "--", *python]

    def _resource_limits(self, limits: Limits) -> dict[str, int]:
        found = {
            "RLIMIT_AS": limits.memory_mb * 2**20,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_FSIZE": limits.disk_mb * 2**20,
            "RLIMIT_NOFILE": 128,
            "RLIMIT_CORE": 0,
        }
        # The limit counts processes by user: set it for a separate user, or where the kernel counts by namespace.
        if self.drops_user or (self.isolation == "bubblewrap" and os.geteuid() != 0 and _counts_by_namespace()):
            found["RLIMIT_NPROC"] = limits.processes
        return found

    def _bubblewrap(self, limits: Limits) -> list[str]:
        size = str(limits.disk_mb * 2**20)
        command = [str(shutil.which("bwrap")), "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        command += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--unshare-cgroup-try"]
        if self.drops_user:
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        for place in _SYSTEM:
            if Path(place).is_symlink():
                command += ["--symlink", os.readlink(place), place]
            else:
                command += ["--ro-bind-try", place, place]
        for place in _SETTINGS:
            command += ["--ro-bind-try", place, place]
        # A private /proc, read-only: the kernel's settings are files that root could write even without capabilities.
        command += ["--proc", "/proc", "--remount-ro", "/proc"]
        command += ["--dev", "/dev", "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
        command += ["--remount-ro", "/dev", "--perms", "1777", "--size", size, "--tmpfs", _FOLDER]
        made: set[Path] = set()
        for root in (*_roots(), f"{_SCRIPTS}/inside"):
            # Parent folders that bubblewrap creates implicitly would be private: create them readable for all.
            for ancestor in reversed(Path(root).parents[:-1]):
                if ancestor not in made and str(ancestor) != _FOLDER and not _is_below(str(ancestor), _SYSTEM):
                    command += ["--perms", "0755", "--dir", str(ancestor)]
                    made.add(ancestor)
            command += ["--ro-bind", str(INSIDE) if root.startswith(_SCRIPTS) else root, root]
        return [*command, "--chdir", _FOLDER, "--remount-ro", "/"]

    def environment(self, folder: Path | None) -> dict[str, str]:
        """The environment variables of a program: none of this process's."""
        place = str(folder or _FOLDER)
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": place, "TMPDIR": place, **threads}


def resolve_isolation(choice: IsolationChoice) -> Isolation:
    """Chooses the isolation of programs on this machine, and logs it.

    ``bubblewrap``
        https://github.com/containers/bubblewrap: separate namespaces for processes, files, network, IPC and names.
        Programs see the system and the interpreter, read-only, and an empty folder in memory; nothing of them is left.
    ``landlock``
        Linux 6.12 or later, without bubblewrap: Landlock restricts the files that programs can open and keeps their
        signals among themselves; a filter of system calls refuses sockets and new sessions.
    ``none``
        Only limits on time, memory and processes: programs can do whatever the user can.

    Args:
        choice: one of these; ``auto`` takes the first of bubblewrap and landlock that works here.

    Returns:
        The chosen isolation.

    Raises:
        ValueError: the choice does not work here; ``auto`` never falls back to ``none``.
    """
    if choice not in get_args(IsolationChoice):
        raise ValueError(f"isolation={choice!r} is not allowed: use one of {', '.join(get_args(IsolationChoice))}")
    return plan(choice).isolation


@functools.cache
def plan(choice: IsolationChoice) -> Plan:
    """Makes the plan of :func:`resolve_isolation`."""
    if choice == "none":
        rank_zero_warn("isolation: none: programs can do whatever this user can; only time and memory are limited")
        return Plan("none", drops_user=False)
    problems = []
    for candidate in _candidates(choice):
        problem = _problem(candidate)
        if problem is None:
            rank_zero_info(f"isolation: programs run within {candidate.isolation}")
            return candidate
        problems.append(problem)
    raise ValueError(
        f"isolation={choice!r} does not work here ({'; '.join(dict.fromkeys(problems))}), and what a model wrote is "
        "not run without: install bubblewrap (apt-get install bubblewrap), or write isolation: none where nothing on "
        "this machine is worth keeping"
    )


def _candidates(choice: IsolationChoice) -> list[Plan]:
    is_superuser = hasattr(os, "geteuid") and os.geteuid() == 0
    found = []
    if choice in ("auto", "bubblewrap"):
        if is_superuser and all(map(_is_for_all, _roots())):
            found.append(Plan("bubblewrap", drops_user=True))
        found.append(Plan("bubblewrap", drops_user=False))
    if choice in ("auto", "landlock"):
        places = {ancestor for root in (*_roots(), str(INSIDE)) for ancestor in (root, *map(str, Path(root).parents))}
        found.append(Plan("landlock", drops_user=is_superuser and all(map(_is_for_all, places))))
    return found


def _problem(candidate: Plan) -> str | None:
    """Tries a plan; returns why it does not work here, or ``None``."""
    if candidate.isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    if candidate.isolation == "landlock" and (abi := landlock_abi()) < LANDLOCK_ABI:
        return f"Landlock has the ABI {abi} and not {LANDLOCK_ABI}, as of Linux 6.12"
    from .process import Sandboxed  # which needs this module

    try:
        with Sandboxed("script", candidate, Limits(512, 8, 8, 10)) as process:
            process.wait_until_ready(20.0)
    except (OSError, RuntimeError) as error:
        return f"{candidate.isolation} fails: {error}"
    return None


def _is_for_all(path: str) -> bool:
    """Whether all users may read a folder."""
    return os.stat(path).st_mode & 0o005 == 0o005


def _is_below(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


@functools.cache
def _roots() -> tuple[str, ...]:
    """Folders of the interpreter and its packages outside the system folders."""
    found = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), *_packages()]
    hop = sys.executable
    for _ in range(16):
        found.append(str(Path(hop).parent.parent))
        if not os.path.islink(hop):
            break
        hop = os.path.join(os.path.dirname(hop), os.readlink(hop))
    found = [os.path.abspath(path) for path in found if os.path.isdir(path)]
    outermost = [p for p in dict.fromkeys(found) if not _is_below(p, _SYSTEM)]
    return tuple(p for p in outermost if p != "/" and not any(p != q and _is_below(p, [q]) for q in outermost))


@functools.cache
def _packages() -> list[str]:
    """Folders of installed packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


def _counts_by_namespace() -> bool:
    major, minor = (int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return (major, minor) >= (5, 14)
