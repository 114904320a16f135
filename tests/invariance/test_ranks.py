"""One rank and two ranks make the same step on the same global batch, and log the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..helpers import save_tiny_model
from .harness import TOLERANCE, Outcome, assert_same, assert_same_metrics, step, validate
from .methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


def on_ranks(folder: str, target: Path, world: int, num_rows: int) -> dict[str, Any]:
    """Runs the worker under torchrun and reads what rank 0 saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "tests.invariance.ranks_worker", folder, str(target), str(num_rows)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[7, 1], ids=["uneven", "a-rank-without-rows"])
def both(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    return request.param, on_ranks(folder, tmp_path_factory.mktemp("ranks") / "two.pt", 2, request.param)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.timeout(900)
def test_two_ranks(method: str, both: tuple[int, Any], folder: str) -> None:
    num_rows, results = both
    rows = METHODS[method].rows(num_rows)
    found = results[method]
    expected = step(METHODS[method], folder, rows)
    assert_same(Outcome(found["updates"], found["metrics"]), expected, TOLERANCE["64-true"])
    assert_same_metrics(found["validation"], validate(METHODS[method], folder, rows, 3), TOLERANCE["64-true"])
