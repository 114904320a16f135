"""The YAML of a pipeline: all valid forms, and the message of each invalid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.stages import FitStage, SampleStage
from rlhf_lightning.utils.messages import UsageError

PLAIN: dict[str, Any] = {
    "run_dir": "runs/x",
    "seed": 5,
    "variables": {"rows": 7},
    "stages": {
        "a": {"kind": "fit", "config": "configs/sft/tiny.yaml", "data": {"train": "x?rows=${variables.rows}"}},
        "b": {"kind": "sample", "model": "${outputs.a.model}", "prompts": "p.jsonl", "seed": 9},
    },
}  # fmt: skip


def load(tmp_path: Path, content: Any, *overrides: str, **arguments: Any):
    file = tmp_path / "p.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_pipeline(file, overrides, **arguments)


def test_interpolations_and_outputs(tmp_path):
    pipeline = load(tmp_path, PLAIN)
    first, second = pipeline.stages["a"], pipeline.stages["b"]
    assert isinstance(first, FitStage)
    assert isinstance(second, SampleStage)
    assert first.config == ["configs/sft/tiny.yaml"]
    assert first.data == {"train": "x?rows=7"}
    assert second.model == "runs/x/a/model"
    assert (pipeline.stage_seed("a"), pipeline.stage_seed("b")) == (5, 9)


def test_overrides_and_run_dir(tmp_path):
    pipeline = load(tmp_path, PLAIN, "seed=6", "stages.b.num_samples=2", "variables.rows=8", run_dir="elsewhere")
    assert pipeline.seed == 6
    assert pipeline.stages["b"].num_samples == 2
    assert pipeline.stages["a"].data == {"train": "x?rows=8"}
    assert pipeline.stages["b"].model == "elsewhere/a/model"
    assert pipeline.run_dir == Path("elsewhere")


POLICIES: dict[str, Any] = PLAIN | {
    "policy": "short",
    "policies": {
        "short": {"c": {"kind": "fit", "model": {"model": "${outputs.b.pairs}"}}},
        "long": {"c": {"kind": "fit", "seed": 1}, "d": {"kind": "fit", "seed": 2}},
        "other": {"e": {"kind": "fit"}},
    },
    "compare": [{"metric": "m", "stages": ["c", "d", "e"], "over": "seconds"}, {"metric": "m", "stages": ["a", "c"]}],
}


def test_one_value_chooses_the_policy(tmp_path):
    pipeline = load(tmp_path, POLICIES)
    assert list(pipeline.stages) == ["a", "b", "c"]
    assert pipeline.stages["c"].model == {"model": "runs/x/b/pairs.jsonl"}
    assert [item.stages for item in pipeline.compare] == [["a", "c"]]  # one stage alone compares with nothing

    pipeline = load(tmp_path, POLICIES, "policy=long", "stages.d.seed=7", "stages.d.evaluate=false")
    assert list(pipeline.stages) == ["a", "b", "c", "d"]
    assert (pipeline.stage_seed("c"), pipeline.stage_seed("d")) == (1, 7)
    assert not pipeline.stages["d"].evaluate
    assert [item.stages for item in pipeline.compare] == [["c", "d"], ["a", "c"]]

    pipeline = load(tmp_path, POLICIES, "policy=[other,long]")
    assert list(pipeline.stages) == ["a", "b", "e", "c", "d"]
    assert "policies" not in pipeline.source


def changed(**changes: Any) -> dict[str, Any]:
    return {**PLAIN, **changes}


def stage(**changes: Any) -> dict[str, Any]:
    return changed(stages={"a": {**PLAIN["stages"]["b"], "model": "x", **changes}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(stagess={}), "a pipeline has no key 'stagess'; did you mean 'stages'?"),
        (changed(run_dir=None), "run_dir is missing"),
        (changed(stages={}), "stages is missing"),
        (changed(seed=-1), "seed is -1; it must be a whole number"),
        (changed(dtype="int8"), "dtype is 'int8'; it must be float32"),
        (
            changed(stages={"a": {"model": "x"}}),
            "stage 'a' is of kind None; write kind: fit, sample, refine, challenge, self-play, generate, "
            "compress, label-steps, merge, evaluate, gate, export or rounds",
        ),
        (changed(stages={"a": {"kind": "fitt"}}), "stage 'a' is of kind 'fitt'"),
        (changed(stages={"a/b": {"kind": "fit"}}), "stage 'a/b': a name has letters"),
        (stage(num_sample=3), "stage 'a' has no key 'num_sample'; did you mean 'num_samples'?"),
        (stage(prompts=None), "stage 'a' needs 'prompts'"),
        (changed(stages={"a": {"kind": "fit", "trainer": [1]}}), "stage 'a': trainer is [1]; it must be a dict"),
        (changed(stages={"a": {"kind": "fit", "export": {"monitr": "x"}}}), "stage 'a', export has no key 'monitr'"),
        (changed(evaluation={"promptz": "x"}), "evaluation has no key 'promptz'; did you mean 'prompts'?"),
        (changed(compare=[{"metric": "val/loss", "stages": ["c"]}]), "compare names the stage 'c', which there is not"),
        (POLICIES | {"policy": "shrt"}, "policy is 'shrt'; write long, other, short, or several: [a, b]"),
        (POLICIES | {"policy": ["long", 3]}, "policy is 3; write long"),
        ({k: v for k, v in POLICIES.items() if k != "policy"}, "policy is None; write long"),
        (POLICIES | {"policies": {"a": 1}}, "policies is not a mapping of names to stages"),
        (POLICIES | {"policy": {"long": 1}}, "policy is {'long': 1}; write long"),
        (POLICIES | {"stages": {"a": 3}}, "stage 'a' is of kind None"),
        (changed(policy="dpo"), "policy is 'dpo', but the file defines no policies"),
        (changed(title="${nowhere}"), "nowhere"),
        ("stages: [", "line"),
        ("- 1", "is not a mapping"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, content, message):
    with pytest.raises(UsageError) as error:
        load(tmp_path, content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_on_the_command_line(tmp_path):
    with pytest.raises(UsageError, match="'seed' is not an override: write key=value"):
        load(tmp_path, PLAIN, "seed")
    with pytest.raises(UsageError, match=r"there is no file 'nowhere\.yaml'"):
        load_pipeline("nowhere.yaml")


def test_an_environment_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    with pytest.raises(UsageError, match="NO_SUCH_FOLDER"):
        load(tmp_path, changed(variables={"rows": "${oc.env:NO_SUCH_FOLDER}"}))


def test_packaged_pipelines_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(load_pipeline("configs/pipelines/quickstart.yaml").stages) == [
        *("sft", "pairs", "reward", "dpo", "dpo_longer")
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"dpo": {"kind": "fit", "data": {"train": "${outputs.own.pairs}"}}, "own": PLAIN["stages"]["b"]},
            "stage 'dpo' reads an output of 'own', which is not before it: write it above",
        ),
        (
            {"own": {"kind": "sample", "model": "${outputs.own.model}", "prompts": "p.jsonl"}},
            "stage 'own' reads an output of 'own', which is not before it: write it above",
        ),
        (
            {
                "loop": {
                    "kind": "rounds",
                    "model": "m",
                    "body": {
                        "dpo": {"kind": "fit", "data": {"train": "${outputs.own.pairs}"}},
                        "own": {"kind": "sample", "model": "${round.model}", "prompts": "p.jsonl"},
                    },
                }
            },
            "stage 'dpo' reads an output of 'own', which is not before it: write it above",
        ),
    ],
)
def test_a_stage_reads_what_earlier_ones_write(tmp_path, stages, message):
    content = yaml.safe_dump({"run_dir": "runs/x", "stages": stages}, sort_keys=False)
    with pytest.raises(UsageError, match=message):
        load(tmp_path, content)
