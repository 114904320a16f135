"""Sizes of stages before they run: counted by hand, and measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.inference import LocalEngine, SamplingParams, cpu_linear
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.config import Evaluation
from rlhf_lightning.pipeline.dry_run import plan_lines, plan_pipeline
from rlhf_lightning.pipeline.rows_ahead import RowsAhead, Sources, rows_ahead
from rlhf_lightning.pipeline.stage_sizes import Sizes, StagePlan, in_seconds
from rlhf_lightning.pipeline.stages import SampleStage
from rlhf_lightning.pipeline.workload import load_of, samples_of

NANO = "configs/models/nano"
TOKENS = 7
SEARCH = {"class_path": "best_of_n", "init_args": {"scorer": "rlhf_lightning.rewards.exact_answer"}}
# Problems of different lengths.
PROMPTS = ["1+1=", "22+3=", "1+2+3=", "100+20="]


@pytest.fixture(autouse=True)
def without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are not copied; layers of this size are the subject of a test of their own."""
    monkeypatch.setattr(cpu_linear, "_SMALLEST", 1 << 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NANO)).save_pretrained(place)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(place)
    return str(place)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    place = tmp_path / "prompts.jsonl"
    place.write_text("".join(f'{{"prompt": "{text}", "answer": "2"}}\n' for text in PROMPTS))
    return str(place)


def planned(tmp_path: Path, stages: dict[str, Any], dtype: str = "float32") -> dict[str, StagePlan]:
    return {one.name: one for one in plan_pipeline(pipeline_of(tmp_path, stages, dtype))}


def pipeline_of(tmp_path: Path, stages: dict[str, Any], dtype: str = "float32") -> Any:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        yaml.safe_dump({"run_dir": str(tmp_path / "run"), "dtype": dtype, "stages": stages}, sort_keys=False)
    )
    return load_pipeline(file, ())


def sizes() -> tuple[int, int]:
    """Weights of the model, and numbers that it keeps of a token."""
    config = AutoConfig.from_pretrained(NANO)
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return AutoModelForCausalLM.from_config(config).num_parameters(), kept


@pytest.fixture(autouse=True)
def one_operation_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.pipeline.stage_sizes.Sizes.seconds", lambda self, operations: operations)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_samples(tmp_path, model, prompts, dtype, size):
    stage = {"kind": "sample", "model": model, "prompts": prompts, "num_samples": 3, "rows": ["samples"]}
    stage |= {"sampling": {"max_new_tokens": TOKENS}}
    found = planned(tmp_path, {"own": stage}, dtype)["own"]
    weights, kept = sizes()
    lengths = [len(AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]) for text in PROMPTS]
    # Twelve rows have places for the longest prompt and seven tokens; every prompt is computed once.
    assert found.memory == size * (weights + kept * 12 * (max(lengths) + TOKENS))
    assert found.seconds == pytest.approx(2 * weights * (sum(lengths) + 12 * TOKENS))
    assert found.facts[0] == "4 prompts, 12 samples"
    assert f"up to {12 * TOKENS} tokens" in found.facts


def test_twice_as_many_with_a_hint_and_none_on_a_server(tmp_path, model, prompts):
    stage = {"kind": "sample", "model": model, "prompts": prompts, "num_samples": 3}
    stages = {
        "hinted": stage | {"rows": ["demonstrations"], "hint": "{prompt}{answer}"},
        "served": stage | {"server": {"url": "http://localhost:1"}},
        "searched": stage | {"strategy": SEARCH},
    }
    found = planned(tmp_path, stages)
    assert found["hinted"].facts[0] == "4 prompts, up to 24 samples"
    assert (found["served"].memory, found["served"].seconds) == (None, None)
    assert "tokens not known" in found["searched"].facts
    assert found["searched"].seconds is None


def test_an_ensemble_holds_all_of_its_models(tmp_path, model, prompts):
    stage = {"kind": "sample", "prompts": prompts, "num_samples": 1, "rows": ["samples"]}
    found = planned(tmp_path, {"one": stage | {"model": model}, "two": stage | {"model": [model, model]}})
    assert found["two"].memory == 2 * found["one"].memory
    assert found["two"].seconds == 2 * found["one"].seconds


def test_suites_and_rounds(tmp_path, model, prompts):
    tasks = [{"name": "sums", "prompts": prompts, "num_samples": 2, "limit": 3, "sampling": {"max_new_tokens": 5}}]
    suite = {"name": "small", "tasks": tasks}
    own = {"kind": "sample", "model": "${round.model}", "prompts": prompts, "sampling": {"max_new_tokens": 5}}
    sft = {
        "kind": "fit",
        "config": ["configs/sft/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {"init_args": {"model": "${round.model}"}},
        "data": {"init_args": {"train": "sums:demonstrations?rows=8", "global_batch_size": 4}},
        "trainer": {"max_epochs": 1, "logger": False, "callbacks": []},
    }
    loop = {"kind": "rounds", "model": model, "rounds": 2, "suite": suite, "body": {"own": own, "sft": sft}}
    loop |= {"criteria": {"on_reject": "new_seed"}}
    stages = {
        "test": {"kind": "evaluate", "models": {"a": model, "b": model}, "suite": suite},
        "gate": {"kind": "gate", "model": model, "accepted": model, "suite": suite},
        "loop": loop,
    }
    found = planned(tmp_path, stages)
    assert found["test"].facts[:2] == ["1 task", "12 samples"]
    assert found["gate"].seconds == found["test"].seconds > 0
    # A start and two candidates are tested; two rounds.
    one_model = found["test"].seconds / 2
    inner = [one.seconds for one in found["loop"].body]
    assert all(inner)
    assert found["loop"].seconds == pytest.approx(3 * one_model + 2 * sum(inner))


def test_other_kinds(tmp_path, model, prompts):
    common = {"model": model, "prompts": prompts, "sampling": {"max_new_tokens": 5}}
    stages = {
        "answers": {"kind": "generate", **common, "num_samples": 2, "limit": 3},
        "steps": {"kind": "label-steps", **common, "num_solutions": 2, "num_completions": 6},
        "new": {"kind": "challenge", **common, "number": 10, "num_samples": 3, "writing": {"max_new_tokens": 4}},
        "soup": {"kind": "merge", "method": "linear", "models": [model, model]},
        "file": {"kind": "export", "model": model},
    }
    found = planned(tmp_path, stages)
    weights, _ = sizes()
    assert found["answers"].facts[:2] == ["3 prompts, 6 samples", f"{weights:,} parameters"]
    assert found["steps"].facts[0] == "4 prompts, 8 solutions and 6 completions of each of their steps"
    assert found["steps"].seconds is None
    assert found["new"].facts[0] == "10 requests, up to 30 samples"
    assert "up to 190 tokens" in found["new"].facts
    assert found["soup"].facts == [f"2 models, {weights:,} parameters each", "memory and time not known"]
    assert found["file"].facts == [f"{weights:,} parameters", "memory and time not known"]


def test_the_last_line_sums_up_what_runs(tmp_path, model, prompts, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.pipeline.stage_sizes.Sizes.seconds", lambda self, operations: 20.0)
    stage = {"kind": "sample", "model": model, "prompts": prompts, "sampling": {"max_new_tokens": 5}}
    stages = {"own": stage, "again": stage, "searched": stage | {"strategy": SEARCH}}
    lines = plan_lines(pipeline_of(tmp_path, stages))
    assert lines[-1].startswith(
        "in all: 3 of 3 stages run; 40 s of arithmetic, or as in earlier runs, without searched; "
    )


def test_caches_are_as_large_as_measured(tmp_path, model, prompts):
    stage = {"kind": "sample", "model": model, "prompts": prompts, "num_samples": 8}
    own = pipeline_of(tmp_path, {"own": stage | {"sampling": {"max_new_tokens": 32}}}).stages["own"]
    (samples,) = samples_of(own, Sources())
    expected = load_of(samples, Sources(), str, "float32").caches
    engine = LocalEngine.from_pretrained(model, dtype="float32")
    # No sample ends early.
    params = SamplingParams(max_new_tokens=32, min_new_tokens=32, seed=0)
    engine.generate(PROMPTS, num_samples=8, sampling=params)
    assert engine.statistics()["cache_bytes"] == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize(
    ("options", "file", "rows", "completions"),
    [
        ({"rows": ["pairs"]}, "pairs", 10, 2),
        ({"rows": ["pairs"], "pairing": "all"}, "pairs", 60, 2),  # six pairs of four samples
        ({"rows": ["demonstrations"]}, "demonstrations", 10, 1),
        ({"rows": ["demonstrations"], "keep": 3}, "demonstrations", 30, 1),
        ({"rows": ["demonstrations"], "keep": None}, "demonstrations", 40, 1),
        ({"rows": ["unpaired"], "max_rows": 7}, "unpaired", 7, 1),
        ({"rows": ["pairs", "samples"], "seed_rows": "s.jsonl", "seed_ratio": 0.5}, "pairs", 20, 2),
        ({"rows": ["pairs", "samples"], "seed_rows": "s.jsonl", "seed_ratio": 0.5}, "samples", 40, 1),
        ({"rows": ["pairs"], "replay": {"share": 0.5}}, "pairs", 15, 2),
    ],
)
def test_rows_that_a_stage_will_write(options, file, rows, completions):
    stage = SampleStage(model="m", prompts="p.jsonl", **options)
    outputs = {name: f"here/{place}" for name, place in stage.outputs.items()}
    found = rows_ahead(stage, outputs, prompts=10, each=4, tokens=5, mean=2.5)
    assert found[f"here/{file}.jsonl"] == RowsAhead(rows, 2.5, 5.0 * completions)


def test_a_fit_on_rows_of_an_earlier_stage(tmp_path, model, prompts):
    own = {"kind": "sample", "model": model, "prompts": prompts, "num_samples": 3, "sampling": {"max_new_tokens": 5}}
    dpo = {
        "kind": "fit",
        "config": ["configs/dpo/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {"init_args": {"model": model}},
        "data": {"init_args": {"train": "${outputs.own.pairs}", "global_batch_size": 2}},
        "trainer": {"max_epochs": 3, "logger": False, "callbacks": []},
    }
    found = planned(tmp_path, {"own": own, "dpo": dpo})["dpo"]
    weights, _ = sizes()
    lengths = [len(AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]) for text in PROMPTS]
    assert "up to 4 rows" in found.facts
    # Three epochs of four pairs: a prompt and two completions each.
    assert found.seconds == pytest.approx(6 * weights * 3 * (sum(lengths) + 4 * 2 * 5))


def test_the_test_of_an_exported_model_is_counted(tmp_path, model, prompts):
    soup = {"kind": "merge", "method": "linear", "models": [model, model]}
    sft = {
        "kind": "fit",
        "config": ["configs/sft/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {"init_args": {"model": model}},
        "data": {"init_args": {"train": "sums:demonstrations?rows=8", "global_batch_size": 4}},
        "trainer": {"max_epochs": 1, "logger": False, "callbacks": []},
    }
    pipeline = pipeline_of(tmp_path, {"sft": sft, "other": sft | {"evaluate": False}, "soup": soup})
    tested = replace(pipeline, evaluation=Evaluation(prompts=prompts, max_new_tokens=TOKENS, limit=3))
    found = {one.name: one for one in plan_pipeline(tested)}
    weights, _ = sizes()
    lengths = [len(AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]) for text in PROMPTS]
    # Three of four prompts, whose mean length is that of the first rows.
    answers = 2 * weights * 3 * (sum(lengths) / 4 + TOKENS)
    assert found["sft"].seconds - found["other"].seconds == pytest.approx(answers)
    said = f"then a test of 3 prompts, up to {3 * TOKENS} tokens"
    assert [said in one.facts for one in found.values()] == [True, False, True]
    # A merge reads and writes files: its time is not known.
    assert found["soup"].seconds is None
    last = plan_lines(tested)[-1]
    assert ", without soup; " in last
    assert last.endswith(" GiB in sft, without soup")


def test_samples_on_a_server_and_rows_that_are_enough(tmp_path, model, prompts):
    stage = {"kind": "sample", "model": model, "prompts": prompts, "num_samples": 3}
    found = planned(
        tmp_path, {"served": stage | {"server": {"url": "http://localhost:1"}}, "few": stage | {"max_rows": 2}}
    )
    assert found["served"].facts == ["memory and time not known"]
    assert found["few"].facts[0] == "4 prompts, up to 12 samples"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.034, "0.03 s"), (0.97, "1.0 s"), (9.6, "9.6 s"), (9.97, "10 s"), (1234.0, "1,234 s")]
)
def test_seconds_are_readable(seconds, text):
    assert in_seconds(seconds) == text


def test_models_of_a_pattern_have_the_size_of_one_of_them(tmp_path, model, prompts):
    body = {"dpo": {"kind": "merge", "method": "linear", "models": ["${round.model}"]}}
    run = tmp_path / "run"
    stages = {
        "loop": {"kind": "rounds", "model": model, "rounds": 2, "body": body},
        "file": {"kind": "export", "model": f"{run}/loop/rounds/*/dpo/model"},
    }
    assert planned(tmp_path, stages)["file"].facts[0] == f"{sizes()[0]:,} parameters"


def test_the_pipeline_of_a_night(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines = plan_lines(load_pipeline("configs/pipelines/overnight.yaml", [f"run_dir={tmp_path}/run"]))
    names = [line.split(" ")[0] for line in lines if line[0] != " "]
    assert names == ["sft", "reward", "steps", "process", "rounds", "merged", "searches", "gguf", "in"]
    # Three rounds of 512 pairs, by a model whose size is known before it is trained.
    assert any("up to 512 rows" in line and "603,712 parameters" in line for line in lines)
    assert all("not known (" not in line for line in lines)
    # The README shows a part of it; seconds are of a machine.
    (shown,) = re.findall(r"^```text\n(.*?)^```$", Path("README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    plan, part = (re.sub(r"[\d,.]+ s of", "N s of", text) for text in ("\n".join(lines), shown.rstrip()))
    assert part in plan
    assert not (tmp_path / "run").exists()


def test_a_generate_stage_has_budgets_of_its_own(tmp_path, model, prompts):
    stage = {"kind": "generate", "model": model, "prompts": prompts, "sampling": {"max_new_tokens": TOKENS}}
    stages = {"plain": stage, "one": stage | {"prompts_at_once": 1}, "few": stage | {"max_batch_tokens": 5}}
    found = planned(tmp_path, stages | {"small": stage | {"cache": "int8"}})
    weights, kept = sizes()
    longest = max(len(AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]) for text in PROMPTS)
    caches = {name: one.memory - 4 * weights for name, one in found.items()}
    assert caches["plain"] == 4 * kept * 4 * (longest + TOKENS)
    assert caches["one"] == caches["plain"] / 4
    assert caches["few"] == 4 * kept * 5
    assert caches["small"] < 0.32 * caches["plain"]


@pytest.mark.parametrize("folder", ["own", "own[1]"])
def test_a_model_that_the_stage_itself_wrote_before(tmp_path, model, folder):
    known = Sizes("float32")
    known.origins = {f"runs/{folder}/model": f"runs/{folder}/model"}
    assert known.origin(f"runs/{folder}/model") == f"runs/{folder}/model"
    known.origins = {f"runs/{folder}/model": model}
    assert known.origin(f"runs/{folder}/model") == model
