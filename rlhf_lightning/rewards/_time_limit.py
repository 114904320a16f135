"""Calls a function with a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class CallTimeoutError(Exception):
    """A call exceeded its time limit."""


class _TimeIsUp(BaseException):
    """Raised inside the call; not an ``Exception``, so that the call's own handlers do not catch it."""


def call_with_limit(function: Callable[[], Any], seconds: float | None) -> Any:
    """Calls a function and gives up after a time limit.

    On the main thread an alarm interrupts the call, wherever it is in Python or in a system call, and the call keeps
    its thread's state (gradients off, device, autocast). Other threads have no alarms: the call runs on a new thread,
    which is abandoned when time is up. Neither interrupts compiled code that does not return to the interpreter; calls
    that may run such code need a separate process.

    Args:
        function: called without arguments.
        seconds: above 0; ``None`` waits for ever.

    Returns:
        The function's return value.

    Raises:
        CallTimeoutError: when time is up. Other exceptions of the function are raised unchanged.
    """
    if seconds is None:
        return function()
    # Only the main thread receives signals; elsewhere the call is abandoned, not interrupted.
    if threading.current_thread() is threading.main_thread():
        return _call_under_alarm(function, seconds)
    return _call_on_thread(function, seconds)


def _call_under_alarm(function: Callable[[], Any], seconds: float) -> Any:
    def time_is_up(signum: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    # The caller may have an alarm of its own, such as a test's time limit: it is restored.
    previous_handler = signal.signal(signal.SIGALRM, time_is_up)
    previous_timer = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        # Repeats every second, for a call that swallows even this.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        try:
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUp:
        raise CallTimeoutError(f"took longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        if previous_timer[0] > 0:
            signal.setitimer(signal.ITIMER_REAL, *previous_timer)


def _call_on_thread(function: Callable[[], Any], seconds: float) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise CallTimeoutError(f"took longer than {seconds:g} s")
    succeeded, value = outcome[0]
    if succeeded:
        return value
    raise value
