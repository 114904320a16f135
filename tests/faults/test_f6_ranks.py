"""Ranks share the reference that one of them drew, and draw masks of their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.faults.numbers_worker", str(save_tiny_model(place / "model", "gpt2")), str(place / "out")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((place / f"out.{rank}").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_policy_that_ranks_draw_apart_is_its_own_reference(ranks: list[dict[str, Any]], strategy: str) -> None:
    assert [rank[f"{strategy}-loss"] for rank in ranks] == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_drop_other_units_under_one_seed(ranks: list[dict[str, Any]], strategy: str) -> None:
    first, second = (rank[f"{strategy}-dropped"] for rank in ranks)
    assert all(abs(a - b) > 1e-3 for a, b in zip(first, second, strict=True))
