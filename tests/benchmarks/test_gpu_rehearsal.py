"""The script for the day when there is a card: the same code, on a CPU with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ("sft", "reward", "process", "dpo", "simpo", "kto", "grpo", "ppo")


def rehearse(*arguments: str) -> dict[tuple[str, str], str]:
    """The table that the script prints, by its first two columns."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.count("|") == 2]
    return {(what, side): cell for what, side, cell in table}


def check_parts(found: dict[tuple[str, str], str]) -> None:
    for kernel in ("blocks", "cascade"):  # in fp32, as what they are compared with
        far = found["attention, 2 pairs", kernel].partition("GiB, ")[2].partition(" apart")[0]
        assert float(far) < 1e-5
        assert (float(far) == 0) == (kernel == "blocks")
    for side in ("fused", "fused, entropy", "full logits"):
        assert " ms (first " in found["head, 32 x 16 x 64", side]
    assert float(found["head, 32 x 16 x 64", "fused"].partition("GiB, ")[2].partition(" apart")[0]) < 1e-5
    for cache in ("dynamic", "static", "paged", "int8"):
        assert "tokens/s" in found["decoding, 4 rows", cache]
    for what in ("sft", "dpo"):
        counts = [int(part.split()[0]) for part in found[f"{what}, per micro-batch", "ours"].split(", ")]
        assert counts[:4] == [0, 0, 0, 0]  # there is no device here
        assert counts[4] > 100


@pytest.mark.timeout(200)
def test_rehearsal_of_the_quick_parts() -> None:
    check_parts(rehearse("--minutes", "3", "--parts", "attention", "head", "copies", "decoding"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rehearsal() -> None:
    found = rehearse("--minutes", "9")
    for name in EIGHT:
        cell = found[f"equality, {name}", "auto"]
        # On a CPU both sides are the same arithmetic; in bf16 they are not, and must show that they were run.
        assert cell.startswith("32-true: loss 0.0e+00, gradient 0.0e+00 apart")
        assert "bf16-mixed: loss" in cell
        assert cell.count("gradient 0.0e+00") == 1
    assert "tests collected" in found["tests/gpu", "ours"]
    check_parts(found)
    for what in ("sft", "dpo", "grpo"):
        assert "tokens/s" in found[what, "ours"]
    assert "x transformers.generate" in found["sampling", "engine / transformers.generate"]
