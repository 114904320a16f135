"""What the benchmark of self-improvement runs, and what it makes of the records of its loops."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf_lightning.metrics.intervals import Comparison
from rlhf_lightning.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import self_improvement

    yield self_improvement
    sys.modules.pop("self_improvement")


def test_all_loops_start_from_the_same_model(bench, tmp_path):
    OmegaConf.save(bench.looping(1, tmp_path / "run", tmp_path / "start"), tmp_path / "loops.yaml")
    pipeline = load_pipeline(tmp_path / "loops.yaml")
    assert [*pipeline.stages] == [*bench.LOOPS, "ends"]
    for name in bench.LOOPS:
        stage = pipeline.stages[name]
        assert stage.model == str(tmp_path / "start")
        assert (stage.criteria["accept"] == "better") == (name != "poisoned")
    assert [*pipeline.stages["ends"].models] == ["start", *bench.LOOPS]
    held_out, asked = pipeline.stages["ends"].suite, pipeline.stages["raft"].suite
    assert "split=test" in held_out["tasks"][0]["prompts"]
    assert "split=validation" in asked["tasks"][0]["prompts"]


def record(verdict: str, before: float, after: float) -> dict[str, Any]:
    return {"verdict": verdict, "accuracy": {"accepted": {"sums": before}, "candidate": {"sums": after}}}


def test_the_curve_is_that_of_the_accepted_model(bench):
    empty = {"verdict": "reject", "reason": "no row"}
    records = [record("reject", 0.4, 0.1), record("accept", 0.4, 0.7), empty]
    assert bench.curve(records) == ([0.4, 0.4, 0.7, 0.7], [(1, 0.1)])
    assert bench.curve([record("stop", 0.4, 0.2)]) == ([0.4] * 4, [(1, 0.2)])


def test_the_requirements(bench):
    def ends(**changed: tuple[float, float, float]) -> dict[str, Any]:
        given = dict.fromkeys(bench.GAINS, (0.3, 0.2, 0.4))
        given |= {"poisoned_gated": (0.0, 0.0, 0.0), "poisoned": (-0.3, -0.4, -0.2)} | changed
        return {name: bench.End("", 0.0, 0.0, Comparison(*values, 0.01)) for name, values in given.items()}

    assert bench.broken(ends()) == []
    assert bench.broken(ends(dpo=(0.05, 0.02, 0.08)))[0].startswith("dpo does not gain 10 points: +5.0 (+2.0 to +8.0)")
    assert len(bench.broken(ends(spin=(0.2, -0.1, 0.5)))) == 1
    assert bench.broken(ends(poisoned_gated=(-0.2, -0.3, -0.1)))[0].startswith("the gate lets a poisoned loop fall")
    assert bench.broken(ends(poisoned=(-0.1, -0.2, 0.1)))[0].startswith("without the gate the poisoned loop does not")
