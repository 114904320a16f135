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
from .methods import METHODS as LAID_OUT
from .methods import PACKED

METHODS = LAID_OUT | PACKED
ROOT = Path(__file__).resolve().parents[2]
# `make invariance` compares all of the matrix under FSDP2, too; otherwise one entry of every method, where ranks differ
# most in what they run.
ALL = "RLHF_LIGHTNING_ALL_RANKS" in os.environ
NUM_ROWS = [pytest.param(7, id="uneven"), pytest.param(1, id="a-rank-without-rows", marks=pytest.mark.slow)]
SHARDED = ["sft", "dpo-coupled", "kto", "process", "reward", "simpo", "grpo-coupled", "grpo-tree", "grpo-search", "ppo"]
SHARDED = [*METHODS] if ALL else [*SHARDED, *PACKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


def on_ranks(folder: str, target: Path, num_rows: int, strategy: str, methods: list[str]) -> dict[str, Any]:
    """Runs the worker on two ranks under torchrun and reads what rank 0 saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.invariance.ranks_worker", folder, str(target), str(num_rows), strategy, *methods]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=NUM_ROWS)
def copied(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    target = tmp_path_factory.mktemp("ranks") / "two.pt"
    return request.param, on_ranks(folder, target, request.param, "ddp", [*METHODS])


@pytest.fixture(scope="module", params=NUM_ROWS)
def sharded(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    target = tmp_path_factory.mktemp("ranks") / "two.pt"
    return request.param, on_ranks(folder, target, request.param, "fsdp2", SHARDED)


def assert_like_one_rank(method: str, results: tuple[int, Any], folder: str) -> None:
    rows = METHODS[method].rows(results[0])
    found = results[1][method]
    expected = step(METHODS[method], folder, rows)
    assert_same(Outcome(found["updates"], found["metrics"]), expected, TOLERANCE["64-true"])
    # In batches of three: of the last one a rank has no row.
    assert_same_metrics(found["validation"], validate(METHODS[method], folder, rows, 3), TOLERANCE["64-true"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.timeout(900)
def test_two_ranks(method: str, copied: tuple[int, Any], folder: str) -> None:
    assert_like_one_rank(method, copied, folder)


@pytest.mark.parametrize("method", SHARDED)
@pytest.mark.timeout(900)
def test_two_ranks_that_share_the_weights(method: str, sharded: tuple[int, Any], folder: str) -> None:
    assert_like_one_rank(method, sharded, folder)
