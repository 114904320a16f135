"""Staged runs end to end, small: what runs, what is skipped, what an interruption leaves, and what is reported."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from rlhf_lightning.cli import main
from rlhf_lightning.metrics.intervals import mcnemar, paired_bootstrap, wilson_interval
from rlhf_lightning.pipeline import kinds, load_pipeline, run_pipeline

CALLS: list[str] = []
VERIFIER = f"{__name__}.first_is_right"


def first_is_right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Right are completions that begin with an even letter: about half of what a random model writes."""
    CALLS.append("verify")
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


def content(model: Path, tmp_path: Path) -> dict[str, Any]:
    """A pipeline of three stages in a folder, and its rows."""
    rows = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}", "answer": str(2 * n)} for n in range(12)]
    for name in ("rows", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"accelerator": "cpu", "max_steps": 2, "logger": False}
    return {
        "title": "small",
        "run_dir": str(tmp_path / "run"),
        "seed": 3,
        "evaluation": {
            "prompts": str(tmp_path / "test.jsonl"),
            "verifier": VERIFIER,
            "max_new_tokens": 4,
            "samples": 2,
        },
        "stages": {
            "sft": {
                "kind": "fit",
                "model": {"class_path": "SFTModule", "init_args": {"model": str(model)}},
                "data": {
                    "class_path": "SFTDataModule",
                    "init_args": {"train": str(tmp_path / "rows.jsonl"), "val": str(tmp_path / "rows.jsonl")},
                },
                "trainer": trainer,
            },
            "pairs": {
                "kind": "sample",
                "model": "${outputs.sft.model}",
                "prompts": str(tmp_path / "rows.jsonl"),
                "verifier": VERIFIER,
                "num_samples": 8,
                "sampling": {"max_new_tokens": 24},
            },
            "dpo": {
                "kind": "fit",
                "model": {"class_path": "DPOModule", "init_args": {"model": "${outputs.sft.model}"}},
                "data": {
                    "class_path": "PreferenceDataModule",
                    "init_args": {"train": "${outputs.pairs.pairs}", "val": "${outputs.pairs.pairs}"},
                },
                "trainer": trainer | {"val_check_interval": 1},
                "export": {"monitor": "val/loss", "mode": "min"},
            },
        },
        "compare": [{"metric": "val/loss", "stages": ["sft", "dpo"], "text": "both"}],
    }


@pytest.fixture
def written(tiny_model_folder, tmp_path) -> dict[str, Any]:
    return content(tiny_model_folder(), tmp_path)


@dataclass(frozen=True)
class Finished:
    """A run that went from start to report: its folder, what was written, what it recorded and what it said."""

    place: Path
    written: dict[str, Any]
    stages: dict[str, Any]
    said: str

    def copy(self, tmp_path: Path, *stages: str) -> dict[str, Any]:
        """Copies the run to another folder, with the named stages alone; returns its pipeline there."""
        shutil.copytree(self.place / "run", tmp_path / "run")
        file = tmp_path / "run/manifest.json"
        manifest = json.loads(file.read_text())
        for name in set(self.stages) - set(stages):
            del manifest["stages"][name]
            shutil.rmtree(tmp_path / "run" / name)
        file.write_text(json.dumps(manifest))
        return copy.deepcopy(self.written) | {"run_dir": str(tmp_path / "run")}


@pytest.fixture(scope="module")
def finished(tiny_model_folder, tmp_path_factory) -> Finished:
    place = tmp_path_factory.mktemp("finished")
    written = content(tiny_model_folder(), place)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        stages = run(written, place)
    return Finished(place, written, stages, said.getvalue())


def run(written: dict[str, Any], tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """Runs through the command line; returns which stages ran, and their records."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    main(["pipeline", "--config", str(file), *overrides])
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    return manifest["stages"]


def ran(stages: dict[str, Any]) -> list[str]:
    return [name for name, record in stages.items() if record["ran"]]


def test_everything_from_start_to_report(finished):
    written, stages, out = finished.written, finished.stages, finished.said
    assert ran(stages) == ["sft", "pairs", "dpo"]
    folder = finished.place / "run"

    # A stage's model is what the next one starts from, and a folder that transformers loads.
    merged = yaml.safe_load((folder / "dpo/config.yaml").read_text())
    assert merged["model"]["init_args"]["model"] == str(folder / "sft/model")
    assert merged["seed_everything"] == 3
    AutoModelForCausalLM.from_pretrained(folder / "dpo/model")

    pairs = [json.loads(line) for line in (folder / "pairs/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == stages["pairs"]["metrics"]["pairs"] > 0
    assert all(ord(pair["chosen"][0]) % 2 == 0 and ord(pair["rejected"][0]) % 2 == 1 for pair in pairs)
    assert all(pair["prompt"] == f"{int(pair['answer']) // 2}+{int(pair['answer']) // 2}=?" for pair in pairs)
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)

    # Accuracy is that of the greedy completions that were written down.
    for name in ("sft", "dpo"):
        answers = [json.loads(line) for line in (folder / name / "test_answers.jsonl").read_text().splitlines()]
        right = [bool(a["completion"]) and ord(a["completion"][0]) % 2 == 0 for a in answers]
        assert stages[name]["evaluation"]["accuracy"] == pytest.approx(sum(right) / 12)
        assert stages[name]["evaluation"]["rows"] == 12

    summary = json.loads((folder / "summary.json").read_text())
    assert [row["stage"] for row in summary["stages"]] == ["sft", "pairs", "dpo"]
    assert summary["stages"][2]["test_accuracy"] == stages["dpo"]["evaluation"]["accuracy"]
    assert_tested(folder, summary)
    assert stages["dpo"]["metrics"]["val_before/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert f"test accuracy {stages['dpo']['evaluation']['accuracy']:.1%} of 12 problems" in out
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3  # one per fit stage and the comparison
    assert page.count("✔") + page.count("✘") == 4  # two samples for each of two models
    assert not list(folder.rglob("*.partial*"))
    start = written["stages"]["sft"]["model"]["init_args"]["model"]
    assert stages["sft"]["inputs"].keys() == {str(finished.place / "rows.jsonl"), start}
    assert json.loads((folder / "manifest.json").read_text())["versions"]["rlhf-lightning"]


def assert_tested(folder, summary):
    """Intervals and paired tests are those of the stored rewards, in the summary and on the page."""
    sft, dpo = (
        [json.loads(line)["reward"] for line in (folder / name / "test_answers.jsonl").read_text().splitlines()]
        for name in ("sft", "dpo")
    )
    by_stage = {row["stage"]: row for row in summary["stages"]}
    expected, interval = paired_bootstrap(dpo, sft, seed=3), wilson_interval(int(sum(dpo)), 12)
    assert by_stage["dpo"]["test_interval"] == [interval.low, interval.high]
    assert by_stage["dpo"]["test_comparison"] == {
        "against": "sft",
        "prompts": 12,
        **dataclasses.asdict(expected),
        "mcnemar": mcnemar([reward == 1 for reward in dpo], [reward == 1 for reward in sft]),
    }
    assert "test_comparison" not in by_stage["sft"]
    assert "test_interval" not in by_stage["pairs"]
    page = (folder / "report.html").read_text()
    assert f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %" in page
    assert f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f} %" in page


def test_what_is_finished_and_unchanged_is_not_run_again(finished, tmp_path):
    first, written = finished.stages, finished.copy(tmp_path, *finished.stages)
    CALLS.clear()
    second = run(written, tmp_path)
    assert ran(second) == []
    assert CALLS == []  # the test set is not read again either
    assert_tested(tmp_path / "run", json.loads((tmp_path / "run/summary.json").read_text()))
    for name in first:
        assert second[name]["key"] == first[name]["key"]
        assert second[name]["metrics"] == first[name]["metrics"]

    # A moved run directory is the same run.
    (tmp_path / "run").rename(tmp_path / "moved")
    file = tmp_path / "pipeline.yaml"
    main(["pipeline", "--config", str(file), "--run_dir", str(tmp_path / "moved")])
    assert ran(json.loads((tmp_path / "moved/manifest.json").read_text())["stages"]) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # other weights: everything after it
        pytest.param("stages.sft.trainer.max_steps=3", ["sft", "pairs", "dpo"], marks=pytest.mark.slow),
        ("stages.dpo.model.init_args.beta=0.3", ["dpo"]),
        pytest.param("stages.pairs.sampling.temperature=3.0", ["pairs", "dpo"], marks=pytest.mark.slow),
        pytest.param("seed=4", ["sft", "pairs", "dpo"], marks=pytest.mark.slow),
        pytest.param("evaluation.samples=1", [], marks=pytest.mark.slow),
    ],
)
def test_a_change_reruns_what_depends_on_it(finished, tmp_path, change, expected):
    written = finished.copy(tmp_path, *finished.stages)
    assert ran(run(written, tmp_path, change)) == expected


@pytest.mark.slow
def test_changed_rows_and_damaged_outputs_are_noticed(written, tmp_path):
    run(written, tmp_path)
    pairs = tmp_path / "run/pairs/pairs.jsonl"
    whole = pairs.read_text()
    pairs.write_text(whole[:-20])
    assert ran(run(written, tmp_path)) == ["pairs"]  # made again as it was, so what follows stands
    assert pairs.read_text() == whole
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"#8"', '"#9"'))
    assert ran(run(written, tmp_path)) == ["sft", "pairs", "dpo"]


@pytest.mark.slow
def test_a_new_test_set_is_evaluated_without_training(written, tmp_path):
    run(written, tmp_path)
    CALLS.clear()
    stages = run(written, tmp_path, "evaluation.limit=5")
    assert ran(stages) == []
    assert len(CALLS) == 2
    assert stages["dpo"]["evaluation"]["rows"] == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(RuntimeError, marks=pytest.mark.slow)])
def test_an_interrupted_stage_starts_again_from_its_inputs(finished, tmp_path, monkeypatch, capsys, error):
    written = finished.copy(tmp_path, "sft")
    real = kinds.run_sample

    def interrupted(stage, folder, seed, dtype, *others):
        real(stage, folder, seed, dtype)  # the output is there, the stage is not finished
        (folder / "pairs.jsonl").write_text("half a row")
        raise error

    monkeypatch.setattr(kinds, "run_sample", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        run(written, tmp_path)
    assert exit_info.value.code == (130 if error is KeyboardInterrupt else 1)
    said = capsys.readouterr().err.strip().splitlines()
    if error is KeyboardInterrupt:
        assert len(said) == 1
        assert said[0].startswith("interrupted: the same command resumes")
    else:
        assert said[-1] == "rlhf-lightning: stage 'pairs': RuntimeError (--debug shows where)"
    record = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert [record[name]["status"] for name in ("sft", "pairs")] == ["finished", "running"]
    monkeypatch.setattr(kinds, "run_sample", real)
    assert ran(run(written, tmp_path)) == ["pairs", "dpo"]
    assert "half" not in (tmp_path / "run/pairs/pairs.jsonl").read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(written, tmp_path):
    first = run(written, tmp_path)
    written["run_dir"] = str(tmp_path / "again")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    second = run_pipeline(load_pipeline(tmp_path / "pipeline.yaml"), say=lambda line: None).stages
    for name in first:
        assert second[name]["outputs"] == first[name]["outputs"]


@pytest.mark.slow
def test_a_policy_is_rewarded_by_the_model_of_an_earlier_stage(written, tmp_path):
    """Its class reads the reward model when it is made, which is before there is one when all stages are checked."""
    dpo = written["stages"].pop("dpo")
    written["stages"]["reward"] = {
        **dpo,
        "model": {"class_path": "RewardModule", "init_args": {"model": "${outputs.sft.model}", "pooling": "mean"}},
        "trainer": written["stages"]["sft"]["trainer"],
        "export": {},
        "evaluate": False,
    }
    reward = {"class_path": "rlhf_lightning.rewards.RewardModelReward"}
    reward["init_args"] = {"model": "${outputs.reward.model}"}
    policy = {"model": "${outputs.sft.model}", "rewards": [reward], "max_completion_length": 4}
    written["stages"]["grpo"] = {
        "kind": "fit",
        "model": {"class_path": "GRPOModule", "init_args": policy},
        "data": {"class_path": "PromptDataModule", "init_args": {"train": str(tmp_path / "rows.jsonl")}},
        "trainer": written["stages"]["sft"]["trainer"],
    }
    written["compare"] = []
    stages = run(written, tmp_path)
    assert ran(stages) == ["sft", "pairs", "reward", "grpo"]
    assert stages["grpo"]["inputs"].keys() >= {str(tmp_path / "run" / name / "model") for name in ("sft", "reward")}

    policy["rewards"][0]["init_args"]["model"] = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        run(written, tmp_path)


@pytest.mark.slow
def test_test_loss_is_that_of_the_exported_model(written, tmp_path):
    """The best of several models is exported, and what is reported of it is measured on it."""
    stage = written["stages"]["dpo"]
    stage["data"]["init_args"]["test"] = stage["data"]["init_args"]["val"]
    # Uphill, so that the first model is the best one.
    stage["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 1.0, "maximize": True},
    }
    stage["trainer"]["max_steps"] = 3
    metrics = run(written, tmp_path)["dpo"]["metrics"]
    assert metrics["steps"] == 3
    assert metrics["test/loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)
    history = [json.loads(line) for line in (tmp_path / "run/dpo/history.jsonl").read_text().splitlines()]
    losses = [float("inf") if row["val/loss"] is None else row["val/loss"] for row in history if "val/loss" in row][1:]
    assert losses[-1] > min(losses)  # the last model is another one
    assert metrics["val/loss"] == pytest.approx(min(losses), rel=1e-5)
    assert metrics["exported_step"] == losses.index(min(losses)) + 1


@pytest.mark.slow
def test_stages_of_a_policy_that_is_not_chosen_stay_finished(written, tmp_path):
    policies = {"a": {"dpo": written["stages"].pop("dpo")}}
    policies["b"] = {"dpo2": policies["a"]["dpo"]}
    written |= {"policy": "a", "policies": policies, "compare": []}
    assert ran(run(written, tmp_path)) == ["sft", "pairs", "dpo"]
    assert ran(run(written, tmp_path, "policy=b")) == ["dpo2"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [row["stage"] for row in summary["stages"]] == ["sft", "pairs", "dpo2"]
    assert ran(run(written, tmp_path, "policy=[a,b]")) == []


@pytest.mark.parametrize("key", ["stages.pairs.verifier", "evaluation.verifier"])
def test_a_verifier_that_there_is_not_is_noticed_before_anything_runs(written, tmp_path, key, capsys):
    with pytest.raises(SystemExit):
        run(written, tmp_path, f"{key}=nowhere.right")
    assert "verifier 'nowhere.right' cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "run/sft").exists()
