"""A plain log of metrics, one line of JSON per call: what the pipeline's report draws its curves from."""

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


class JSONLLogger(Logger):
    """Appends ``{"step": 10, "train/loss": 0.7}`` to a file whenever metrics are logged.

    Args:
        path: the file; its folder is made.

    Example::

        lightning.Trainer(logger=JSONLLogger("runs/history.jsonl"), log_every_n_steps=10)
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._begins = True

    @property
    def name(self) -> str:
        """What Lightning calls the run."""
        return self.path.stem

    @property
    def version(self) -> int:
        """Every run of a file is the same one."""
        return 0

    @property
    def save_dir(self) -> str:
        """The file's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a line; what is not a finite number is written as null."""
        row: dict[str, Any] = {"step": step}
        row |= {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if self._begins and file.tell():  # after another run, which may have been killed within a line
                file.write("\n\n")
            file.write(json.dumps(row) + "\n")
        self._begins = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the config is saved as YAML."""


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Reads what ``JSONLLogger`` wrote; a file that is not there is an empty history.

    A line that was cut off is left out. Where a run was resumed, what it logged takes the place of what had been logged
    of the same steps and later ones.
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
            if begins and row["step"] is not None:
                rows = [before for before in rows if before["step"] is None or before["step"] < row["step"]]
                begins = False
            rows.append(row)
    return rows
