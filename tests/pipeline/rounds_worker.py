"""Runs a pipeline in a process that is killed; forked from one that has imported everything."""

from __future__ import annotations

import sys
from pathlib import Path

import rlhf_lightning.pipeline.kinds  # noqa: F401  imported before the fork
from rlhf_lightning.cli import main


def run(file: str, log: str) -> None:
    """Runs the pipeline of a file; its output goes to another."""
    with Path(log).open("a") as output:
        sys.stdout = sys.stderr = output
        main(["pipeline", "--config", file])
