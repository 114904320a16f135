"""Runs one step and one validation of every method on the ranks that torchrun started; rank 0 saves what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.helpers import leave_together
from tests.invariance.harness import step, validate
from tests.invariance.methods import EXPERTS, METHODS, PACKED


def main(folder: str, target: str, num_rows: int, runs: list[str]) -> None:
    """Makes runs ``strategy:method``. A rank gets every ``world``-th row; with more ranks than rows, some have none."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for asked in runs:
        strategy, _, name = asked.partition(":")
        method = (METHODS | PACKED | EXPERTS)[name]
        precision = "32-true" if name in EXPERTS else "64-true"
        rows = method.rows(num_rows)
        run = {"strategy": strategy, "devices": world, "use_distributed_sampler": False}
        outcome = step(method, folder, rows[rank::world], precision, trainer_options=run, micro_batch_tokens=60)
        run["precision"] = precision
        metrics = validate(method, folder, rows, 3, trainer_options=run, rank=rank, world=world)
        results[asked] = {"updates": outcome.updates, "metrics": outcome.metrics, "validation": metrics}
    if rank == 0:
        torch.save(results, Path(target))
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
