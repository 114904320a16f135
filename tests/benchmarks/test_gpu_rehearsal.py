"""The script for the day when there is a card: the same code, on a CPU with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ("sft", "reward", "process", "dpo", "simpo", "kto", "grpo", "ppo")


@pytest.mark.timeout(600)
def test_rehearsal() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--minutes", "9"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.count("|") == 2]
    found = {(what, side): cell for what, side, cell in table}
    for name in EIGHT:
        cell = found[f"equality, {name}", "auto"]
        # On a CPU both sides are the same arithmetic; in bf16 they are not, and must show that they were run.
        assert cell.startswith("32-true: loss 0.0e+00, gradient 0.0e+00 apart")
        assert "bf16-mixed: loss" in cell
        assert cell.count("gradient 0.0e+00") == 1
    assert "tests collected" in found["tests/gpu", "ours"]
    for what in ("sft", "dpo", "grpo"):
        assert "tokens/s" in found[what, "ours"]
    assert "x transformers.generate" in found["sampling", "engine / transformers.generate"]
