"""One rank and two ranks make the same step on the same global batch, and log the same."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterable
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
NUM_ROWS = [pytest.param(7, id="uneven"), pytest.param(1, id="a-rank-without-rows", marks=pytest.mark.slow)]
# Of every method one entry is fast, where ranks differ most in what they run. Under FSDP2 a step takes three times as
# long: these are one of every kind of weights, a policy, one with a reference, heads, trees, a critic, slots.
COPIED = ["sft", "dpo-coupled", "kto", "process", "reward", "simpo", "grpo-coupled", "grpo-tree", "grpo-search", "ppo"]
SHARDED = ["sft", "dpo-coupled", "reward", "grpo-tree", "ppo", "compression"]
# `make invariance` compares all of the matrix under FSDP2, too.
ALL = "RLHF_LIGHTNING_ALL_RANKS" in os.environ


def runs_of(strategy: str, methods: Iterable[str], fast: list[str]) -> list[Any]:
    """Parameters, named by their methods: the runs ``strategy:method``, slow except the fast ones."""
    return [
        pytest.param(f"{strategy}:{name}", id=name, marks=() if name in fast else pytest.mark.slow) for name in methods
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


def on_ranks(folder: str, target: Path, num_rows: int, runs: list[str]) -> dict[str, Any]:
    """Runs the worker on two ranks under torchrun and reads what rank 0 saved of each run ``strategy:method``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.invariance.ranks_worker", folder, str(target), str(num_rows), *runs]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=NUM_ROWS)
def ranks(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    """The number of rows, and the results of all runs that this session asks for: processes are started once."""
    functions = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in functions if isinstance(item, pytest.Function)]
    runs = [params["run"] for params in asked if params["ranks"] == request.param]
    return request.param, on_ranks(folder, tmp_path_factory.mktemp("ranks") / "two.pt", request.param, runs)


@functools.cache
def on_one_rank(method: str, num_rows: int, folder: str) -> tuple[Outcome, dict[str, float]]:
    """A step, and a validation in batches of three: of the last one, one of two ranks has no row."""
    rows = METHODS[method].rows(num_rows)
    return step(METHODS[method], folder, rows), validate(METHODS[method], folder, rows, 3)


def assert_like_one_rank(run: str, ranks: tuple[int, Any], folder: str) -> None:
    num_rows, results = ranks
    found = results[run]
    outcome, validation = on_one_rank(run.partition(":")[2], num_rows, folder)
    assert_same(Outcome(found["updates"], found["metrics"]), outcome, TOLERANCE["64-true"])
    assert_same_metrics(found["validation"], validation, TOLERANCE["64-true"])


@pytest.mark.parametrize("run", runs_of("ddp", METHODS, [*COPIED, *PACKED]))
@pytest.mark.timeout(900)
def test_two_ranks(run: str, ranks: tuple[int, Any], folder: str) -> None:
    assert_like_one_rank(run, ranks, folder)


@pytest.mark.parametrize("run", runs_of("fsdp2", METHODS if ALL else [*COPIED, *PACKED], SHARDED))
@pytest.mark.timeout(900)
def test_two_ranks_that_share_the_weights(run: str, ranks: tuple[int, Any], folder: str) -> None:
    assert_like_one_rank(run, ranks, folder)
