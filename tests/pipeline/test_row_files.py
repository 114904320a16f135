"""The kinds of rows that a sample stage writes, from a scripted engine; messages for rows that give none of a kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.inference import derive_seed
from rlhf_lightning.pipeline import refine_stage, row_files, sample_stage
from rlhf_lightning.pipeline.row_files import NoRowsError
from rlhf_lightning.pipeline.sample_stage import check_sample, run_sample
from rlhf_lightning.pipeline.stages import RefineStage, SampleStage

from ..evaluation.scripted import ScriptedEngine

ANSWERS = {"1+1=": ["#2", "#3", "1+1=2 #2"], "2+2=": ["#5", "#6", "#7..."], "2+2= is 4": ["#4", "so #4", "#5"]}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    engine = ScriptedEngine(ANSWERS)
    for stage in (sample_stage, refine_stage):
        monkeypatch.setattr(stage, "stage_policy", lambda model, dtype: (engine, engine.tokenizer))
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "completion": f"#{2 * n}"} for n in (1, 2)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_kind_of_rows(prompts, tmp_path):
    kinds = ["demonstrations", "pairs", "unpaired", "spin", "samples"]
    stage = SampleStage(model="m", prompts=prompts, num_samples=3, rows=kinds, keep=None)
    metrics = run_sample(stage, tmp_path, 0, "float32")
    made = {kind: lines(tmp_path / f"{kind}.jsonl") for kind in kinds}
    assert [(row["prompt"], row["completion"]) for row in made["demonstrations"]] == [
        ("1+1=", "#2"),
        ("1+1=", "1+1=2 #2"),
    ]
    assert [(row["chosen"], row["rejected"]) for row in made["pairs"]] == [("#2", "#3")]
    assert [row["label"] for row in made["unpaired"]] == [True, False, True, False, False]
    assert [(row["chosen"], row["rejected"]) for row in made["spin"]] == [
        ("#2", "#3"),
        ("#2", "1+1=2 #2"),
        ("#4", "#5"),
        ("#4", "#6"),
    ]
    assert [row["score"] for row in made["samples"]] == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert {row["provenance"]["model"] for rows in made.values() for row in rows} == {"m"}
    assert metrics == {
        "samples": 6,
        "mean_reward": pytest.approx(1 / 3),
        "cut_off": 1,
        **{kind: len(rows) for kind, rows in made.items()},
    }
    assert not (tmp_path / "sampled.jsonl").exists()


def test_prompts_that_nothing_solved_are_sampled_with_a_hint(prompts, tmp_path):
    stage = SampleStage(model="m", prompts=prompts, num_samples=3, rows=["demonstrations"], hint="{prompt} is {answer}")
    metrics = run_sample(stage, tmp_path, 0, "float32")
    rows = lines(tmp_path / "demonstrations.jsonl")
    assert [(row["prompt"], row["completion"]) for row in rows] == [("1+1=", "#2"), ("2+2=", "#4")]
    assert metrics["samples"] == 6  # hints say nothing about the model


def test_samples_with_a_hint_depend_on_their_own_prompt_alone(prompts, tmp_path, monkeypatch):
    """Whether another prompt was solved changes no sample of this one."""
    unsolved = {"1+1=": ["#3"], "1+1= is 2": ["#2"]}
    drawn = []
    for name, answers in (("solved", ANSWERS), ("unsolved", ANSWERS | unsolved)):
        engine = ScriptedEngine(answers)
        policy = (engine, engine.tokenizer)
        monkeypatch.setattr(sample_stage, "stage_policy", lambda model, dtype, policy=policy: policy)
        stage = SampleStage(
            model="m", prompts=prompts, num_samples=2, rows=["demonstrations"], hint="{prompt} is {answer}"
        )
        (tmp_path / name).mkdir()
        run_sample(stage, tmp_path / name, 0, "float32")
        drawn.append([seeds for text, seeds in engine.calls if text == "2+2= is 4"])
    assert drawn[0] == drawn[1] == [[derive_seed(derive_seed(0, "hint"), 1, s) for s in range(2)]]


def test_seed_rows_are_mixed_with_the_first_kind(prompts, tmp_path):
    stage = SampleStage(
        model="m",
        prompts=prompts,
        num_samples=3,
        rows=["demonstrations", "samples"],
        keep=None,
        seed_rows=prompts,
        seed_ratio=0.5,
    )
    metrics = run_sample(stage, tmp_path, 0, "float32")
    rows = lines(tmp_path / "demonstrations.jsonl")
    assert sorted(row["completion"] for row in rows[2:]) == ["#2", "#4"]
    assert all("seed_row" in row["provenance"] for row in rows[2:])
    assert (metrics["demonstrations"], metrics["samples"]) == (4, 6)


def test_columns_with_other_names(prompts, tmp_path):
    rows = [{"question": row["prompt"], "solution": row["answer"]} for row in lines(Path(prompts))]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "question", "answer": "solution"}
    stage = SampleStage(model="m", prompts=str(tmp_path / "other.jsonl"), columns=columns, num_samples=3)
    run_sample(stage, tmp_path, 0, "float32")
    (row,) = lines(tmp_path / "pairs.jsonl")
    assert (row["prompt"], row["chosen"], row["rejected"], row["answer"]) == ("1+1=", "#2", "#3", "2")


def test_a_reward_that_takes_other_columns_ranks(prompts, tmp_path):
    """Columns that a reward does not take are not passed to it."""
    verifier = {"class_path": "rlhf_lightning.rewards.LengthReward", "init_args": {"target": 8, "unit": "characters"}}
    stage = SampleStage(model="m", prompts=prompts, num_samples=3, verifier=verifier)
    run_sample(stage, tmp_path, 0, "float32")
    assert [row["chosen"] for row in lines(tmp_path / "pairs.jsonl")] == ["1+1=2 #2"]


def test_no_row_at_all(prompts, tmp_path):
    stage = SampleStage(model="m", prompts=prompts, num_samples=3, rows=["samples", "demonstrations"], threshold=2.0)
    with pytest.raises(NoRowsError, match=r"no prompt gave a row of kind 'demonstrations' \(mean reward 0.33\)"):
        run_sample(stage, tmp_path, 0, "float32")
    assert not (tmp_path / "samples.jsonl").exists()


def broken(prompts: Any, completions: Any) -> Any:
    raise RuntimeError("no connection")


def test_a_verifier_that_raises(prompts, tmp_path):
    stage = SampleStage(model="m", prompts=prompts, verifier=f"{__name__}.broken")
    with pytest.raises(ValueError, match=r"broken' failed on all of 8 samples: .*no connection"):
        run_sample(stage, tmp_path, 0, "float32")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_refined_drafts_become_rows(prompts, tmp_path):
    drafts = {
        "1+1=": ["#3"],
        "1+1=|#3?": ["too high"],
        "1+1=|#3|too high!": ["#2"],
        "2+2=": ["#4"],
    }
    engine, _ = refine_stage.stage_policy("m", "float32")
    engine.answers = drafts
    stage = RefineStage(
        model="m",
        prompts=prompts,
        critique="{prompt}|{answer}?",
        revision="{prompt}|{answer}|{critique}!",
        good_enough=1.0,
        rows=["pairs", "demonstrations"],
    )
    metrics = refine_stage.run_refine(stage, tmp_path, 0, "float32")
    assert [(row["chosen"], row["rejected"]) for row in lines(tmp_path / "pairs.jsonl")] == [("#2", "#3")]
    assert [row["completion"] for row in lines(tmp_path / "demonstrations.jsonl")] == ["#2", "#4"]
    assert metrics["samples"] == 3


@pytest.mark.parametrize("kind", ["sample", "refine"])
def test_no_prompt_is_sampled_once_there_are_enough_rows(prompts, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(row_files, "PROMPTS_AT_ONCE", 1)
    engine, _ = refine_stage.stage_policy("m", "float32")
    engine.answers = {"1+1=": ["#2"], "2+2=": ["#4"]}
    said: list[str] = []
    options: dict[str, Any] = {"model": "m", "prompts": prompts, "rows": ["demonstrations"], "max_rows": 1}
    if kind == "sample":
        run_sample(SampleStage(**options, num_samples=1), tmp_path, 0, "float32", said.append)
    else:
        refine_stage.run_refine(RefineStage(**options, good_enough=1.0), tmp_path, 0, "float32", said.append)
    assert [row["prompt"] for row in lines(tmp_path / "demonstrations.jsonl")] == ["1+1="]
    assert said == ["1 of 2 prompts, 1 demonstrations"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "best"}, "pairing is 'best'; it must be one of best_worst, all"),
        ({"margin": -1.0}, "margin is -1.0; it must be at least 0"),
        ({"keep": 0}, "keep is 0; it must be a whole number of at least 1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"threshold": None, "rows": ["unpaired"]}, "threshold is null, and the labels of unpaired rows need one"),
        ({"seed_rows": "x.jsonl"}, "seed_rows is 'x.jsonl' and seed_ratio 0.0: give both, or neither"),
        ({"seed_ratio": 1.0, "seed_rows": "x"}, "seed_ratio is 1.0; it must be in [0, 1)"),
    ],
)
def test_mistakes_in_rows(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SampleStage(model="m", prompts="p", **options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "{prompt}"}, "hint makes demonstrations of prompts below threshold: add them to rows"),
        ({"hint": "it is 4", "rows": ["demonstrations"]}, "hint has no {prompt}: write where it stands"),
        (
            {"verifier": {"class_path": "rlhf_lightning.rewards.LengthReward", "init_args": {"mni": 1}}},
            "argument 'mni'",
        ),
        ({"verifier": {"init_args": {}}}, "write a dotted path, or class_path and init_args"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1}, "num_samples is 1, and a pair is made of two samples of a prompt"),
        ({"sampling": {"temperature": 0}}, "num_samples is 4 at sampling.temperature 0, where all are equal"),
    ],
)
def test_mistakes_in_a_sample_stage(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sample(SampleStage(model="m", prompts="p", **options))


def test_one_sample_and_greedy_searches_may_make_rows():
    for options in ({"num_samples": 1, "rows": ["spin"]}, {"strategy": "SelfConsistency"}):
        check_sample(SampleStage(model="m", prompts="p", sampling={"temperature": 0}, **options))
