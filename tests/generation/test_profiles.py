"""The profiles of ``configs/inference``: each parses as written, and answers a prompt on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.generation import GenerateOptions
from rlhf_lightning.generation.command import read_options

FOLDER = Path(__file__).parents[2] / "configs" / "inference"
PACKAGED = "configs/inference/tiny_cpu.yaml"
# By profile: whether its strategy chooses by a scorer, which the user gives, and how many samples a prompt may have.
PROFILES = {
    "tiny_cpu": (False, 1),
    "balanced_cpu": (False, 8),
    "gpu_lowlatency": (False, 1),
    "gpu_maxquality": (True, 32),
}


def command(profile: str) -> list[str]:
    scorer = ["--scorer=TextScorer", "--scorer.term=length"] if PROFILES[profile][0] else []
    return [f"--config={FOLDER / profile}.yaml", *scorer]


def test_every_profile_is_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_options_are_those_of_the_file(profile: str) -> None:
    written: dict[str, Any] = yaml.safe_load((FOLDER / f"{profile}.yaml").read_text())
    found = read_options("generate", GenerateOptions, [*command(profile), "--model=m", "--prompt=p"], "").plain()
    assert found["device"] == ("cpu" if profile.endswith("_cpu") else "cuda")
    for name, value in written.items():
        if name == "strategy":
            options = found["strategy"]["init_args"]
            assert {key: options[key] for key in value["init_args"]} == value["init_args"]
        elif name == "sampling":
            assert {key: found["sampling"][key] for key in value} == value
        else:
            assert found[name] == value


@pytest.mark.parametrize("spelling", [["--config", PACKAGED], [f"-c={PACKAGED}"]])
def test_a_profile_is_found_from_any_folder(
    spelling: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*spelling, "--model=m", "--prompt=p"]
    assert read_options("generate", GenerateOptions, arguments, "").cache == "int8"
    # A file of that name here is the one that is meant.
    (tmp_path / "configs" / "inference").mkdir(parents=True)
    (tmp_path / "configs" / "inference" / "tiny_cpu.yaml").write_text("cache: paged\n")
    assert read_options("generate", GenerateOptions, arguments, "").cache == "paged"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_answers(profile: str, tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    here = ["--device=cpu", "--dtype=float32", "--sampling.max_new_tokens=4", "--max_batch_tokens=2048"]
    where = [f"--model={tiny_model_folder('llama')}", f"--prompts={prompts}", f"--output={output}"]
    main(["generate", *command(profile), *where, *here])
    [row] = [json.loads(line) for line in output.read_text().splitlines()]
    summary = json.loads((tmp_path / "answers.summary.json").read_text())
    # Drawn tokens are at least one and at most four for each sample that the strategy may draw.
    assert 1 <= summary["telemetry"]["new_tokens"] <= 4 * PROFILES[profile][1]
    assert row["prompt"] == "1+1="
