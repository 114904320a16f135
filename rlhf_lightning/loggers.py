"""A plain log of metrics, one line of JSON per call; the pipeline's report draws its curves from it."""

from __future__ import annotations

import contextlib
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from .utils.files import hold, release


class JSONLLogger(Logger):
    """Appends ``{"step": 10, "train/loss": 0.7}`` to a file whenever metrics are logged.

    A later run continues the same file, after an empty line. Rows of ``validate``, ``test`` and ``predict`` are marked
    (``"run": "validate"``), to tell them from rows of training.

    Args:
        path: the file; its folder is created. A file that is not such a log is refused when a run begins.

    Example::

        lightning.Trainer(logger=JSONLLogger("runs/history.jsonl"), log_every_n_steps=10)
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._begins = True
        self._run = "fit"
        self._is_claimed = False

    def begin(self, run: str) -> None:
        """Sets the source of the following rows: ``fit``, ``validate``, ``test`` or ``predict``."""
        self._run = run

    @property
    def name(self) -> str:
        """The run's name in Lightning: the file's stem."""
        return self.path.stem

    @property
    def version(self) -> int:
        """Always 0: all runs of a file share one version."""
        return 0

    @property
    def save_dir(self) -> str:
        """The file's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a line; non-finite values are written as null."""
        self.claim()

        # JSON has no NaN and no infinity.
        row: dict[str, Any] = {"step": step} | ({} if self._run == "fit" else {"run": self._run})
        row |= {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if self._begins and file.tell():  # after another run, which may have been killed within a line
                file.write("\n\n")
            file.write(json.dumps(row) + "\n")
        self._begins = False

    @rank_zero_only
    def save(self) -> None:
        """Claims the file; Lightning calls this when a run begins.

        Raises:
            ValueError: the file is something else, or another process writes to it.
        """
        self.claim()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Releases the file for other runs; Lightning calls this when a run ends."""
        release(self.path)
        self._is_claimed = False

    def claim(self) -> None:
        """Checks that the file is a log and locks it; on the writing rank, before a run begins.

        Raises:
            ValueError: the file is something else, or another process writes to it.
        """
        if self._is_claimed:
            return
        if self.path.is_dir() or (self.path.is_file() and not _is_history(self.path)):
            raise ValueError(f"{str(self.path)!r} is not a log of metrics and is left unchanged: choose another path")
        hold(self.path)
        self._is_claimed = True

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the config is saved as YAML."""


def _is_history(path: Path) -> bool:
    """Whether a file begins like a log or is empty."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), None)
    if first is None:
        return True
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        opening = '{"step": '
        return first.startswith(opening) or opening.startswith(first.strip())  # killed within its first line
    return isinstance(row, dict) and "step" in row


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Reads a log of ``JSONLLogger``; a missing file is an empty history.

    A truncated line is skipped. Rows of a resumed run replace earlier rows of the same and later steps.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    begins = False
    for line in path.read_text(encoding="utf-8").splitlines():
        begins |= not line.strip()  # between two runs
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if "run" in row:  # not of training: replaces no rows
                rows.append(row)
                continue
            # A resumed run repeats the steps after its checkpoint: its rows replace the earlier ones.
            if begins and row["step"] is not None:
                rows = [r for r in rows if "run" in r or r["step"] is None or r["step"] < row["step"]]
                begins = False
            rows.append(row)
    return rows
