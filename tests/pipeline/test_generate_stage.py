"""A stage of kind ``generate``: the rows of the command, continued after an interruption, and trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.generation import GenerateOptions, generate_rows
from rlhf_lightning.inference import SamplingParams
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.utils.messages import UsageError

from ..generation.test_generate import interrupt_after, timeless, written
from ..generation.verifiers import letters

SCORER = f"{letters.__module__}.letters"


@pytest.fixture
def pipeline(tiny_model_folder: Callable[[], Path], tmp_path: Path) -> dict[str, Any]:
    rows = written(tmp_path / "rows.jsonl", [{"prompt": f"{n}+{n}=", "answer": str(n)} for n in range(6)])
    answers = {
        "kind": "generate",
        "model": str(tiny_model_folder()),
        "prompts": rows,
        "num_samples": 2,
        "sampling": {"max_new_tokens": 6, "top_k": 20},
        "strategy": {"class_path": "best_of_n", "init_args": {"n": 2}},
        "scorer": SCORER,
    }
    sft = {
        "kind": "fit",
        "model": {"class_path": "SFTModule", "init_args": {"model": str(tiny_model_folder())}},
        "data": {"class_path": "SFTDataModule", "init_args": {"train": "${outputs.answers.rows}"}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False},
    }
    return {"run_dir": str(tmp_path / "run"), "seed": 5, "stages": {"answers": answers, "sft": sft}}


def run(content: dict[str, Any], tmp_path: Path, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    main(["pipeline", "--config", str(file), *overrides])
    found: dict[str, Any] = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    return found


def test_the_stage_writes_what_the_command_writes(pipeline, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(SystemExit):
            run(pipeline, tmp_path)
    rows = tmp_path / "run/answers/generated.jsonl"
    assert len(rows.read_text().splitlines()) == 5
    stages = run(pipeline, tmp_path)
    stage = pipeline["stages"]["answers"]
    options = GenerateOptions(
        model=stage["model"],
        prompts=stage["prompts"],
        output=str(tmp_path / "out.jsonl"),
        num_samples=2,
        sampling=SamplingParams(max_new_tokens=6, top_k=20),
        strategy={"class_path": "BestOfN", "init_args": {"n": 2, "scorer": SCORER}},
        seed=5,
    )
    summary = generate_rows(options)
    assert timeless(rows) == timeless(tmp_path / "out.jsonl")
    metrics = stages["answers"]["metrics"]
    assert metrics == {name: summary[name] for name in metrics}
    assert metrics["rows"] == 12
    assert stages["sft"]["status"] == "finished"
    assert "12 answers to 6 prompts, " in (tmp_path / "run/report.html").read_text()

    # A second start runs nothing; a changed option runs the stage and what depends on it.
    again = run(pipeline, tmp_path)
    assert [again[name]["ran"] for name in ("answers", "sft")] == [False, False]
    changed = run(pipeline, tmp_path, "stages.answers.sampling.top_k=10")
    assert [changed[name]["ran"] for name in ("answers", "sft")] == [True, True]
    assert timeless(rows) != timeless(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.answers.num_sample=2", "no key 'num_sample'; did you mean 'num_samples'?"),
        ("stages.answers.output=x.jsonl", "output is 'x.jsonl', and the stage names it itself: leave it out"),
        ("stages.answers.sampling.topk=2", "sampling has no key 'topk'; did you mean 'top_k'?"),
    ],
)
def test_mistakes_are_found_when_the_file_is_read(pipeline, tmp_path, change, message):
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    with pytest.raises(UsageError) as raised:
        load_pipeline(file, [change])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.answers.strategy.init_args.m=2", "strategy BestOfN has no option 'm'"),
        ("stages.answers.cache=pages", "cache is 'pages'; it must be one of dynamic, static, paged, int8"),
        ("stages.answers.strategy=null", "no strategy chooses by it"),
    ],
)
def test_mistakes_are_found_before_anything_runs(pipeline, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit):
        run(pipeline, tmp_path, change)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rlhf-lightning: stage 'answers': ")
    assert message in said
    assert not (tmp_path / "run").exists()
