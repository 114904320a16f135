"""Test results of stages: their intervals, whom each is compared with, and by which numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf_lightning.metrics.intervals import mcnemar, mean_interval, paired_bootstrap, wilson_interval
from rlhf_lightning.pipeline.config import Pipeline, load_pipeline
from rlhf_lightning.pipeline.tested import compare_tests, started_from

SUITE = {"name": "s", "tasks": [{"name": "t", "prompts": "sums:prompts?rows=2"}]}


def fit(model: str) -> dict[str, Any]:
    return {"kind": "fit", "model": {"init_args": {"model": model}}}


STAGES: dict[str, Any] = {
    "base": fit("configs/models/nano"),
    "dpo": fit("${outputs.base.model}"),
    "grpo": fit("${outputs.base.model}"),
    "merged": {
        "kind": "merge",
        "method": "linear",
        "models": ["${outputs.grpo.model}", "${outputs.dpo.model}"],
    },
    "gate": {"kind": "gate", "model": "${outputs.merged.model}", "accepted": "${outputs.dpo.model}", "suite": SUITE},
    "foreign": fit("org/model"),
    "rounds": {
        "kind": "rounds",
        "model": "${outputs.gate.model}",
        "body": {"sft": fit("${round.model}")},
    },
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "seed": 5, "stages": STAGES}, sort_keys=False))
    return load_pipeline(file)


def answer(pipeline: Pipeline, stage: str, rewards: dict[str, float | None]) -> None:
    """Writes the answers of a stage as its test does."""
    pipeline.folder(stage).mkdir(parents=True)
    lines = [{"row": row, "prompt": "?", "completion": "!", "reward": reward} for row, reward in rewards.items()]
    (pipeline.folder(stage) / "test_answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def random_rewards(seed: int, rate: float, rows: int = 40) -> dict[str, float | None]:
    right = np.random.default_rng(seed).random(rows) < rate
    return {f"rows:{n}": float(found) for n, found in enumerate(right)}


def test_a_stage_is_compared_with_the_one_that_it_started_from(pipeline: Pipeline) -> None:
    starts = {name: started_from(pipeline, name) for name in STAGES}
    assert starts == {
        "base": None,
        "dpo": "base",
        "grpo": "base",
        "merged": "grpo",
        "gate": "dpo",
        "foreign": None,
        "rounds": "gate",
    }


def test_the_numbers_are_those_of_the_tests_on_the_stored_rewards(pipeline: Pipeline) -> None:
    rewards = {name: random_rewards(n, 0.3 + 0.1 * n) for n, name in enumerate(STAGES) if name != "grpo"}
    for name, given in rewards.items():
        answer(pipeline, name, given)
    found = compare_tests(pipeline, list(STAGES))
    # A stage whose start was not tested is compared with the one that was tested before it.
    against = {name: of.against for name, of in found.items()}
    assert against == {
        "base": None,
        "dpo": "base",
        "merged": "dpo",
        "gate": "dpo",
        "foreign": "gate",
        "rounds": "gate",
    }
    for name, of in found.items():
        own = list(rewards[name].values())
        assert of.accuracy == wilson_interval(int(sum(own)), 40)
        if of.against is None:
            assert of.as_dict() == {"test_interval": [of.accuracy.low, of.accuracy.high]}
            continue
        other = list(rewards[of.against].values())
        assert of.paired is not None
        expected = paired_bootstrap(own, other, seed=5)
        assert of.paired.comparison == expected
        assert of.paired.mcnemar == mcnemar([r == 1 for r in own], [r == 1 for r in other])
        assert of.as_dict()["test_comparison"] == {
            "against": of.against,
            "prompts": 40,
            "difference": expected.difference,
            "low": expected.low,
            "high": expected.high,
            "p_value": expected.p_value,
            "mcnemar": of.paired.mcnemar,
        }


def test_answers_are_paired_by_row_and_rewards_may_be_any_numbers(pipeline: Pipeline) -> None:
    answer(pipeline, "base", {"a": 3.0, "b": -1.0, "c": 2.0, "d": None, "e": 9.0})
    answer(pipeline, "dpo", {"c": 4.0, "d": 1.0, "b": 0.5, "a": 4.0})
    answer(pipeline, "grpo", {"x": 1.0})
    found = compare_tests(pipeline, ["base", "dpo", "grpo"])
    assert found["base"].accuracy == mean_interval([3.0, -1.0, 2.0, 9.0])
    assert found["dpo"].paired is not None
    assert found["dpo"].paired.prompts == 3
    assert found["dpo"].paired.comparison == paired_bootstrap([4.0, 0.5, 4.0], [3.0, -1.0, 2.0], seed=5)
    assert found["dpo"].paired.mcnemar is None
    # No prompt in common.
    assert found["grpo"].against is None
