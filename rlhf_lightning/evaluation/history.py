"""The history of an output folder: a line per result, with the score of every prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..utils.files import json_line, write_atomically
from .results import PairedResult, TaskResult, compare_scores

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class HistoryEntry:
    """One result of the past.

    Attributes:
        id: of all that the result holds but the times that it took.
        time: when it was written, in UTC.
        suite: name of the suite.
        task: name of the task.
        model: name of the model.
        seed: of samples.
        metrics: all numbers.
        scores: of every prompt with a verdict, by row.
        model_hash: of the model's contents; ``None`` where it is not known.
    """

    id: str
    time: str
    suite: str
    task: str
    model: str
    seed: int
    metrics: dict[str, float]
    scores: dict[str, float]
    model_hash: str | None = None

    @classmethod
    def of(cls, result: TaskResult, suite: str, seed: int) -> HistoryEntry:
        """Makes the entry of a result, with the time of now."""
        written = {name: value for name, value in result.as_dict().items() if not name.endswith("seconds")}
        name = hashlib.sha256(json.dumps(written, sort_keys=True, default=str).encode()).hexdigest()[:16]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        of = result.task.name, result.model, seed, result.metrics, result.scores, result.model_hash
        return cls(name, now, suite, *of)

    def compare(self, baseline: HistoryEntry, *, seed: int = 0) -> PairedResult:
        """Compares it with an earlier result, on the prompts that both have; see ``results.compare``.

        Raises:
            ValueError: fewer than two prompts have verdicts in both.
        """
        names = (self.task, self.model, baseline.model)
        return compare_scores(self.scores, baseline.scores, *names, seed=seed)


def read_history(place: str | Path) -> list[HistoryEntry]:
    """Reads a history.

    Args:
        place: an output folder of an evaluation, or its ``history.jsonl``.

    Returns:
        The entries in the order in which they were written.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is damaged.

    Example::

        *_, before, now = read_history("report")
        print(now.compare(before).comparison)
    """
    path = Path(place).expanduser()
    path = path / HISTORY if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no {HISTORY} in {str(place)!r}: pass the output folder of an evaluation")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no result of an evaluation: {error}") from error
    return entries


def remember(path: Path, results: Iterable[TaskResult], suite: str, seed: int) -> None:
    """Appends an entry for each result that the history does not have.

    Args:
        path: the history; is made if it does not exist.
        results: new results.
        suite: name of their suite.
        seed: of their samples.
    """
    entries = read_history(path) if path.is_file() else []
    known = {entry.id for entry in entries}
    for entry in (HistoryEntry.of(result, suite, seed) for result in results):
        if entry.id not in known:
            entries.append(entry)
    write_atomically(path, "".join(json_line(asdict(entry)) for entry in entries))


def _entry(written: Mapping[str, Any]) -> HistoryEntry:
    return HistoryEntry(**written)
