"""Entry point in a sandbox: drops privileges, reports that it is ready, and becomes a program or a judge."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import types
from typing import Any, Final

from .confine import confine
from .frames import receive, send

_DIE_WITH_PARENT: Final = 1


def main() -> None:
    """Reads its specification from the command line and its work from a descriptor."""
    spec = json.loads(sys.argv[1])
    control, role = spec["control"], spec["role"]
    # Import now: a program's process may not read these files later.
    serve_judge: Any = None
    serve_calls: Any = None
    if role == "judge":
        from .judge import serve as serve_judge
    elif role == "calls":
        from .calls import serve as serve_calls
    sys.path[:] = [*(path for path in sys.path if path != spec["inside"]), *spec["packages"]]
    if spec["isolation"] != "bubblewrap":
        _supervise(spec["trainer"])
    confine(spec)
    send(control, {"ready": True})
    if serve_judge is not None:
        serve_judge(control)
    else:
        _run_program(control, serve_calls)


def _supervise(trainer: int) -> None:
    """Continues in a child; the parent kills the group of both when the child ends or the trainer is gone."""
    group = os.getpgrp()
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(group, signal.SIGKILL))
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != trainer:
        os.killpg(group, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    os.closerange(0, 256)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if 0 <= code <= 125 else 125)


def _run_program(control: int, serve_calls: Any) -> None:
    """Runs a program as a script, and then answers for it, if calls follow."""
    program = receive(control)["program"]
    if serve_calls is None:
        os.close(control)
    main_module = types.ModuleType("__main__")
    path = os.path.join(os.getcwd(), "program.py")
    main_module.__dict__.update(__file__=path, __builtins__=__builtins__)
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(program)
    sys.modules["__main__"], sys.argv = main_module, [path]
    sys.path.insert(0, os.getcwd())
    try:
        exec(compile(program, path, "exec"), main_module.__dict__)
    except SystemExit as error:
        if serve_calls is None or error.code not in (None, 0):
            raise
    if serve_calls is not None:
        serve_calls(control, main_module.__dict__)
        os._exit(0)
