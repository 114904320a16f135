"""A plain log of metrics, one line of JSON per call: what the pipeline's report draws its curves from."""

from __future__ import annotations

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
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the config is saved as YAML."""


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Reads what ``JSONLLogger`` wrote; a file that is not there is an empty history."""
    path = Path(path)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
