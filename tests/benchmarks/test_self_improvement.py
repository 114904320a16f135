"""The benchmark of self-improvement: the loops that it runs, and the figures from their records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
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
    for name in ("self_improvement", "self_improvement_loops"):
        sys.modules.pop(name)


def test_all_loops_start_from_the_same_models(bench, tmp_path):
    OmegaConf.save(bench.looping(1, tmp_path / "run", tmp_path), tmp_path / "loops.yaml")
    pipeline = load_pipeline(tmp_path / "loops.yaml")
    assert [*pipeline.stages] == [*(n for name, loop in bench.LOOPS.items() for n in (*loop.before, name)), "ends"]
    starts = {"start": str(tmp_path / "sft/model"), "taught": str(tmp_path / "taught/model")}
    taught = bench.PANELS["from a start that judges, revises and asks"]
    for name, loop in bench.LOOPS.items():
        stage = pipeline.stages[name]
        assert loop.start == ("taught" if name in taught else "start")
        if name == "within":
            assert stage.model["init_args"]["model"] == starts["start"]
            continue
        assert stage.model == starts[loop.start]
        assert (stage.criteria["accept"] == "better") == (name != "poisoned")
    assert pipeline.stages["ends"].models.keys() == {*starts, *bench.LOOPS}
    held_out, asked = pipeline.stages["ends"].suite, pipeline.stages["raft"].suite
    assert "split=test" in held_out["tasks"][0]["prompts"]
    assert "split=validation" in asked["tasks"][0]["prompts"]


def test_some_loops_are_run_without_the_others(bench, tmp_path):
    stages = bench.looping(0, tmp_path, tmp_path, ["within", "judged"]).stages
    assert [*stages] == ["within_first", "within", "judged", "ends"]
    assert [*stages.ends.models] == ["start", "taught", "within", "judged"]
    assert [*bench.looping(0, tmp_path, tmp_path, ["raft"]).stages.ends.models] == ["start", "raft"]


@pytest.fixture
def few(bench, monkeypatch: pytest.MonkeyPatch):
    loops = sys.modules["self_improvement_loops"]
    monkeypatch.setattr(loops, "LESSONS", dict.fromkeys(loops.LESSONS, 40))
    return loops


def test_the_taught_start_learns_what_is_right(few):
    """Against the arithmetic itself."""

    def total(prompt: str) -> int:
        return sum(int(number) for number in prompt.removesuffix("=?").split("+"))

    judged = list(few.judgements())
    for row in judged:
        prompt, _, answer = row["prompt"][0]["content"].removesuffix(" Right?").partition(" ")
        is_right = int(answer.rpartition("#")[2]) == total(prompt)
        assert row["completion"][0]["content"] == ("yes" if is_right else "no")
    assert {row["completion"][0]["content"] for row in judged} == {"yes", "no"}

    faults = set()
    for critique, revision in few.revisions():
        prompt, *steps = critique["prompt"].removesuffix("\nWrong:").split("\n")
        fault, careful = critique["completion"], revision["completion"]
        assert revision["prompt"] == critique["prompt"] + f" {fault}\nBetter:"
        assert careful.endswith(f"#{total(prompt)}")
        assert careful.count("\n") == 3
        wrong = [right for step, right in zip(steps, careful.split("\n"), strict=False) if step != right]
        assert fault == ("no steps" if len(steps) == 1 else wrong[0] if wrong else "nothing")
        faults.add(fault if " " in fault or fault == "nothing" else "a slip")
    assert faults == {"no steps", "nothing", "a slip"}

    for row in few.new_problems():
        assert row["prompt"].endswith("\n\nTask:")
        assert row["prompt"].count("Task: ") == 2
        assert total(row["completion"]) > 0
        assert row["completion"] not in row["prompt"]


def test_the_decisions_within_one_fit_are_records_of_a_loop(bench, tmp_path):
    found = [
        {"step": 9, "verdict": "accept", "difference": 0.3, "scores": {"sums": 0.7}},
        {"step": 18, "verdict": "reject", "difference": -0.1, "scores": {"sums": 0.6}},
    ]
    place = tmp_path / "within/accepted/manifest.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"accepted": [], "decisions": found}))
    values, rejected = bench.curve(bench.read_rounds(tmp_path, "within"))
    assert values == pytest.approx([0.4, 0.7, 0.7, 0.7])
    assert rejected == [(2, 0.6)]


def record(verdict: str, before: float, after: float) -> dict[str, Any]:
    return {"verdict": verdict, "accuracy": {"accepted": {"sums": before}, "candidate": {"sums": after}}}


def test_the_curve_is_that_of_the_accepted_model(bench):
    empty = {"verdict": "reject", "reason": "no row"}
    records = [record("reject", 0.4, 0.1), record("accept", 0.4, 0.7), empty]
    assert bench.curve(records) == ([0.4, 0.4, 0.7, 0.7], [(1, 0.1)])
    assert bench.curve([empty, record("accept", 0.4, 0.7)]) == ([0.4, 0.4, 0.7, 0.7], [])
    assert bench.curve([record("stop", 0.4, 0.2)]) == ([0.4] * 4, [(1, 0.2)])


def test_seeds_that_answer_the_same_problems_are_no_more_problems(bench, tmp_path, monkeypatch):
    scores = {"start": {f"{n}": float(n % 2) for n in range(40)}, "raft": {f"{n}": float(n % 4 > 0) for n in range(40)}}
    found = SimpleNamespace(result=lambda model, task: SimpleNamespace(scores=scores[model]))
    monkeypatch.setattr(bench, "Report", SimpleNamespace(read=lambda folder: found))
    monkeypatch.setattr(bench, "read_rounds", lambda run_dir, name: [record("accept", 0.5, 0.75)])
    once, thrice = (bench.end_of("raft", [tmp_path] * seeds) for seeds in (1, 3))
    assert (once.start, once.accuracy, once.compared.difference) == (0.5, 0.75, 0.25)
    assert once.compared.low < 0.15 < 0.35 < once.compared.high
    assert thrice == bench.End("3 of 3", once.accuracy, once.start, once.compared)


def test_the_requirements(bench):
    def ends(**changed: tuple[float, float, float]) -> dict[str, Any]:
        given = dict.fromkeys(bench.LOOPS, (0.3, 0.2, 0.4))
        given |= {"untaught": (0.0, 0.0, 0.0), "poisoned_gated": (0.0, 0.0, 0.0), "poisoned": (-0.3, -0.4, -0.2)}
        given |= changed
        return {name: bench.End("", 0.0, 0.0, Comparison(*values, 0.01)) for name, values in given.items()}

    assert bench.broken(ends()) == []
    assert bench.broken(ends(dpo=(0.05, 0.02, 0.08)))[0].startswith("dpo does not gain 10 points: +5.0 (+2.0 to +8.0)")
    assert len(bench.broken(ends(spin=(0.2, -0.1, 0.5)))) == 1
    assert bench.broken(ends(poisoned_gated=(-0.2, -0.3, -0.1)))[0].startswith("the gate lets poisoned_gated fall")
    assert bench.broken(ends(poisoned=(-0.1, -0.2, 0.1)))[0].startswith("without the gate the poisoned loop does not")
