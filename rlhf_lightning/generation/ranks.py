"""Ranks of a command that torchrun started in several processes: each works on its share, with a copy of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ..core.trainer_checks import launched_processes

# Ranks wait for each other at the beginning and at the end, when the slowest has finished.
_PATIENCE = timedelta(days=30)


@contextmanager
def joined_ranks(command: str) -> Iterator[tuple[int, int]]:
    """Joins the processes of a launcher; yields this one's rank and their number, ``(0, 1)`` of one alone.

    Raises:
        ValueError: they were not started by torchrun.

    Example:
        >>> with joined_ranks("generate") as (rank, world_size):
        ...     rank, world_size
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    launched = launched_processes()
    if launched is None:
        yield 0, 1
        return
    launcher, number = launched
    if launcher != "torchrun":
        raise ValueError(
            f"{command} shares prompts among processes of torchrun, and {launcher} started {number}: start it with "
            f"torchrun --nproc-per-node={number} -m rlhf_lightning {command} ..."
        )
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield int(os.environ["RANK"]), number
    finally:
        dist.destroy_process_group()
