"""Shows progress of long work outside of training steps: tokenising, scoring a reference, sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_SECONDS = 30.0  # between two lines without a terminal


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields items and shows progress: by a bar on a terminal, else by a line every half minute.

    Args:
        items: the items.
        what: description of the work, such as ``tokenizing rows.jsonl``.
        total: number of items, if they have no length.

    Example:
        >>> list(progress([1, 2, 3], "counting"))
        [1, 2, 3]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counting(what, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def counting(what: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[], None]]:
    """Shows the progress of work that is done in any order, and how long the rest may take.

    Args:
        what: description of the work.
        total: number of its parts, if known.
        done: parts that were done before, which tell nothing of how long the others take.

    Returns:
        A function to call after each part.

    Example:
        >>> with counting("counting", total=2) as advance:
        ...     advance()
    """
    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    if console.is_terminal and getattr(rank_zero_only, "rank", 0) == 0 and _starts(bar):
        try:
            task = bar.add_task(escape(what), total=total, completed=done)
            yield lambda: bar.advance(task)
        finally:
            bar.stop()
        return

    # Logs get a line now and then instead of a bar.
    started = said = time.monotonic()
    number = done

    def advance() -> None:
        nonlocal said, number
        number += 1
        now = time.monotonic()
        if now - said >= _SECONDS:
            said = now
            rank_zero_info(f"{what}: {_line(number, total, done, now - started)}")

    yield advance


def _line(number: int, total: int | None, done: int, seconds: float) -> str:
    """Says how much is done, and when the rest may be.

    Example:
        >>> _line(30, 50, 10, 40.0)
        '30 of 50 (60%) in 40 s, about 40 s left'
    """
    if not total:
        return f"{number} in {seconds:.0f} s"
    left = (total - number) * seconds / (number - done)
    return f"{number} of {total} ({number / total:.0%}) in {seconds:.0f} s, about {left:.0f} s left"


def _starts(bar: Progress) -> bool:
    """Starts a bar; returns False where another one is shown already, since only one can be live."""
    try:
        bar.start()
    except LiveError:
        return False
    return True
