"""On two ranks, each with random numbers of its own, a resumed run is the run that was not interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..integration.test_resume import assert_same, ignore_totals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume(tiny_model_folder, tmp_path, strategy):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.integration.resume_worker", str(tiny_model_folder()), str(tmp_path), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("sft", "dpo"):
        whole, resumed = (
            torch.load(tmp_path / name / kind / "step=6.ckpt", weights_only=True) for kind in ("whole", "resumed")
        )
        ignore_totals(whole)
        ignore_totals(resumed)
        assert_same(resumed, whole, f"{name}: ")
        first, second = whole["post_training"]["random"]
        assert not torch.equal(first["torch"], second["torch"])
