"""Rows of earlier rounds that are trained on again, drawn by the buffer of GRPO and PPO."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, ClassVar, Literal, NamedTuple

from ..rl.priority_buffer import PriorityBuffer
from ..utils.files import json_line
from ..utils.option_groups import OptionGroup, build_group
from ..utils.validation import check_count, check_positive
from .row_makers import Row
from .samples import ScoredPrompt


@dataclass(frozen=True, kw_only=True)
class RowReplay(OptionGroup):
    """Mixes rows of earlier rounds with those of this one: each with its provenance, and its ``round`` in it.

    A replayed row was drawn by the model of its own round: it is off-policy by as many accepted rounds as it is old.

    Args:
        capacity: rows in the buffer, at least 1; those of the highest priority stay, of equals the newest.
        share: replayed rows for each new one, above 0; fewer while the buffer has fewer.
        priority: ``uniform``; ``frontier``: the standard deviation of the scores that its prompt's samples had, which
            is largest where the model succeeds half of the time, and without which a row does not come back. Rows are
            drawn in proportion.
        max_age: rounds after which a row leaves, at least 1; ``None`` for no limit.
        rejected: whether rows of rejected rounds come back, too. Their samples are the accepted model's own, but what
            was trained on them was not better.
        round: number of this round, from 1; the stage ``rounds`` gives it.
        rows: the buffer that an earlier round has left, ``None`` for none; the stage ``rounds`` gives it.

    Raises:
        ValueError: an option out of its range.
    """

    group: ClassVar[str] = "replay"

    capacity: int = 1000
    share: float = 0.25
    priority: Literal["uniform", "frontier"] = "uniform"
    max_age: int | None = None
    rejected: bool = False
    round: int = 1
    rows: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("replay.capacity", self.capacity, "1000 is usual")
        check_positive("replay.share", self.share, "0.25 is usual")
        if self.max_age is not None:
            check_count("replay.max_age", self.max_age, "null is no limit")
        check_count("replay.round", self.round, "in the body of rounds it is given")


def read_replay(written: Any) -> RowReplay:
    """Makes the options of replay.

    Raises:
        ValueError: naming the option, its value and what is allowed.

    Example:
        >>> read_replay({"capacity": 100, "shar": 0.5})
        Traceback (most recent call last):
        ValueError: replay has no option 'shar'; did you mean 'share'?
    """
    try:
        return build_group(written, RowReplay)
    except TypeError as error:
        raise ValueError(str(error)) from error


class KeptRow(NamedTuple):
    """A row in the buffer."""

    iteration: int
    priority: float
    row: Row


def priority_of(scored: ScoredPrompt, kind: Literal["uniform", "frontier"]) -> float:
    """Computes how much the rows of a prompt deserve to come back, at least 0.

    Example:
        >>> from .samples import Sample
        >>> drawn = (Sample("#4", 1.0), Sample("#5", 0.0), Sample("#6", None))
        >>> round(priority_of(ScoredPrompt("2+2=?", drawn), "frontier"), 4)
        0.7071
    """
    if kind == "uniform":
        return 1.0
    scores = [sample.score for sample in scored.samples if sample.score is not None and math.isfinite(sample.score)]
    return stdev(scores) if len(scores) > 1 else 0.0


def exchange(
    rows: Sequence[tuple[Row, float]], before: Sequence[KeptRow], options: RowReplay, *, seed: int
) -> tuple[list[Row], list[KeptRow]]:
    """Draws rows of earlier rounds, and then keeps those of this one.

    No row comes twice: of rows that differ in nothing but their provenance, the newest is in the buffer, and one that
    this round has made itself is not drawn.

    Args:
        rows: of this round, with their priorities; what has none is not kept.
        before: the buffer that the round before has left.
        options: capacity, share, maximum age and number of the round.
        seed: of the draw, which also depends on the round.

    Returns:
        The drawn rows, in the order in which they were made, and the buffer for the next round.

    Example:
        >>> old = KeptRow(1, 1.0, {"prompt": "a", "completion": "b", "provenance": {"seed": 3}})
        >>> new = {"prompt": "c", "completion": "d", "provenance": {"seed": 4}}
        >>> drawn, kept = exchange([(new, 1.0)], [old], RowReplay(capacity=9, share=1.0, round=2), seed=0)
        >>> drawn, [record.iteration for record in kept]
        ([{'prompt': 'a', 'completion': 'b', 'provenance': {'seed': 3, 'round': 1}}], [1, 2])
    """
    new: dict[str, KeptRow] = {}
    for row, priority in rows:
        new.setdefault(_content(row), KeptRow(options.round, priority, row))
    buffer = PriorityBuffer[KeptRow](options.capacity, seed, max_age=options.max_age)
    buffer.records = [record for record in before if _content(record.row) not in new]
    drawn = buffer.draw(int(options.share * len(rows)), options.round)
    buffer.add([record for record in new.values() if record.priority > 0])
    return [_replayed(record) for record in drawn], buffer.records


def _content(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "provenance"}, sort_keys=True)


def _replayed(record: KeptRow) -> Row:
    return record.row | {"provenance": {**record.row["provenance"], "round": record.iteration}}


def read_kept(file: str | Path) -> list[KeptRow]:
    """Reads the buffer that ``kept_lines`` has written.

    Raises:
        ValueError: it is another file.
    """
    found = []
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                written = json.loads(line)
                found.append(KeptRow(int(written["round"]), float(written["priority"]), dict(written["row"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {str(file)!r} is no row with its round and priority: give the replay.jsonl of "
                    "an earlier stage with replay"
                ) from error
    return found


def kept_lines(records: Iterable[KeptRow]) -> str:
    """Writes a buffer as JSON lines."""
    return "".join(
        json_line({"round": record.iteration, "priority": record.priority, "row": record.row}) for record in records
    )
