"""Shows progress of long work outside of training steps: tokenising, scoring a reference, sampling."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
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
    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    if console.is_terminal and getattr(rank_zero_only, "rank", 0) == 0 and _starts(bar):
        try:
            task = bar.add_task(escape(what), total=total)
            for item in items:
                yield item
                bar.advance(task)
        finally:
            bar.stop()
        return

    # Logs get a line now and then instead of a bar.
    started = said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS:
            said = now
            of = f" of {total} ({number / total:.0%})" if total else ""
            rank_zero_info(f"{what}: {number}{of} in {now - started:.0f} s")


def _starts(bar: Progress) -> bool:
    """Starts a bar; returns False where another one is shown already, since only one can be live."""
    try:
        bar.start()
    except LiveError:
        return False
    return True
