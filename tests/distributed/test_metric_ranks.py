"""Metrics on two ranks, one of them without rows of some, are those of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.metrics.test_over_ranks import CASES, ROWS, values

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(200)]
# Rows of the first rank: most of them, and all.
SHARES = (7, ROWS)


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for case, (make, rows, _) in CASES.items():
        for share in SHARES:
            metric = make()
            own = slice(0, share) if rank == 0 else slice(share, ROWS)
            if own.start < own.stop:
                metric.update(*(column[own] for column in rows))
            found[case, share] = values(metric.compute())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    mp.spawn(on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    for case, (make, rows, _) in CASES.items():
        one = make()
        one.update(*rows)
        for share in SHARES:
            assert first[case, share] == pytest.approx(values(one.compute()), rel=1e-12), (case, share)
