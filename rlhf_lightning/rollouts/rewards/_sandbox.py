"""Runs a program that nobody has read; run as a script by ``CodeTestsReward``.

Arguments: the descriptor to read the job from and the one to report to. A report is a line that starts with the job's
token, which the program does not know.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event: positions of the paths among its arguments, which must lie in the working folder.
_PATH_EVENTS = {
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (0, 1),
    "os.mkdir": (0,),
    "os.mkfifo": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.setxattr": (0,),
    "os.symlink": (0, 1),
    "os.truncate": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
_AF_UNIX = 1
_REFUSED = ("subprocess.", "pty.", "socket.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill")
_REFUSED_EXACTLY = frozenset({"os.system", "os.startfile", "os.chroot", "os.mount", "syslog.openlog", "fcntl.ioctl"})


def _limit(memory_mb: int, seconds: int, file_mb: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory_mb * 2**20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_mb * 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _install_guard(folder: str) -> None:
    """Refuses network, other processes, and writing outside the folder, for the rest of this interpreter's life."""
    realpath, join, separator = os.path.realpath, os.path.join, os.sep

    def is_inside(path: Any, dir_fd: Any) -> bool:
        if isinstance(path, int):
            return True  # already open
        if isinstance(dir_fd, int) and dir_fd >= 0:
            path = join(f"/proc/self/fd/{dir_fd}", os.fsdecode(path))
        resolved = realpath(os.fsdecode(path))
        return resolved == folder or resolved.startswith(folder + separator)

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITE_FLAGS) if isinstance(flags, int) else any(c in (mode or "") for c in "wax+")
            if writes and not is_inside(path, None) and os.fspath(path) != os.devnull:
                raise PermissionError(f"no writing outside the working folder: {path!r}")
        elif event in _PATH_EVENTS:
            dir_fd = next((a for a in arguments[1:] if isinstance(a, int) and a >= 0), None)
            if not all(is_inside(arguments[n], dir_fd) for n in _PATH_EVENTS[event]):
                raise PermissionError(f"no {event} outside the working folder: {arguments[0]!r}")
        elif event == "socket.__new__" and arguments[1] == _AF_UNIX:
            pass  # an event loop's pair of sockets; connecting one is refused
        elif event.startswith("ctypes."):
            raise ImportError("ctypes is switched off here")
        elif event in _REFUSED_EXACTLY or event.startswith(_REFUSED):
            raise PermissionError(f"{event} is switched off here")

    sys.addaudithook(guard)


def main() -> None:
    """Reads the job, gives up what it must not have, and runs program and tests."""
    job_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(job_fd, "rb") as stream:
        job = json.loads(stream.read())
    token, folder = job["token"], os.path.realpath(os.curdir)
    # Bound here, so that a program that replaces the builtins does not decide how it is judged.
    run, build, write = exec, compile, os.write

    def report(what: str) -> None:
        write(report_fd, f"{token} {what}\n".encode())

    _limit(job["memory_mb"], job["cpu_seconds"], job["file_mb"])
    report("ready")
    _install_guard(folder)
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        run(build(job["program"], "program.py", "exec"), names)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    sys.stdout.flush()
    report("ran")
    for test in job["tests"]:
        try:
            run(build(test, "test.py", "exec"), dict(names))
        except BaseException:
            report("failed")
        else:
            report("passed")


if __name__ == "__main__":
    main()
